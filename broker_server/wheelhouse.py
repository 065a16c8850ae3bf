"""Wheels for boards without a network: what pip has to fetch, for which board.

Pure but for ``fill``, which runs pip. Knows boards and their constraint files; pip does the rest.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Literal

from profiles.loader import load_board
from profiles.schema import BoardProfile, Software
from wire_protocol.errors import ConfigError

Purpose = Literal["agent", "train", "server"]

_AARCH64 = ("manylinux_2_31_aarch64", "manylinux_2_28_aarch64", "manylinux2014_aarch64",
            "linux_aarch64")  # fmt: skip
_X86_64 = ("manylinux_2_28_x86_64", "manylinux2014_x86_64", "linux_x86_64")
_SHELL_PYTHON = "3.11"
"""What the agent itself runs on where the board's own Python is only for the trainer."""


@dataclass(frozen=True)
class Wanted:
    """One call of pip.

    Attributes:
        python: such as ``3.11``.
        platforms: tags of wheels that the board can use, the most specific first.
        constraints: a file name below ``profiles/constraints``; None for none.
        requirements: what to fetch.
    """

    python: str
    platforms: tuple[str, ...]
    constraints: str | None
    requirements: tuple[str, ...]


def wanted_for(
    board_id: str, purpose: Purpose, *, wheel: Path, system: str | None = None
) -> Wanted:
    """Say which wheels a board needs.

    Args:
        board_id: a board profile.
        purpose: the agent's shell alone, with what trains, or the server.
        wheel: this project's own wheel.
        system: part of the name of one of the board's systems; None takes its first.

    Raises:
        ConfigError: no such board or system, or no constraints for it.
        ProfileError: the board's profile is damaged.
    """
    if not wheel.is_file():
        raise ConfigError(f"{wheel} is not there; build it: pip wheel --no-deps --wheel-dir dist .")
    board = load_board(board_id)
    software = _software(board, system)
    generic = board_id.startswith("generic-")
    platforms = _X86_64 if "x86_64" in board.detection.machines else _AARCH64
    split = software.supported == "split trainer"
    python = platform.python_version().rpartition(".")[0] if generic else software.python
    extras = {"agent": "", "train": "[train]", "server": "[server]"}[purpose]
    if split:
        # The trainer's own packages come from NVIDIA and from the board's Python.
        python, extras = _SHELL_PYTHON, "" if purpose != "server" else extras
    constraints = None if generic or split else _constraints(software)
    return Wanted(python, platforms, constraints, (f"{wheel}{extras}",))


def fill(folder: Path, wanted: Wanted) -> None:
    """Fetch the wheels; those that are there already are not fetched again.

    Raises:
        ConfigError: pip found no wheel for the board, or did not reach its index.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arguments = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
    arguments += ["--only-binary", ":all:", "--python-version", wanted.python]
    arguments += ["--dest", str(folder), "--find-links", str(folder)]
    for tag in wanted.platforms:
        arguments += ["--platform", tag]
    with as_file(files("profiles") / "constraints") as constraints:
        if wanted.constraints:
            arguments += ["--constraint", str(constraints / wanted.constraints)]
        done = subprocess.run([*arguments, *wanted.requirements], check=False)
    if done.returncode != 0:
        raise ConfigError(
            "pip could not fetch every wheel, see above; wheels that no index has for this board "
            f"can be put into {folder} by hand"
        )


def _software(board: BoardProfile, system: str | None) -> Software:
    matching = [
        entry for entry in board.software if system is None or system.lower() in entry.os.lower()
    ]
    if not matching:
        names = "; ".join(entry.os for entry in board.software) or "none"
        raise ConfigError(f"{board.board_id} has no system {system!r}; it has: {names}")
    return matching[0]


def _constraints(software: Software) -> str:
    family = f"jp{software.jetpack.partition('.')[0]}" if software.jetpack else "rpi"
    name = f"{family}-py{software.python.replace('.', '')}.txt"
    if not (files("profiles") / "constraints" / name).is_file():
        raise ConfigError(
            f"there are no tested versions for {software.os} with Python {software.python}; "
            "install by hand, see the board table in docs/operations.md"
        )
    return name
