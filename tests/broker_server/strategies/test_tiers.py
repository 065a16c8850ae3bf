from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_server.strategies import DeviceCapacity, RunShape, strategy_named
from broker_server.strategies.cost_model import completion_s, memory_bytes
from broker_server.strategies.norm_mean import NormWeightedMean
from broker_server.strategies.product_mean import ProductMean
from broker_server.strategies.tiers import RankTiers, tiered_configuration
from tests.support.capacities import SIX_LAYERS, device, fleets, shapes, tensors
from wire_protocol.errors import ConfigError
from wire_protocol.lora import LoraConfig

TIERS = RankTiers(4, 16, 3)


def test_each_third_of_a_fleet_gets_the_rank_of_its_speed() -> None:
    fleet = [device(f"d{speed}", gflop_per_s=speed) for speed in (10, 20, 30, 40, 50, 60)]

    plans = tiered_configuration(SIX_LAYERS, fleet, TIERS).plans

    assert {name: plan.lora.ranks[0] for name, plan in plans.items()} == {
        "d10": 4,
        "d20": 4,
        "d30": 8,
        "d40": 8,
        "d50": 16,
        "d60": 16,
    }
    assert {plan.lora.depth for plan in plans.values()} == {6}


def test_equal_devices_are_one_tier() -> None:
    fleet = [device(name) for name in "abcde"]

    plans = tiered_configuration(SIX_LAYERS, fleet, TIERS).plans

    assert {plan.lora for plan in plans.values()} == {LoraConfig((16,) * 6)}


def test_a_lower_rank_shortens_upload_and_download() -> None:
    fleet = [device("fast", gflop_per_s=100), device("slow", gflop_per_s=50)]

    slow = tiered_configuration(SIX_LAYERS, fleet, RankTiers(4, 16, 2)).plans["slow"]

    # 12 of 16 ranks in 6 layers of 1536 values, 4 bytes each, at 1 MB/s, are not sent.
    whole = completion_s(SIX_LAYERS, fleet[1:], (16,) * 6)[0, -1]
    assert slow.predicted_s == pytest.approx(whole - 2 * 12 * 6 * 1536 * 4 / 1e6)


@given(shapes(), fleets(), st.integers(1, 4), st.data())
def test_plans_keep_memory_and_do_not_depend_on_the_order_of_devices(
    shape: RunShape, fleet: list[DeviceCapacity], tiers: int, data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(fleet))
    rule = RankTiers(2, 9, tiers)

    configuration = tiered_configuration(shape, fleet, rule)

    assert configuration == tiered_configuration(shape, shuffled, rule)
    assert configuration.plans.keys() ^ configuration.refused.keys() == {
        one.device_id for one in fleet
    }
    for one in fleet:
        if one.device_id in configuration.plans:
            assert memory_bytes(shape, [one])[0, -1] <= one.memory_budget_bytes


def test_a_device_gets_what_it_is_allowed_of_its_tier_and_loads_the_next_larger_one() -> None:
    fleet = [device("fast", gflop_per_s=100), device("slow", gflop_per_s=50)]
    tiers = RankTiers(4, 16, 2)

    plans = tiered_configuration(
        SIX_LAYERS, fleet, tiers, allowed=lambda name, rank: rank - 5 if name == "fast" else rank
    ).plans

    assert {name: plan.lora.ranks for name, plan in plans.items()} == {
        "fast": (11,) * 6,
        "slow": (4,) * 6,
    }
    alone = tiered_configuration(SIX_LAYERS, fleet, tiers).plans
    # 5 of 16 ranks in 6 layers of 1536 values, 4 bytes each, at 1 MB/s, are not sent.
    saved_s = alone["fast"].predicted_s - plans["fast"].predicted_s
    assert saved_s == pytest.approx(5 * 6 * 1536 * 4 / 1e6)


@given(shapes(), fleets())
def test_a_faster_device_never_gets_a_lower_rank(
    shape: RunShape, fleet: list[DeviceCapacity]
) -> None:
    plans = tiered_configuration(shape, fleet, TIERS).plans
    able = [one for one in fleet if one.device_id in plans]
    times = completion_s(shape, able, (16,) * shape.layer_count)[:, -1].tolist()

    by_time = sorted(zip(times, able, strict=True), key=lambda pair: pair[0])

    ranks = [plans[one.device_id].lora.ranks[0] for _, one in by_time]
    assert ranks == sorted(ranks, reverse=True)


def test_hetlora_and_flexlora_differ_in_aggregation_alone() -> None:
    fleet = [device("fast", gflop_per_s=100), device("slow", gflop_per_s=50)]
    options: dict[str, object] = {"rank_min": 2, "rank_max": 8, "tiers": 2}
    het, flex = (strategy_named(name, options) for name in ("hetlora", "flexlora"))

    assert het.configure(SIX_LAYERS, fleet, 1) == flex.configure(SIX_LAYERS, fleet, 1)
    assert isinstance(het.begin(tensors(1)), NormWeightedMean)
    assert isinstance(flex.begin(tensors(1)), ProductMean)


def test_a_smallest_rank_above_the_largest_is_a_wrong_option() -> None:
    with pytest.raises(ConfigError, match="rank_min 9 exceeds rank_max 8"):
        strategy_named("hetlora", {"rank_min": 9, "rank_max": 8})
