"""Which wheels a board needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker_server.wheelhouse import wanted_for
from profiles.errors import ProfileError
from profiles.loader import board_ids, load_board
from wire_protocol.errors import ConfigError


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "legend_edge-0.1.0-py3-none-any.whl"
    path.touch()
    return path


@pytest.mark.parametrize(
    ("board", "system", "python", "constraints"),
    [
        ("rpi-5-8", None, "3.11", "rpi-py311.txt"),
        ("rpi-5-8", "trixie", "3.13", "rpi-py313.txt"),
        ("jetson-orin-nano-8", None, "3.10", "jp6-py310.txt"),
    ],
)
def test_a_board_gets_the_python_and_the_versions_of_its_system(
    wheel: Path, board: str, system: str | None, python: str, constraints: str
) -> None:
    wanted = wanted_for(board, "train", wheel=wheel, system=system)
    assert (wanted.python, wanted.constraints) == (python, constraints)
    assert all(tag.endswith("aarch64") for tag in wanted.platforms)
    assert wanted.requirements == (f"{wheel}[train]",)


def test_a_board_with_a_trainer_of_its_own_gets_the_agents_wheels_only(wheel: Path) -> None:
    wanted = wanted_for("jetson-xavier-nx-8", "train", wheel=wheel)
    assert wanted.python == "3.11"
    assert wanted.requirements == (str(wheel),)


def test_a_server_on_a_pc_gets_wheels_for_a_pc(wheel: Path) -> None:
    wanted = wanted_for("generic-x86-64", "server", wheel=wheel)
    assert all(tag.endswith("x86_64") for tag in wanted.platforms)
    assert wanted.requirements == (f"{wheel}[server]",)


def test_every_supported_board_has_wheels_or_a_sentence(wheel: Path) -> None:
    for board_id in board_ids():
        for software in load_board(board_id).software:
            if software.supported == "first-class":
                wanted_for(board_id, "train", wheel=wheel, system=software.os)


def test_what_is_missing_is_said_in_one_line(wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="build it"):
        wanted_for("rpi-5-8", "train", wheel=tmp_path / "none.whl")
    with pytest.raises(ConfigError, match="it has: Raspberry Pi OS"):
        wanted_for("rpi-5-8", "train", wheel=wheel, system="Windows")
    with pytest.raises(ProfileError):
        wanted_for("toaster", "train", wheel=wheel)
