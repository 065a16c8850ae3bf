"""How warm a board is, what it draws, and whether it slows itself down.

Sources in order: jtop (only on the running board), tegrastats, vcgencmd, the
kernel's thermal zones. Programs are run by a function that the caller passes.
Knows the formats of these sources; must not decide anything from what it reads.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edge_agent.board import read_power_modes, read_text, under

RunProgram = Callable[[Sequence[str]], str | None]
"""Runs a program and returns what it printed, or ``None`` when it cannot be run."""

TEGRASTATS = ("tegrastats", "--interval", "200")
GET_THROTTLED = ("vcgencmd", "get_throttled")
MEASURE_TEMP = ("vcgencmd", "measure_temp")

_PI_FLAGS = ("under_voltage", "frequency_capped", "throttled", "soft_temperature_limit")
# One rail measures the whole board where it exists; else the rails add up.
_WHOLE_BOARD_RAILS = ("VDD_IN", "POM_5V_IN")
# AGX Orin's memory rail is fed by VIN_SYS_5V0 and would be counted twice.
_NESTED_RAILS = frozenset({"VDDQ_VDD2_1V8AO"})
# PMIC reads a constant 100 C on TX2 and Xavier.
_FALSE_THERMOMETERS = frozenset({"pmic", "pmic-die"})
# Sensors that are switched off report -256 C; nothing alive is above 150 C.
_PLAUSIBLE_C = (-40.0, 150.0)


@dataclass(frozen=True)
class SensorReading:
    """One look at the board; ``None`` where it has no such sensor.

    Attributes:
        temperature_c: the hottest plausible thermometer.
        throttled: the board slows itself down now.
        throttle_flags: what the board reports, e.g. ``under_voltage`` or, since
            it booted, ``under_voltage_occurred``.
        power_w: what the whole board draws, in watts.
        power_mode: name of the active nvpmodel mode.
    """

    temperature_c: float | None = None
    throttled: bool | None = None
    throttle_flags: tuple[str, ...] = ()
    power_w: float | None = None
    power_mode: str | None = None


def read_sensors(root: Path, run: RunProgram) -> SensorReading:
    """Read every source that the board has; missing ones leave their field ``None``.

    Args:
        root: ``/``, or the folder of a captured board.
        run: runs ``tegrastats`` and ``vcgencmd``; may take about a second.
    """
    reading = _from_jtop() if root == Path("/") else None
    if reading is None:
        reading = _from_programs(root, run)
    zones = read_thermal_zones(root)
    if reading.temperature_c is None:
        reading = replace(reading, temperature_c=zones.temperature_c)
    if reading.throttled is None:
        reading = replace(reading, throttled=zones.throttled, throttle_flags=zones.throttle_flags)
    if reading.power_mode is None:
        reading = replace(reading, power_mode=read_power_modes(root)[0])
    return reading


def run_program(arguments: Sequence[str], *, timeout_s: float = 1.0) -> str | None:
    """Run a program for at most ``timeout_s``; what it printed until then counts.

    ``tegrastats`` never ends by itself, so running out of time is normal.
    """
    try:
        done = subprocess.run(
            list(arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        printed = error.stdout or b""
    except OSError:
        return None
    else:
        printed = done.stdout if done.returncode == 0 else b""
    return printed.decode(errors="replace") or None


def parse_tegrastats(text: str) -> SensorReading:
    """Read the last whole line of tegrastats; every L4T release words it differently.

    Temperatures look like ``GPU@35.5C`` or ``gpu@47.6C/47.6C``, rails like
    ``VDD_IN 3757/3757`` (now/average) or ``VDD_IN 4924mW/4924mW``, in milliwatts.
    """
    line = next((row for row in reversed(text.splitlines()) if "RAM " in row), "")
    thermometers = re.findall(r"\b([A-Za-z]\w*)@(-?\d+(?:\.\d+)?)C\b", line)
    rails = re.findall(r"\b([A-Z][A-Z0-9_]*) (\d+)(?:mW)?/\d+(?!\d*[kMG]B)(?!\d)", line)
    return SensorReading(
        temperature_c=_hottest((name, float(value)) for name, value in thermometers),
        power_w=_board_power_w({name: int(milliwatts) for name, milliwatts in rails}),
    )


def parse_get_throttled(text: str) -> tuple[bool, tuple[str, ...]] | None:
    """Read ``throttled=0x50005``: slowed down now, and all flags by name.

    Bits 0-3 hold now, bits 16-19 have held since the board booted.
    """
    found = re.search(r"throttled=0x([0-9a-fA-F]+)", text)
    if found is None:
        return None
    bits = int(found.group(1), 16)
    now = tuple(flag for bit, flag in enumerate(_PI_FLAGS) if bits >> bit & 1)
    before = tuple(
        f"{flag}_occurred" for bit, flag in enumerate(_PI_FLAGS) if bits >> (16 + bit) & 1
    )
    return bool(now), now + before


def parse_measure_temp(text: str) -> float | None:
    """Read ``temp=48.3'C``, in degrees Celsius."""
    found = re.search(r"temp=(-?\d+(?:\.\d+)?)'?C", text)
    return float(found.group(1)) if found else None


def read_thermal_zones(root: Path) -> SensorReading:
    """Read /sys/class/thermal: the hottest zone, and whether a passive trip point is passed.

    At a passive trip point the kernel lowers clocks. Without any such point,
    nothing is known about throttling.
    """
    temperatures: list[tuple[str, float]] = []
    slowed: list[str] = []
    has_trip_points = False
    for zone in sorted(under(root, "sys/class/thermal").glob("thermal_zone*")):
        place = f"sys/class/thermal/{zone.name}"
        name = (read_text(root, f"{place}/type") or zone.name).strip()
        value = _millidegrees(root, f"{place}/temp")
        if value is None or _hottest([(name, value)]) is None:
            continue
        temperatures.append((name, value))
        trips = _passive_trips(root, place)
        has_trip_points = has_trip_points or bool(trips)
        if any(value >= trip for trip in trips):
            slowed.append(f"{name}_passive_trip")
    return SensorReading(
        temperature_c=_hottest(temperatures),
        throttled=bool(slowed) if has_trip_points else None,
        throttle_flags=tuple(slowed),
    )


def _from_programs(root: Path, run: RunProgram) -> SensorReading:
    if read_text(root, "etc/nv_tegra_release") is not None:
        return parse_tegrastats(run(TEGRASTATS) or "")
    flags = parse_get_throttled(run(GET_THROTTLED) or "")
    if flags is None:
        return SensorReading()
    throttled, names = flags
    temperature_c = parse_measure_temp(run(MEASURE_TEMP) or "")
    return SensorReading(temperature_c, throttled, names)


def _from_jtop() -> SensorReading | None:
    """Ask jetson-stats, if it is installed and its service answers.

    It is AGPL-3.0 and must match the version of its service: optional, and
    imported nowhere else.
    """
    try:
        from jtop import JtopException, jtop  # noqa: PLC0415 - optional, and slow to import
    except ImportError:
        return None
    try:
        with jtop() as jetson:
            if not jetson.ok():
                return None
            thermometers = [
                (str(name), float(sensor["temp"])) for name, sensor in jetson.temperature.items()
            ]
            total = jetson.power.get("tot", {}).get("power")
            mode = getattr(jetson.nvpmodel, "name", None)
    except (JtopException, OSError):
        return None
    return SensorReading(
        temperature_c=_hottest(thermometers),
        power_w=None if total is None else float(total) / 1000,
        power_mode=None if mode is None else str(mode),
    )


def _hottest(thermometers: Iterable[tuple[str, float]]) -> float | None:
    low, high = _PLAUSIBLE_C
    return max(
        (
            value
            for name, value in thermometers
            if low < value < high and name.lower() not in _FALSE_THERMOMETERS
        ),
        default=None,
    )


def _board_power_w(rails: Mapping[str, int]) -> float | None:
    for name in _WHOLE_BOARD_RAILS:
        if name in rails:
            return rails[name] / 1000
    parts = [value for name, value in rails.items() if name not in _NESTED_RAILS]
    return sum(parts) / 1000 if parts else None


def _millidegrees(root: Path, relative: str) -> float | None:
    text = (read_text(root, relative) or "").strip()
    return int(text) / 1000 if re.fullmatch(r"-?\d+", text) else None


def _passive_trips(root: Path, zone: str) -> list[float]:
    """Temperatures of a zone's passive trip points, in degrees Celsius."""
    trips: list[float] = []
    for kind in sorted(under(root, zone).glob("trip_point_*_type")):
        if (read_text(root, f"{zone}/{kind.name}") or "").strip() == "passive":
            value = _millidegrees(root, f"{zone}/{kind.name.replace('_type', '_temp')}")
            # A trip point of 0 or less is the firmware's way of switching it off.
            if value is not None and value > 0:
                trips.append(value)
    return trips
