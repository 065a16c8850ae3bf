"""Options of a strategy: plain values of a run specification, checked.

Knows how to read a value and to say what would be right; knows no strategy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from wire_protocol.errors import ConfigError

Reader = Callable[[object], Any]
"""Returns the value, or raises ValueError that says what it must be."""


def integer(low: int, high: int | None = None) -> Reader:
    """A whole number from ``low`` to ``high``, both allowed."""
    wanted = f"a whole number of at least {low}" + ("" if high is None else f" and at most {high}")

    def read(value: object) -> int:
        if isinstance(value, int) and not isinstance(value, bool):
            within = low <= value and (high is None or value <= high)
            if within:
                return value
        raise ValueError(wanted)

    return read


def number(low: float, high: float = 1e9, *, low_included: bool = True) -> Reader:
    """A number from ``low`` to below ``high``."""
    wanted = f"a number {'of at least' if low_included else 'above'} {low:g} and below {high:g}"

    def read(value: object) -> float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            above = low <= value if low_included else low < value
            if above and value < high:
                return float(value)
        raise ValueError(wanted)

    return read


def share(*, below_one: bool = False) -> Reader:
    """A part of a whole, above 0; 1 is the whole, where that is allowed."""
    wanted = f"a number above 0 and {'below' if below_one else 'at most'} 1"

    def read(value: object) -> float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            within = 0 < value < 1 if below_one else 0 < value <= 1
            if within:
                return float(value)
        raise ValueError(wanted)

    return read


def choice(*names: str) -> Reader:
    """One of these words."""

    def read(value: object) -> str:
        if not isinstance(value, str) or value not in names:
            raise ValueError(f"one of {', '.join(names)}")
        return value

    return read


def switch() -> Reader:
    """True or false."""

    def read(value: object) -> bool:
        if isinstance(value, bool):
            return value
        raise ValueError("true or false")

    return read


def optional(reader: Reader) -> Reader:
    """What ``reader`` takes, or null."""

    def read(value: object) -> Any:
        if value is None:
            return None
        try:
            return reader(value)
        except ValueError as error:
            raise ValueError(f"null or {error}") from error

    return read


def read_options(
    strategy: str, readers: Mapping[str, Reader], options: Mapping[str, object]
) -> dict[str, Any]:
    """Check options by name and value; those not given are left out.

    Raises:
        ConfigError: an unknown option, with the known ones, or a wrong value.
    """
    unknown = sorted(options.keys() - readers.keys())
    if unknown:
        raise ConfigError(
            f"strategy {strategy} has no option {unknown[0]!r}; it has: {', '.join(readers)}"
        )
    return {name: _read(strategy, name, readers[name], value) for name, value in options.items()}


def _read(strategy: str, name: str, reader: Reader, value: object) -> Any:
    try:
        return reader(value)
    except ValueError as error:
        raise ConfigError(
            f"option {name} of strategy {strategy} must be {error}, not {value!r}"
        ) from error
