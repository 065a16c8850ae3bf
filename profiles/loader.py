"""Reads board and fleet profiles, also from inside a wheel.

Knows where the YAML files lie; ``schema`` knows what may stand in them.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import yaml
from pydantic import ValidationError

from profiles.errors import ProfileError
from profiles.schema import BoardProfile, FleetProfile, Strict

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable  # does not exist on Python 3.10

ProfileType = TypeVar("ProfileType", bound=Strict)


def board_ids() -> list[str]:
    """Every board that has a profile, sorted."""
    return list(_names("boards"))


def fleet_names() -> list[str]:
    """Every fleet that ships with the project, sorted."""
    return list(_names("fleets"))


@functools.cache
def load_board(board_id: str) -> BoardProfile:
    """Read one board profile.

    Raises:
        ProfileError: no such board, or its file is wrong.
    """
    if board_id not in board_ids():
        raise ProfileError(_unknown("board", board_id, board_ids()))
    place = f"profiles/boards/{board_id}.yaml"
    board = _parse(BoardProfile, _read(_folder("boards") / f"{board_id}.yaml", place), place)
    if board.board_id != board_id:
        raise ProfileError(f"{place}: board_id: is {board.board_id!r}, the file says {board_id!r}")
    return board


def load_fleet(name_or_path: str) -> FleetProfile:
    """Read a fleet profile: the name of one that ships with the project, or a YAML file.

    Raises:
        ProfileError: no such fleet, its file is wrong, or it names a board or a
            power mode that does not exist.
    """
    path = Path(name_or_path)
    if path.suffix in {".yaml", ".yml"} or len(path.parts) > 1:
        place = name_or_path
        fleet = _parse(FleetProfile, _read(path, place), place)
    elif name_or_path in fleet_names():
        place = f"profiles/fleets/{name_or_path}.yaml"
        text = _read(_folder("fleets") / f"{name_or_path}.yaml", place)
        fleet = _parse(FleetProfile, text, place)
    else:
        line = _unknown("fleet", name_or_path, fleet_names())
        raise ProfileError(f"{line}; a fleet of your own is named by its .yaml file")
    for group in fleet.devices:
        _check_board(group.board, group.power_mode, place)
    return fleet


def _check_board(board_id: str, power_mode: str | None, place: str) -> None:
    try:
        load_board(board_id).mode(power_mode)
    except ProfileError as error:
        raise ProfileError(f"{place}: {error}") from error


def _folder(kind: str) -> Traversable:
    return files("profiles").joinpath(kind)


@functools.cache
def _names(kind: str) -> tuple[str, ...]:
    entries = [Path(entry.name) for entry in _folder(kind).iterdir()]
    return tuple(sorted(entry.stem for entry in entries if entry.suffix == ".yaml"))


def _unknown(kind: str, name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name.lower(), known, n=4, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
    return f"there is no {kind} {name!r}; {hint}"


def _read(file: Traversable | Path, place: str) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise ProfileError(f"{place}: cannot be read: {reason}") from error


def _parse(model: type[ProfileType], text: str, place: str) -> ProfileType:
    try:
        values = yaml.safe_load(text)
    # PyYAML lets Python's own errors through: "!!int x", "2001-13-45", a thousand brackets.
    except (yaml.YAMLError, AttributeError, LookupError, RecursionError, ValueError) as error:
        line = " ".join(str(error).split())
        raise ProfileError(f"{place}: is not YAML: {line}") from error
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the whole file"
        reason = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            reason = "there is no such key; check the spelling"
        raise ProfileError(f"{place}: {key}: {reason}") from error
