"""Energy from a power sensor."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import anyio
import pytest

from edge_agent.power_meter import energy_of


def measured(watts: Iterable[float | None], *, every_s: float, work_s: float = 0.2) -> float | None:
    """Joules of some work whose power is looked at on a clock of its own."""
    readings, ticks = iter(watts), itertools.count(0.0, every_s)

    async def run() -> float | None:
        return await energy_of(
            lambda: anyio.sleep(work_s),
            lambda: next(readings),
            clock=lambda: next(ticks),
            interval_s=0.01,
        )

    return anyio.run(run)


def test_power_is_summed_over_the_time_of_the_work() -> None:
    joules = measured(itertools.repeat(10.0), every_s=2.0)
    assert joules is not None
    assert joules >= 20.0
    assert joules % 20.0 == 0.0


def test_a_reading_that_fails_repeats_the_last_one() -> None:
    joules = measured(itertools.chain([10.0], itertools.repeat(None)), every_s=1.0)
    assert joules is not None
    assert joules >= 10.0
    assert joules % 10.0 == 0.0


def test_a_board_without_a_sensor_tells_nothing() -> None:
    assert measured([None], every_s=1.0, work_s=0.01) is None


def test_the_error_of_the_work_comes_out_as_it_is() -> None:
    async def broken() -> None:
        raise ValueError("broken")

    async def run() -> None:
        await energy_of(broken, lambda: 1.0, clock=lambda: 0.0)

    with pytest.raises(ValueError, match="broken"):
        anyio.run(run)
