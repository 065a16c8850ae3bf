from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.board import detect_board, memory_budget, read_power_modes, read_text
from profiles.loader import load_board
from wire_protocol.errors import DeviceError, FailureCode

BOARDS = Path(__file__).parents[1] / "golden/boards"
KIB = 1024


def put(root: Path, relative: str, text: str) -> None:
    file = root / relative
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def meminfo(root: Path, *, total_kib: int, available_kib: int) -> None:
    put(
        root,
        "proc/meminfo",
        f"MemTotal: {total_kib} kB\nMemFree: 1 kB\nMemAvailable: {available_kib} kB\n",
    )


@pytest.mark.parametrize(
    ("folder", "board_id", "l4t", "cpu_count", "power_mode"),
    [
        ("jetson-nano-jp4.6", "jetson-nano", "32.7.1", 2, "5W"),
        ("jetson-tx2-jp4.6", "jetson-tx2", "32.7.6", 4, "MAXP_CORE_ARM"),
        ("jetson-xavier-nx-jp5", "jetson-xavier-nx-8", "35.4.1", 6, "MODE_20W_6CORE"),
        ("jetson-agx-xavier-jp5", "jetson-agx-xavier-32", "35.6.4", 4, "MODE_15W_DESKTOP"),
        ("jetson-agx-orin-jp6", "jetson-agx-orin-64", "36.4.3", 12, "MODE_30W"),
        ("jetson-orin-nano-jp6", "jetson-orin-nano-8", "36.4.7", 6, "25W"),
    ],
)
def test_a_jetson_is_recognised(
    folder: str, board_id: str, l4t: str, cpu_count: int, power_mode: str
) -> None:
    facts = detect_board(BOARDS / folder, machine="aarch64")
    assert (facts.board_id, facts.l4t, facts.cpu_count) == (board_id, l4t, cpu_count)
    assert facts.power_mode == power_mode
    assert facts.note == ""
    assert "\0" not in facts.description


@pytest.mark.parametrize(
    "folder", sorted(path.name for path in BOARDS.iterdir() if path.name.startswith("jetson"))
)
def test_every_power_mode_of_a_recorded_jetson_is_in_its_board_profile(folder: str) -> None:
    facts = detect_board(BOARDS / folder, machine="aarch64")
    board = load_board(facts.board_id)
    assert {board.mode(name).name for name in facts.power_modes} == {
        mode.name for mode in board.power_modes
    }


@pytest.mark.parametrize(
    ("folder", "board_id", "description"),
    [
        ("rpi-4b-4gb", "rpi-4b-4", "Raspberry Pi 4 Model B Rev 1.5"),
        ("rpi-5-8gb", "rpi-5-8", "Raspberry Pi 5 Model B Rev 1.0"),
    ],
)
def test_a_raspberry_pi_is_recognised(folder: str, board_id: str, description: str) -> None:
    facts = detect_board(BOARDS / folder, machine="aarch64")
    assert (facts.board_id, facts.description, facts.cpu_count) == (board_id, description, 4)
    assert (facts.l4t, facts.power_mode, facts.power_modes, facts.note) == (None, None, (), "")


def test_a_pc_is_a_generic_board_and_that_is_no_surprise() -> None:
    facts = detect_board(BOARDS / "x86-pc", machine="x86_64")
    assert (facts.board_id, facts.cpu_count, facts.note) == ("generic-x86-64", 8, "")
    assert facts.memory_total_bytes == 16245964 * KIB


def test_a_test_host_with_the_files_of_a_jetson_counts_as_the_jetson() -> None:
    facts = detect_board(BOARDS / "jetson-tx2-jp4.6", machine="x86_64")
    assert facts.board_id == "jetson-tx2"


def test_an_arm_board_without_a_profile_falls_back_to_the_generic_one_and_says_so(
    tmp_path: Path,
) -> None:
    put(tmp_path, "proc/device-tree/model", "FriendlyElec NanoPi R5S\0")
    facts = detect_board(tmp_path, machine="aarch64")
    assert facts.board_id == "generic-arm64"
    assert facts.note == "no board profile for 'FriendlyElec NanoPi R5S'"


def test_a_machine_of_another_kind_falls_back_to_the_generic_pc_and_says_so(
    tmp_path: Path,
) -> None:
    facts = detect_board(tmp_path, machine="riscv64")
    assert (facts.board_id, facts.cpu_count) == ("generic-x86-64", 1)
    assert facts.note == "no board profile for machine 'riscv64'"


@pytest.mark.parametrize(
    ("visible_gib", "board_id"), [(1.8, "rpi-4b-2"), (3.7, "rpi-4b-4"), (7.6, "rpi-4b-8")]
)
def test_the_memory_decides_between_variants(
    tmp_path: Path, visible_gib: float, board_id: str
) -> None:
    put(tmp_path, "proc/device-tree/model", "Raspberry Pi 4 Model B Rev 1.4\0")
    meminfo(tmp_path, total_kib=int(visible_gib * KIB * KIB), available_kib=1)
    facts = detect_board(tmp_path, machine="aarch64")
    assert (facts.board_id, facts.note) == (board_id, "")


def test_more_memory_than_any_variant_has_means_the_largest_with_a_note(tmp_path: Path) -> None:
    put(tmp_path, "proc/device-tree/model", "NVIDIA Orin NX Developer Kit\0")
    meminfo(tmp_path, total_kib=24 * KIB * KIB, available_kib=1)
    facts = detect_board(tmp_path, machine="aarch64")
    assert facts.board_id == "jetson-orin-nx-16"
    assert "more memory" in facts.note


def test_an_unknown_memory_size_means_the_smallest_variant_with_a_note(tmp_path: Path) -> None:
    put(tmp_path, "proc/device-tree/model", "NVIDIA Orin NX Developer Kit\0")
    facts = detect_board(tmp_path, machine="aarch64")
    assert (facts.board_id, facts.memory_total_bytes) == ("jetson-orin-nx-8", 0)
    assert "smallest" in facts.note


def test_a_tegra_release_of_another_form_is_no_release(tmp_path: Path) -> None:
    put(tmp_path, "etc/nv_tegra_release", "something else\n")
    assert detect_board(tmp_path, machine="aarch64").l4t is None


def test_without_a_recorded_choice_the_default_power_mode_is_active(tmp_path: Path) -> None:
    shutil.copytree(BOARDS / "jetson-orin-nano-jp6/etc", tmp_path / "etc")
    assert read_power_modes(tmp_path)[0] == "25W"


def test_a_power_mode_that_the_configuration_lacks_is_unknown(tmp_path: Path) -> None:
    shutil.copytree(BOARDS / "jetson-orin-nano-jp6/etc", tmp_path / "etc")
    put(tmp_path, "var/lib/nvpmodel/status", "pmode:0017\n")
    assert read_power_modes(tmp_path) == (None, ("15W", "25W", "MAXN_SUPER", "7W"))


def test_an_absolute_link_stays_below_the_root(tmp_path: Path) -> None:
    outside = tmp_path / "outside.conf"
    outside.write_text("the host's file")
    root = tmp_path / "board"
    put(root, "etc/nvpmodel/nvpmodel_t186.conf", "the board's file")
    (root / "etc/nvpmodel.conf").symlink_to("/etc/nvpmodel/nvpmodel_t186.conf")
    (root / "etc/escape").symlink_to("../../../../../outside.conf")
    (root / "etc/stray").symlink_to(outside)
    (root / "etc/loop").symlink_to("loop")
    assert read_text(root, "etc/nvpmodel.conf") == "the board's file"
    assert read_text(root, "etc/escape") is None
    assert read_text(root, "etc/stray") is None
    assert read_text(root, "etc/loop") is None


def test_outside_of_containers_the_available_memory_less_a_tenth_is_the_budget() -> None:
    budget = memory_budget(BOARDS / "jetson-agx-orin-jp6")
    available = 58540212 * KIB
    assert budget.source == "MemAvailable"
    assert budget.available_bytes == available - available // 10
    assert budget.limit_bytes == 64325016 * KIB


def test_a_small_board_keeps_at_least_256_mib_in_reserve(tmp_path: Path) -> None:
    meminfo(tmp_path, total_kib=2_000_000, available_kib=1_000_000)
    assert memory_budget(tmp_path).available_bytes == 1_000_000 * KIB - 256 * 2**20


def test_a_board_with_nothing_left_has_an_empty_budget(tmp_path: Path) -> None:
    meminfo(tmp_path, total_kib=2_000_000, available_kib=1000)
    assert memory_budget(tmp_path).available_bytes == 0


def test_the_limit_of_a_v1_container_counts_although_its_own_path_does_not_exist() -> None:
    budget = memory_budget(BOARDS / "container-cgroup-v1")
    assert budget.source == "cgroup v1 /"
    assert budget.limit_bytes == 2**31
    assert budget.available_bytes == 2**31 - (734003200 - 314572800)


def test_the_tightest_v2_cgroup_on_the_way_up_counts() -> None:
    budget = memory_budget(BOARDS / "container-cgroup-v2")
    assert budget.source == "cgroup v2 /edge.slice"
    assert budget.limit_bytes == 1610612736
    assert budget.available_bytes == 1610612736 - (1073741824 - 104857600)


def test_memory_high_counts_like_a_limit(tmp_path: Path) -> None:
    shutil.copytree(BOARDS / "container-cgroup-v2", tmp_path / "root")
    group = "sys/fs/cgroup/edge.slice/edge-agent.service"
    put(tmp_path / "root", f"{group}/memory.high", str(500 * 2**20))
    budget = memory_budget(tmp_path / "root")
    assert budget.source == "cgroup v2 /edge.slice/edge-agent.service"
    assert budget.available_bytes == 500 * 2**20 - 402653184


@pytest.mark.parametrize(
    "folder",
    sorted(
        path.parents[1].name
        for path in BOARDS.glob("*/proc/meminfo")
        if "container" not in str(path)
    ),
)
def test_a_cgroup_without_a_limit_does_not_count(folder: str) -> None:
    assert memory_budget(BOARDS / folder).source == "MemAvailable"


def test_a_cgroup_limit_is_enough_where_the_kernel_hides_its_memory(tmp_path: Path) -> None:
    shutil.copytree(BOARDS / "container-cgroup-v1", tmp_path / "root")
    (tmp_path / "root/proc/meminfo").unlink()
    assert memory_budget(tmp_path / "root").limit_bytes == 2**31


def test_a_system_that_shows_no_memory_at_all_is_a_device_error(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="no MemAvailable") as error:
        memory_budget(tmp_path)
    assert error.value.code is FailureCode.MISSING_FILE


@given(
    noise=st.dictionaries(
        st.sampled_from(
            [
                "proc/meminfo",
                "proc/self/cgroup",
                "proc/cpuinfo",
                "proc/device-tree/model",
                "etc/nvpmodel.conf",
                "etc/nv_tegra_release",
                "var/lib/nvpmodel/status",
                "sys/devices/system/cpu/online",
                "sys/fs/cgroup/memory.max",
            ]
        ),
        st.binary(max_size=60),
    )
)
def test_noise_instead_of_system_files_never_breaks_detection(
    noise: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("noise")
    for relative, data in noise.items():
        file = root / relative
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    facts = detect_board(root, machine="aarch64")
    assert facts.cpu_count >= 1
    assert load_board(facts.board_id).board_id == facts.board_id
