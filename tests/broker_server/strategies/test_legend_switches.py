"""LEGEND with a deadline in place of the slowest device's pace."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_server.strategies import DeviceCapacity, RunShape, strategy_named
from broker_server.strategies.cost_model import completion_s, memory_bytes
from broker_server.strategies.deadline import DeadlineRule
from broker_server.strategies.legend import Legend
from broker_server.strategies.product_mean import ProductMean
from tests.support.capacities import SIX_LAYERS, device, fleets, shapes
from wire_protocol.errors import ConfigError

FLEET = [
    device("pi", gflop_per_s=3),
    *(device(f"nano{number}", gflop_per_s=60 + 5 * number) for number in range(4)),
    *(device(f"orin{number}", gflop_per_s=400) for number in range(3)),
]


def by_deadline(left_out_max: int = 2) -> Legend:
    return Legend(depth_min=1, pace="deadline", rule=DeadlineRule(left_out_max=left_out_max))


def test_a_deadline_shortens_the_round_and_leaves_the_slowest_out() -> None:
    paced = Legend(depth_min=1).configure(SIX_LAYERS, FLEET, 1)

    configuration = by_deadline().configure(SIX_LAYERS, FLEET, 1)

    longest = max(plan.predicted_s for plan in configuration.plans.values())
    assert longest < max(plan.predicted_s for plan in paced.plans.values()) / 4
    assert "pi" not in configuration.plans
    assert not configuration.refused


def test_nobody_sits_out_more_than_so_many_rounds_in_a_row() -> None:
    strategy = by_deadline(left_out_max=2)

    took_part = [
        "pi" in strategy.configure(SIX_LAYERS, FLEET, number).plans for number in range(1, 10)
    ]

    assert took_part == [False, False, True] * 3


def test_a_device_that_would_miss_the_deadline_does_fewer_steps() -> None:
    plans = by_deadline(left_out_max=0).configure(SIX_LAYERS, FLEET, 1).plans

    assert plans["pi"].steps == 3
    assert plans["pi"].lora.depth == 1
    step = SIX_LAYERS.tokens_per_step * 7 * FLEET[0].forward_s_per_token_layer
    whole = completion_s(SIX_LAYERS, FLEET[:1], (4, 5, 6, 7, 8, 9))[0, 0]
    assert plans["pi"].predicted_s == pytest.approx(whole - 7 * step)
    assert {plan.steps for name, plan in plans.items() if name != "pi"} == {10}


@given(shapes(), fleets(), st.integers(1, 6), st.data())
def test_plans_keep_memory_and_do_not_depend_on_the_order_of_devices(
    shape: RunShape, fleet: list[DeviceCapacity], round_number: int, data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(fleet))

    configuration = by_deadline().configure(shape, fleet, round_number)

    assert configuration == by_deadline().configure(shape, shuffled, round_number)
    assert not configuration.plans.keys() & configuration.refused.keys()
    able = [one for one in fleet if one.device_id not in configuration.refused]
    if DeadlineRule().is_for_all(round_number):
        assert configuration.plans.keys() == {one.device_id for one in able}
    assert len(configuration.plans) * 2 >= len(able)
    for one in able:
        if one.device_id in configuration.plans:
            plan = configuration.plans[one.device_id]
            assert memory_bytes(shape, [one])[0, plan.lora.depth - 1] <= one.memory_budget_bytes
            trained = [rank for rank in plan.lora.ranks if rank]
            assert trained == sorted(trained)


@given(fleets(max_devices=8), fleets(max_devices=8), fleets(max_devices=8))
def test_a_round_that_is_configured_again_does_not_follow_its_first_answer(
    before: list[DeviceCapacity], first: list[DeviceCapacity], again: list[DeviceCapacity]
) -> None:
    twice, once = by_deadline(), by_deadline()
    twice.configure(SIX_LAYERS, before, 1)
    once.configure(SIX_LAYERS, before, 1)
    twice.configure(SIX_LAYERS, first, 2)

    assert twice.configure(SIX_LAYERS, again, 2) == once.configure(SIX_LAYERS, again, 2)


def test_a_new_cohort_in_the_same_round_is_decided_afresh() -> None:
    strategy = by_deadline()
    strategy.configure(SIX_LAYERS, [device("a", gflop_per_s=100)], 1)
    slower = [device("a", gflop_per_s=98)]

    assert strategy.configure(SIX_LAYERS, slower, 1) == by_deadline().configure(
        SIX_LAYERS, slower, 1
    )


def test_the_round_after_one_for_all_follows_the_round_before_it() -> None:
    # The fast ones take 1.08 s for all six layers, the slow one 1.10 s for a quarter of its
    # steps: so near that its deadline would be kept, and with it a round for all every time.
    fleet = [device("slow", gflop_per_s=50)]
    fleet += [device(f"fast{number}", gflop_per_s=400) for number in range(8)]
    with_all, without = by_deadline(), by_deadline()
    for number in (1, 2, 3):
        with_all.configure(SIX_LAYERS, fleet, number)
        if number < 3:
            without.configure(SIX_LAYERS, fleet, number)

    after = with_all.configure(SIX_LAYERS, fleet, 4)
    assert after == without.configure(SIX_LAYERS, fleet, 4)
    assert "slow" not in after.plans


def test_noise_in_the_estimates_does_not_change_depths() -> None:
    strategy = by_deadline()
    first = strategy.configure(SIX_LAYERS, FLEET, 1).plans
    noisy = [
        replace(one, backward_s_per_token_layer=one.backward_s_per_token_layer * factor)
        for one, factor in zip(FLEET, (0.99, 1.0, 0.98, 0.99, 1.0, 0.97, 0.99, 1.0), strict=True)
    ]

    second = strategy.configure(SIX_LAYERS, noisy, 2).plans

    assert {name: p.lora for name, p in second.items()} == {n: p.lora for n, p in first.items()}


def test_a_deadline_counts_updates_by_their_steps() -> None:
    strategy = strategy_named("legend", {"pace": "deadline"})
    aggregation = strategy.begin({"head.bias": np.zeros(1, dtype=np.float32)})
    aggregation.add("a", {"head.bias": np.array([1.0], dtype=np.float32)}, weight=1, steps=10)
    aggregation.add("b", {"head.bias": np.array([0.5], dtype=np.float32)}, weight=1, steps=5)

    assert aggregation.result()["head.bias"].tolist() == [1.0]


def test_products_are_averaged_with_the_weights_and_steps_that_factors_would_have() -> None:
    old = {name: np.zeros((1, 1), dtype=np.float32) for name in ("q.lora_A", "q.lora_B")}
    old["q.lora_A"][:] = 1.0
    options = {"aggregation": "products", "weighting": "uniform", "server_learning_rate": 0.5}
    aggregation = strategy_named("legend", options).begin(old)
    assert isinstance(aggregation, ProductMean)
    for name, trained, steps in (("a", 2.0, 10), ("b", 1.0, 5)):
        update = {"q.lora_A": np.zeros_like(old["q.lora_A"])}
        update["q.lora_B"] = np.full((1, 1), trained, dtype=np.float32)
        aggregation.add(name, update, weight=3 * steps, steps=steps)

    new = aggregation.result()

    # Both went 0.2 a step; ten of them, half way.
    assert new["q.lora_B"] @ new["q.lora_A"] == pytest.approx(1.0)


@pytest.mark.parametrize("other", [{"factors": "alternating"}, {"server_optimizer": "adam"}])
def test_products_need_both_factors_and_no_optimizer_that_follows_them(
    other: dict[str, object],
) -> None:
    with pytest.raises(ConfigError, match="aggregation products of strategy legend needs"):
        strategy_named(
            "legend", {"aggregation": "products", "server_learning_rate": 0.001, **other}
        )


def test_a_cohort_without_devices_has_no_plans() -> None:
    configuration = by_deadline().configure(SIX_LAYERS, [], 1)

    assert (dict(configuration.plans), dict(configuration.refused)) == ({}, {})


def test_a_waiting_limit_beside_a_deadline_is_a_wrong_option() -> None:
    with pytest.raises(ConfigError, match="a waiting limit or pace deadline, not both"):
        strategy_named("legend", {"pace": "deadline", "waiting_max_s": 1.0})
