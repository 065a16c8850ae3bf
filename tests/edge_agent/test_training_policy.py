"""When a device trains: every condition its owner can set, and the reason it gives."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import pytest
from pydantic import ValidationError

from edge_agent.sensors import SensorReading
from edge_agent.training_policy import (
    Conditions,
    TrainingPolicy,
    mains_power,
    reason_not_to_train,
    too_warm,
)

NOON = datetime(2026, 11, 23, 12, 0, tzinfo=timezone.utc)
NOW = Conditions(NOON, 4_000_000_000, 9_000_000_000, SensorReading(), on_mains=None)


def test_by_default_a_device_trains_whenever_it_has_room() -> None:
    assert reason_not_to_train(TrainingPolicy(), NOW) == ""
    full = replace(NOW, disk_free_bytes=150_000_000)
    assert reason_not_to_train(TrainingPolicy(), full) == (
        "150 MB of disk space free, it wants 200"
    )


@pytest.mark.parametrize(
    ("window", "hour", "trains"),
    [
        ("09:00-17:00", 12, True),
        ("09:00-17:00", 17, False),
        ("22:00-06:00", 23, True),
        ("22:00-06:00", 5, True),
        ("22:00-06:00", 12, False),
    ],
)
def test_a_window_may_go_over_midnight(window: str, hour: int, trains: bool) -> None:
    now = replace(NOW, local_time=NOON.replace(hour=hour))
    reason = reason_not_to_train(TrainingPolicy(window=window), now)
    assert (reason == "") is trains
    assert trains or window in reason


def test_a_board_whose_clock_is_not_set_stays_out_of_its_window() -> None:
    now = replace(NOW, local_time=NOON.replace(year=1970))
    assert "clock is not set" in reason_not_to_train(TrainingPolicy(window="00:00-23:59"), now)
    assert reason_not_to_train(TrainingPolicy(), now) == ""


@pytest.mark.parametrize("window", ["night", "22-6", "24:00-06:00", "22:00"])
def test_a_window_that_makes_no_sense_is_refused(window: str) -> None:
    with pytest.raises(ValidationError, match="looks like"):
        TrainingPolicy(window=window)


def test_a_warm_board_waits_until_it_is_clearly_cooler() -> None:
    policy = TrainingPolicy(temperature_max_c=70)
    hot = replace(NOW, sensors=SensorReading(temperature_c=71.0))
    assert reason_not_to_train(policy, hot) == "71 C, above 70"
    assert too_warm(policy, hot)
    cooler = replace(NOW, sensors=SensorReading(temperature_c=68.0))
    assert reason_not_to_train(policy, cooler) == ""
    assert "waits for 65" in reason_not_to_train(policy, replace(cooler, was_too_warm=True))
    cool = replace(NOW, sensors=SensorReading(temperature_c=64.0), was_too_warm=True)
    assert reason_not_to_train(policy, cool) == ""


def test_a_throttled_board_says_what_slows_it() -> None:
    reading = SensorReading(throttled=True, throttle_flags=("under_voltage",))
    now = replace(NOW, sensors=reading)
    assert "under_voltage" in reason_not_to_train(TrainingPolicy(not_throttled=True), now)
    assert reason_not_to_train(TrainingPolicy(), now) == ""


def test_a_device_on_battery_stays_out_when_asked_to() -> None:
    policy = TrainingPolicy(on_mains=True)
    assert reason_not_to_train(policy, replace(NOW, on_mains=False)) == "on battery"
    assert reason_not_to_train(policy, replace(NOW, on_mains=None)) == ""


@pytest.mark.parametrize(
    ("mode", "trains"), [("MODE_30W_ALL", False), ("15W", True), ("MAXN", True), (None, True)]
)
def test_a_power_mode_above_the_limit_is_named(mode: str | None, trains: bool) -> None:
    now = replace(NOW, sensors=SensorReading(power_mode=mode))
    reason = reason_not_to_train(TrainingPolicy(power_max_w=20), now)
    assert (reason == "") is trains


def test_mains_power_is_read_from_the_kernel(tmp_path: Path) -> None:
    assert mains_power(tmp_path) is None
    supplies = tmp_path / "sys/class/power_supply"
    for name, kind, online in (("BAT0", "Battery", "1"), ("AC", "Mains", "0")):
        (supplies / name).mkdir(parents=True)
        (supplies / name / "type").write_text(kind + "\n")
        (supplies / name / "online").write_text(online + "\n")
    assert mains_power(tmp_path) is False
    (supplies / "AC/online").write_text("1\n")
    assert mains_power(tmp_path) is True
