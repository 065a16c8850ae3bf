from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import profiles
from profiles.errors import ProfileError
from profiles.loader import board_ids, load_board, load_fleet

PACKAGE = Path(profiles.__file__).parent
DEMO = (PACKAGE / "fleets/demo4.yaml").read_text()


def fleet_file(folder: Path, text: str) -> str:
    file = folder / "fleet.yaml"
    file.write_text(text)
    return str(file)


def test_every_board_that_the_project_promises_has_a_profile() -> None:
    promised = (
        "jetson-nano jetson-tx2 jetson-xavier-nx-8 jetson-xavier-nx-16 jetson-agx-xavier-32 "
        "jetson-orin-nano-4 jetson-orin-nano-8 jetson-orin-nx-8 jetson-orin-nx-16 "
        "jetson-agx-orin-32 jetson-agx-orin-64 rpi-4b-2 rpi-4b-4 rpi-4b-8 rpi-5-4 rpi-5-8 "
        "rpi-5-16 generic-x86-64"
    )
    assert set(promised.split()) <= set(board_ids())
    assert [load_board(board_id).board_id for board_id in board_ids()] == board_ids()


def test_an_unknown_board_is_refused_with_the_nearest_ones() -> None:
    with pytest.raises(ProfileError, match=r"no board 'jetson-tx3'; did you mean jetson-tx2"):
        load_board("jetson-tx3")


def test_a_board_id_that_is_a_path_is_refused() -> None:
    with pytest.raises(ProfileError, match="no board"):
        load_board("../fleets/demo4")


def test_an_unknown_fleet_is_refused_with_the_nearest_ones() -> None:
    with pytest.raises(ProfileError, match=r"no fleet 'paper8'; did you mean paper80\?"):
        load_fleet("paper8")


def test_a_fleet_of_ones_own_is_read_from_its_file(tmp_path: Path) -> None:
    assert load_fleet(fleet_file(tmp_path, DEMO)) == load_fleet("demo4")


@pytest.mark.parametrize(
    ("before", "after", "line"),
    [
        ("time_dilation:", "time_dilatation:", r"time_dilatation: there is no such key"),
        ("power_mode: 5W", "powermode: 5W", r"devices\.1\.power_mode: Field required"),
        ("count: 1", "count: 0", r"devices\.0\.count: .*greater than or equal to 1"),
        ("board: rpi-5-8", "board: rpi-6-8", r"no board 'rpi-6-8'; did you mean rpi-5-8"),
        ("power_mode: 5W", "power_mode: 6W", r"no power mode '6W'; it has MAXN, 5W"),
        ("name: demo4", "name: [demo4", r"is not YAML"),
        ("up_mbps: 2,", "up_mbps: {low: 3, high: 2},", r"low 3 lies above high 2"),
    ],
)
def test_a_wrong_fleet_file_is_refused_in_one_line_that_names_file_and_key(
    tmp_path: Path, before: str, after: str, line: str
) -> None:
    assert before in DEMO
    path = fleet_file(tmp_path, DEMO.replace(before, after))
    with pytest.raises(ProfileError, match=line) as refusal:
        load_fleet(path)
    assert str(refusal.value).startswith(f"{path}: ")
    assert "\n" not in str(refusal.value)


def test_a_fleet_file_that_does_not_exist_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"nowhere\.yaml: cannot be read: No such file"):
        load_fleet(str(tmp_path / "nowhere.yaml"))


def test_a_fleet_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ProfileError, match="is not UTF-8 text"):
        load_fleet(str(path))


def test_an_empty_fleet_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="the whole file"):
        load_fleet(fleet_file(tmp_path, ""))


def test_profiles_load_from_inside_an_archive(tmp_path: Path) -> None:
    archive = tmp_path / "legend_edge.zip"
    with zipfile.ZipFile(archive, "w") as wheel:
        for file in PACKAGE.rglob("*"):
            if file.suffix in {".py", ".yaml"}:
                wheel.write(file, Path("profiles") / file.relative_to(PACKAGE))
    code = (
        f"import sys; sys.path.insert(0, {str(archive)!r}); "
        "import profiles, profiles.loader as l; "
        "print(profiles.__file__, l.load_fleet('paper80').device_count)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.split() == [str(archive / "profiles/__init__.py"), "80"]
