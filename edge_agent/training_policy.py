"""When the owner of a device lets it train: pure, so that every reason can be tested.

The device asks before each heartbeat and each assignment. A reason not to train is told to the
server, which leaves the device out and shows it. Work that has begun is finished.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, time
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from edge_agent.sensors import SensorReading
from wire_protocol.settings import Settings

_FIRST_PLAUSIBLE_YEAR = 2026
_COOL_DOWN_C = 5.0
"""A device that was too warm waits until it is this much cooler, or it would go on and off."""


def _window(text: str) -> str:
    if not re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d", text):
        raise ValueError("a window looks like 22:00-06:30")
    return text


class TrainingPolicy(Settings):
    """What must hold for this device to train; by default only room on the disk."""

    window: Annotated[str, AfterValidator(_window)] | None = Field(
        None, description="local time of day, e.g. 22:00-06:30"
    )
    memory_free_bytes: int = Field(0, ge=0, description="least memory that training may take")
    disk_free_bytes: int = Field(200_000_000, ge=0, description="least space in the state folder")
    temperature_max_c: float | None = Field(None, description="the hottest thermometer")
    not_throttled: bool = Field(False, description="not while the board slows itself down")
    on_mains: bool = Field(False, description="not on battery, where the board can tell")
    power_max_w: float | None = Field(
        None, gt=0, description="not in a power mode whose name says more, e.g. 30W"
    )


@dataclass(frozen=True)
class Conditions:
    """How the device is now; ``None`` where it cannot tell.

    Attributes:
        local_time: of the device, with its zone; wrong on a board without a clock.
        on_mains: mains power is there.
        was_too_warm: the last answer was that it is too warm.
    """

    local_time: datetime
    memory_available_bytes: int
    disk_free_bytes: int
    sensors: SensorReading
    on_mains: bool | None
    was_too_warm: bool = False


def reason_not_to_train(policy: TrainingPolicy, now: Conditions) -> str:
    """Say why this device does not train now; empty when it may."""
    reasons = (
        _outside_window(policy, now),
        _too_warm(policy, now),
        _short_of(policy, now),
        _powered(policy, now),
    )
    return next((reason for reason in reasons if reason), "")


def too_warm(policy: TrainingPolicy, now: Conditions) -> bool:
    """Whether warmth alone keeps it from training; feeds ``Conditions.was_too_warm``."""
    return bool(_too_warm(policy, now))


def mains_power(root: Path) -> bool | None:
    """Whether a mains supply is connected; None on boards that cannot tell.

    Source: kernel documentation, ABI/testing/sysfs-class-power.
    """
    found: bool | None = None
    for supply in sorted((root / "sys/class/power_supply").glob("*")):
        try:
            kind = (supply / "type").read_text(encoding="ascii").strip()
            online = (supply / "online").read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            continue
        if kind in ("Mains", "USB"):
            found = bool(found) or online == "1"
    return found


def _outside_window(policy: TrainingPolicy, now: Conditions) -> str:
    if policy.window is None:
        return ""
    if now.local_time.year < _FIRST_PLAUSIBLE_YEAR:
        return f"its clock is not set, and it trains {policy.window} only"
    begin, end = (time.fromisoformat(part) for part in policy.window.split("-"))
    moment = now.local_time.time()
    inside = begin <= moment < end if begin <= end else moment >= begin or moment < end
    return "" if inside else f"outside its window {policy.window}, it is {moment:%H:%M} there"


def _too_warm(policy: TrainingPolicy, now: Conditions) -> str:
    warmth, limit = now.sensors.temperature_c, policy.temperature_max_c
    if policy.not_throttled and now.sensors.throttled:
        flags = ", ".join(now.sensors.throttle_flags) or "throttled"
        return f"the board slows itself down ({flags})"
    if limit is None or warmth is None:
        return ""
    if warmth > limit:
        return f"{warmth:.0f} C, above {limit:.0f}"
    if now.was_too_warm and warmth > limit - _COOL_DOWN_C:
        return f"cooling down: {warmth:.0f} C, waits for {limit - _COOL_DOWN_C:.0f}"
    return ""


def _short_of(policy: TrainingPolicy, now: Conditions) -> str:
    for what, free, wanted in (
        ("memory", now.memory_available_bytes, policy.memory_free_bytes),
        ("disk space", now.disk_free_bytes, policy.disk_free_bytes),
    ):
        if free < wanted:
            return f"{free / 1e6:.0f} MB of {what} free, it wants {wanted / 1e6:.0f}"
    return ""


def _powered(policy: TrainingPolicy, now: Conditions) -> str:
    if policy.on_mains and now.on_mains is False:
        return "on battery"
    watts = re.search(r"(\d+(?:\.\d+)?) ?W(?![a-z])", now.sensors.power_mode or "")
    if policy.power_max_w is not None and watts and float(watts[1]) > policy.power_max_w:
        return f"power mode {now.sensors.power_mode}, above {policy.power_max_w:.0f} W"
    return ""
