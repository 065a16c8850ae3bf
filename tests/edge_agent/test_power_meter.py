"""Energy from a power sensor."""

from __future__ import annotations

import itertools

import anyio
import pytest

from edge_agent.power_meter import energy_of


async def test_power_is_summed_over_the_time_of_the_work() -> None:
    ticks = itertools.count(0.0, 2.0)
    joules = await energy_of(
        lambda: anyio.sleep(0.2), lambda: 10.0, clock=lambda: next(ticks), interval_s=0.01
    )
    assert joules is not None
    assert joules >= 40.0
    assert joules % 20.0 == 0.0


async def test_a_reading_that_fails_once_repeats_the_last_one() -> None:
    watts = itertools.chain([10.0, None, None], itertools.repeat(10.0))
    ticks = itertools.count(0.0, 1.0)
    joules = await energy_of(
        lambda: anyio.sleep(0.2), lambda: next(watts), clock=lambda: next(ticks), interval_s=0.01
    )
    assert joules is not None
    assert joules % 10.0 == 0.0


async def test_a_board_without_a_sensor_tells_nothing() -> None:
    assert await energy_of(lambda: anyio.sleep(0), lambda: None, clock=lambda: 0.0) is None


async def test_the_error_of_the_work_comes_out_as_it_is() -> None:
    async def broken() -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        await energy_of(broken, lambda: 1.0, clock=lambda: 0.0)
