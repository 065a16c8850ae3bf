"""LEGEND's deadline by what is to be saved: seconds, joules or bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_server.strategies import DeviceCapacity, Plan, RoundTimes, RunShape, strategy_named
from broker_server.strategies.cost_model import (
    BELIEVED_WATTS,
    download_bytes,
    step_s,
    training_watts,
    upload_bytes,
)
from tests.support.capacities import SIX_LAYERS, device, fleets, shapes
from wire_protocol.errors import ConfigError

COVERAGE_TARGET = 0.75


def plans_for(
    objective: str, shape: RunShape, fleet: list[DeviceCapacity]
) -> tuple[Mapping[str, Plan], tuple[int, ...]]:
    options = {"pace": "deadline", "objective": objective, "depth_min": 1}
    configuration = strategy_named("legend", options).configure(shape, fleet, 1)
    return configuration.plans, configuration.global_ranks


def coverage(
    plans: Mapping[str, Plan], shape: RunShape, ranks: tuple[int, ...], fleet: list[DeviceCapacity]
) -> float:
    """What equation 6 counts above its line."""
    examples = {one.device_id: one.examples for one in fleet}
    able = sum(one.examples for one in fleet if one.memory_budget_bytes > 0)
    total = 0.0
    for layer, rank in enumerate(ranks):
        cover = sum(
            examples[name] * plan.steps / shape.steps
            for name, plan in plans.items()
            if plan.lora.ranks[layer]
        )
        total += rank * min(1.0, cover / (COVERAGE_TARGET * able))
    return total


def joules(plans: Mapping[str, Plan], shape: RunShape, fleet: list[DeviceCapacity]) -> float:
    a_step = training_watts(fleet) * step_s(shape, fleet)
    rows = {one.device_id: row for row, one in enumerate(fleet)}
    return sum(
        plan.steps * float(a_step[rows[name], plan.lora.depth - 1]) for name, plan in plans.items()
    )


def traffic(
    plans: Mapping[str, Plan], shape: RunShape, ranks: tuple[int, ...], fleet: list[DeviceCapacity]
) -> float:
    both = download_bytes(shape, fleet, ranks) + upload_bytes(shape, ranks)
    rows = {one.device_id: row for row, one in enumerate(fleet)}
    return sum(float(both[rows[name], plan.lora.depth - 1]) for name, plan in plans.items())


@given(fleets(), shapes(), st.lists(st.floats(1, 19), min_size=6, max_size=6))
def test_no_other_objective_covers_more_per_joule_or_per_byte(
    fleet: list[DeviceCapacity], shape: RunShape, watts: list[float]
) -> None:
    fleet = [
        replace(one, training_watts=power, memory_budget_bytes=1e12, examples=one.examples + 1)
        for one, power in zip(fleet, watts, strict=False)
    ]
    by_time, ranks = plans_for("time", shape, fleet)
    by_energy, _ = plans_for("energy", shape, fleet)
    by_traffic, _ = plans_for("traffic", shape, fleet)

    def per_joule(plans: Mapping[str, Plan]) -> float:
        return coverage(plans, shape, ranks, fleet) / joules(plans, shape, fleet)

    def per_byte(plans: Mapping[str, Plan]) -> float:
        return coverage(plans, shape, ranks, fleet) / traffic(plans, shape, ranks, fleet)

    almost = 1 - 1e-6
    assert per_joule(by_energy) >= almost * max(per_joule(by_time), per_joule(by_traffic))
    assert per_byte(by_traffic) >= almost * max(per_byte(by_time), per_byte(by_energy))


def test_to_save_energy_a_hungry_device_that_is_not_needed_stays_out() -> None:
    frugal = [
        replace(device(f"a{number}", gflop_per_s=60 + number), training_watts=5.0)
        for number in range(6)
    ]
    hungry = [replace(device("z", gflop_per_s=40), training_watts=60.0)]

    plans, _ = plans_for("energy", SIX_LAYERS, frugal + hungry)

    assert "z" not in plans
    assert len(plans) >= 4


def test_watts_that_nobody_measured_are_those_of_the_others() -> None:
    known = [replace(device(f"a{n}"), training_watts=watts) for n, watts in enumerate((8.0, 12.0))]
    unknown = device("b")

    assert training_watts([*known, unknown]).ravel().tolist() == [8.0, 12.0, 10.0]
    assert training_watts([unknown]).ravel().tolist() == [1.0]


@pytest.mark.parametrize(("claimed", "believed"), [(1e9, 10 * BELIEVED_WATTS), (1e-9, 0.5)])
def test_watts_that_no_board_has_are_not_believed(claimed: float, believed: float) -> None:
    honest = [replace(device(f"a{number}"), training_watts=10.0) for number in range(4)]
    liar = replace(device("liar"), training_watts=claimed)

    assert training_watts([*honest, liar])[-1, 0] == pytest.approx(believed)


def test_watts_are_the_joules_of_training_over_its_seconds() -> None:
    times = RoundTimes(1000, 6, 2, 12.0, 8.0, 0, 0.0, 80, 4.0, energy_j=150.0)

    assert times.measurement().training_watts == pytest.approx(7.5)
    assert replace(times, energy_j=None).measurement().training_watts is None


@pytest.mark.parametrize("objective", ["energy", "traffic"])
def test_an_objective_other_than_time_needs_a_deadline(objective: str) -> None:
    with pytest.raises(ConfigError, match=f"objective {objective} .* needs pace deadline"):
        strategy_named("legend", {"objective": objective, "pace": "slowest"})
    with pytest.raises(ConfigError, match="one of time, energy, traffic"):
        strategy_named("legend", {"objective": "money", "pace": "deadline"})


def test_fewer_steps_save_joules_and_no_bytes() -> None:
    """A device that would need more steps for the same bytes is asked for all of them."""
    fleet = [replace(device("only"), training_watts=5.0)]

    by_traffic, _ = plans_for("traffic", SIX_LAYERS, fleet)

    assert by_traffic["only"].steps == SIX_LAYERS.steps
    assert np.isfinite(by_traffic["only"].predicted_s)
