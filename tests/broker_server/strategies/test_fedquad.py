"""FedQuad: activations in eight bits where memory, not time, caps the depth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_server.strategies import DeviceCapacity, RunShape, strategy_named
from broker_server.strategies.cohort import depth_caps
from broker_server.strategies.cost_model import (
    completion_s,
    layers_to_quantise,
    memory_bytes,
    step_s,
)
from broker_server.strategies.strategy import Strategy
from tests.support.capacities import SIX_LAYERS, device, fleets, shapes
from wire_protocol.errors import ConfigError
from wire_protocol.lora import QUANTISED_KEPT, QUANTISED_WORK, kept_layers

# A token's 50 kB and 100 kB a layer on 1,024 tokens, above 200 MB.
BASE, PER_LAYER = 200e6 + 1024 * 50e3, 1024 * 100e3
FLEET = [
    device("slow", gflop_per_s=3),
    device("roomy"),
    device("tight", memory_budget_bytes=BASE + 3.5 * PER_LAYER),
    device("tighter", memory_budget_bytes=BASE + 1.5 * PER_LAYER),
]


def strategies() -> st.SearchStrategy[Strategy]:
    options = {"depth_min": 1, "quantise_activations": True, "pace": "slowest"}
    return st.sampled_from(
        [
            strategy_named("fedquad", {"depth_min": 1}),
            strategy_named("legend", options),
            strategy_named("legend", {**options, "pace": "deadline", "left_out_max": 0}),
        ]
    )


def fewest_by_trying(budget: float, depth: int, base: float, per_layer: float) -> int | None:
    """The first number of quantised layers with which a depth fits."""
    for quantised in range(depth + 1):
        kept = depth - (1 - QUANTISED_KEPT) * max(0, quantised - 1)
        if base + per_layer * kept <= budget:
            return quantised
    return None


def test_memory_caps_depth_later_when_activations_are_quantised() -> None:
    assert depth_caps(SIX_LAYERS, FLEET).tolist() == [6, 6, 3, 1]
    assert depth_caps(SIX_LAYERS, FLEET, quantise=True).tolist() == [6, 6, 6, 2]

    plans = strategy_named("fedquad", {}).configure(SIX_LAYERS, FLEET, 1).plans

    chosen = {name: (plan.lora.depth, plan.quantised_layers) for name, plan in plans.items()}
    assert chosen == {"slow": (2, 0), "roomy": (6, 0), "tight": (6, 5), "tighter": (2, 2)}
    assert plans["roomy"].lora.ranks == (8,) * 6


def test_nothing_is_quantised_unless_asked_for() -> None:
    plans = strategy_named("legend-paper", {"depth_min": 1}).configure(SIX_LAYERS, FLEET, 1).plans
    assert {name: plan.lora.depth for name, plan in plans.items()} == {
        "slow": 1,
        "roomy": 6,
        "tight": 3,
        "tighter": 1,
    }
    assert {plan.quantised_layers for plan in plans.values()} == {0}


def test_quantising_takes_time_which_may_cost_depth() -> None:
    tight = FLEET[2:3]
    work = step_s(SIX_LAYERS, tight, quantise=True) - step_s(SIX_LAYERS, tight)
    forward = SIX_LAYERS.tokens_per_step * tight[0].forward_s_per_token_layer
    layers = np.array([0, 0, 0, 2, 4, 5])
    np.testing.assert_allclose(work[0], QUANTISED_WORK * forward * layers, atol=1e-12)
    assert layers_to_quantise(SIX_LAYERS, tight)[0].tolist() == layers.tolist()


def test_who_cannot_hold_the_smallest_depth_even_so_is_refused_with_what_it_needs() -> None:
    small = device("small", memory_budget_bytes=BASE + 1.2 * PER_LAYER)
    configuration = strategy_named("fedquad", {}).configure(SIX_LAYERS, [small], 1)
    assert not configuration.plans
    needed = (BASE + kept_layers(2, 2) * PER_LAYER) / 2**20
    assert f"needs {needed:.0f} MiB" in configuration.refused["small"]


@given(shapes(), fleets())
def test_the_fewest_layers_are_quantised(shape: RunShape, fleet: list[DeviceCapacity]) -> None:
    found = layers_to_quantise(shape, fleet)
    for one, row in zip(fleet, found.tolist(), strict=True):
        base = one.memory_base_bytes + shape.peak_tokens_per_step * one.memory_bytes_per_token
        per_layer = shape.peak_tokens_per_step * one.memory_bytes_per_token_layer
        for depth, quantised in enumerate(row, start=1):
            budget = one.memory_budget_bytes
            expected = fewest_by_trying(budget, depth, base, per_layer)
            if expected is None:
                assert quantised == depth
            else:
                # Rounding may ask for one more where a depth fits to the last byte.
                assert quantised - expected in (0, 1)
                quantised_ = np.full((1, shape.layer_count), quantised)
                assert memory_bytes(shape, [one], quantised=quantised_)[0, depth - 1] <= budget


@given(shapes(), fleets(), strategies(), st.data())
def test_memory_is_kept_and_the_order_of_devices_does_not_matter(
    shape: RunShape, fleet: list[DeviceCapacity], strategy: Strategy, data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(fleet))

    configuration = strategy.configure(shape, fleet, 1)

    assert configuration == strategy.configure(shape, shuffled, 1)
    for one in fleet:
        if plan := configuration.plans.get(one.device_id):
            depth = plan.lora.depth
            assert 0 <= plan.quantised_layers <= depth
            quantised = np.full((1, shape.layer_count), plan.quantised_layers)
            needed = memory_bytes(shape, [one], quantised=quantised)[0, depth - 1]
            assert needed <= one.memory_budget_bytes
            if plan.steps == shape.steps:
                table = completion_s(shape, [one], plan.lora.ranks, quantise=True)
                assert plan.predicted_s >= table[0, depth - 1] * 0.999 or not plan.quantised_layers


@given(shapes(), fleets())
def test_times_with_quantised_layers_still_grow_with_depth(
    shape: RunShape, fleet: list[DeviceCapacity]
) -> None:
    table = completion_s(shape, fleet, (4,) * shape.layer_count, quantise=True)
    assert (np.diff(table, axis=1) > 0).all()


def test_an_option_that_is_no_switch_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be true or false"):
        strategy_named("legend", {"quantise_activations": 1})
