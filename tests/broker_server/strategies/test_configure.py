from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from broker_server.strategies import DeviceCapacity, RunShape
from broker_server.strategies.cohort import depth_caps
from broker_server.strategies.configure import (
    WaitingLimit,
    greedy_depths,
    greedy_pace,
    lora_configuration,
    rank_distribution,
)
from broker_server.strategies.cost_model import completion_s, mean_waiting_s, memory_bytes
from tests.support.capacities import SIX_LAYERS, device, fleets, shapes
from wire_protocol.errors import ConfigError

RANKS = (4, 5, 6, 7, 8, 9)
LIMITS = st.builds(WaitingLimit, st.none() | st.floats(0, 50), st.none() | st.floats(0, 0.9))


def greedy_by_loop(
    completion: NDArray[np.float64], caps: NDArray[np.int64], depth_min: int
) -> list[int]:
    """The published loop, one device and one layer at a time."""
    pace = max(row[depth_min - 1] for row in completion)
    depths = []
    for row, cap in zip(completion, caps, strict=True):
        depth = depth_min
        while depth < cap and row[depth] <= pace:
            depth += 1
        depths.append(depth)
    return depths


@st.composite
def tables(draw: st.DrawFn) -> tuple[NDArray[np.float64], NDArray[np.int64], int]:
    """Completion times, memory caps and a smallest depth that all devices can hold."""
    count, layers = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    depth_min = draw(st.integers(1, layers))
    rows = [
        np.cumsum(draw(st.lists(st.floats(0.01, 10), min_size=layers, max_size=layers)))
        for _ in range(count)
    ]
    caps = draw(st.lists(st.integers(depth_min, layers), min_size=count, max_size=count))
    return np.array(rows), np.array(caps, dtype=np.int64), depth_min


def test_ranks_grow_by_the_same_step_toward_the_output() -> None:
    assert rank_distribution(6, rank_min=4, rank_step=1.0) == (4, 5, 6, 7, 8, 9)
    assert rank_distribution(4, rank_min=2, rank_step=0.5) == (2, 3, 3, 4)
    assert rank_distribution(3, rank_min=8, rank_step=0.0) == (8, 8, 8)


def test_a_budget_scales_what_exceeds_rank_one() -> None:
    # Excess over rank 1 is 3..8, sum 33; a budget of 24 leaves 18 of them.
    assert rank_distribution(6, rank_min=4, rank_step=1.0, rank_budget=24) == (2, 3, 3, 5, 5, 6)


@given(
    st.integers(1, 40),
    st.integers(1, 60),
    st.floats(0, 4),
    st.integers(1, 3000),
)
def test_ranks_never_fall_and_use_the_whole_budget(
    layers: int, rank_min: int, rank_step: float, budget: int
) -> None:
    free = rank_distribution(layers, rank_min=rank_min, rank_step=rank_step)
    if budget < layers:
        with pytest.raises(ConfigError, match="raise it"):
            rank_distribution(layers, rank_min=rank_min, rank_step=rank_step, rank_budget=budget)
        return
    ranks = rank_distribution(layers, rank_min=rank_min, rank_step=rank_step, rank_budget=budget)

    assert list(ranks) == sorted(ranks)
    assert ranks[0] >= 1
    assert sum(ranks) == min(budget, sum(free))
    assert all(rank <= most for rank, most in zip(ranks, free, strict=True))


def test_a_rank_beyond_the_largest_is_a_wrong_option() -> None:
    with pytest.raises(ConfigError, match="rank 503 at the output exceeds 256"):
        rank_distribution(6, rank_min=3, rank_step=100.0)


@given(tables())
def test_greedy_depths_are_those_of_the_published_loop(
    table: tuple[NDArray[np.float64], NDArray[np.int64], int],
) -> None:
    completion, caps, depth_min = table
    examples = np.ones(len(caps))
    pace_s = greedy_pace(completion, caps, depth_min=depth_min, examples=examples)

    depths = greedy_depths(completion, caps, depth_min=depth_min, pace_s=pace_s)

    assert depths.tolist() == greedy_by_loop(completion, caps, depth_min)


@given(tables(), LIMITS, st.data())
def test_the_repaired_pace_is_the_best_of_all_by_brute_force(
    table: tuple[NDArray[np.float64], NDArray[np.int64], int],
    limit: WaitingLimit,
    data: st.DataObject,
) -> None:
    completion, caps, depth_min = table
    count = len(caps)
    sizes = data.draw(st.lists(st.integers(1, 99), min_size=count, max_size=count))
    examples = np.array(sizes, dtype=np.float64)

    def judged(pace_s: float) -> tuple[float, float, float]:
        depths = greedy_depths(completion, caps, depth_min=depth_min, pace_s=pace_s)
        times = completion[np.arange(count), depths - 1]
        room = float(limit.allowed_s(times.max())) - mean_waiting_s(times)
        return room, float(examples @ depths) / float(times.max()), mean_waiting_s(times)

    slowest = float(completion[:, depth_min - 1].max())
    others = [judged(float(pace)) for pace in completion[:, depth_min - 1 :].ravel()]
    chosen_pace = greedy_pace(completion, caps, depth_min=depth_min, examples=examples, limit=limit)
    room, coverage_per_s, waiting_s = judged(chosen_pace)

    if judged(slowest)[0] >= 0:
        assert chosen_pace == slowest
    elif room >= -1e-9:
        clear = [coverage for space, coverage, _ in others if space > 1e-9]
        assert coverage_per_s >= max(clear, default=0.0) * (1 - 1e-9)
    else:
        assert all(space <= 1e-9 for space, _, _ in others)
        assert waiting_s <= min(waiting for _, _, waiting in others) + 1e-9


def test_a_waiting_limit_moves_the_pace_to_a_round_without_idle_devices() -> None:
    # The second device just misses 10 s with depth 2. Depth 3 would cover the
    # most, but costs so much time that it covers less in a second.
    completion = np.array([[10.0, 11.0, 30.0], [6.0, 10.9, 29.9]])
    caps, examples = np.array([3, 3]), np.ones(2)

    free = greedy_pace(completion, caps, depth_min=1, examples=examples)
    limited = greedy_pace(
        completion, caps, depth_min=1, examples=examples, limit=WaitingLimit(seconds=1.0)
    )

    assert greedy_depths(completion, caps, depth_min=1, pace_s=free).tolist() == [1, 1]
    assert greedy_depths(completion, caps, depth_min=1, pace_s=limited).tolist() == [2, 2]
    assert mean_waiting_s(np.array([11.0, 10.9])) <= 1.0


@given(shapes(), fleets(), LIMITS, st.data())
def test_no_plan_breaks_the_memory_of_its_device(
    shape: RunShape, fleet: list[DeviceCapacity], limit: WaitingLimit, data: st.DataObject
) -> None:
    depth_min = data.draw(st.integers(1, shape.layer_count))
    ranks = rank_distribution(shape.layer_count, rank_min=2, rank_step=1.0)

    configuration = lora_configuration(shape, fleet, ranks=ranks, depth_min=depth_min, limit=limit)

    assert configuration.plans.keys() | configuration.refused.keys() == {
        one.device_id for one in fleet
    }
    assert not configuration.plans.keys() & configuration.refused.keys()
    for one in fleet:
        memory = memory_bytes(shape, [one])[0]
        if one.device_id in configuration.plans:
            plan = configuration.plans[one.device_id]
            assert memory[plan.lora.depth - 1] <= one.memory_budget_bytes
            assert plan.lora.depth >= depth_min
            assert plan.predicted_s == completion_s(shape, [one], ranks)[0, plan.lora.depth - 1]
        else:
            assert memory[depth_min - 1] > one.memory_budget_bytes or one.examples == 0


@given(shapes(), fleets(), LIMITS, st.data())
def test_the_order_of_devices_changes_nothing(
    shape: RunShape, fleet: list[DeviceCapacity], limit: WaitingLimit, data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(fleet))
    ranks = (3,) * shape.layer_count

    one = lora_configuration(shape, fleet, ranks=ranks, depth_min=1, limit=limit)
    other = lora_configuration(shape, shuffled, ranks=ranks, depth_min=1, limit=limit)

    assert one == other
    assert list(one.plans) == list(other.plans)


@given(shapes(), fleets(), LIMITS, st.data())
def test_a_faster_device_otherwise_equal_never_gets_less_depth(
    shape: RunShape, fleet: list[DeviceCapacity], limit: WaitingLimit, data: st.DataObject
) -> None:
    slow = data.draw(st.sampled_from(fleet))
    gain = data.draw(st.floats(1, 50))
    quantity = data.draw(st.sampled_from(["forward", "backward", "up", "down"]))
    if quantity in ("forward", "backward"):
        name = f"{quantity}_s_per_token_layer"
        fast = replace(slow, device_id="fast", **{name: getattr(slow, name) / gain})
    else:
        name = f"{quantity}_bytes_per_s"
        fast = replace(slow, device_id="fast", **{name: getattr(slow, name) * gain})

    configuration = lora_configuration(
        shape, [*fleet, fast], ranks=(4,) * shape.layer_count, depth_min=1, limit=limit
    )

    plans = configuration.plans
    assert ("fast" in plans) == (slow.device_id in plans)
    if "fast" in plans:
        assert plans["fast"].lora.depth >= plans[slow.device_id].lora.depth


def test_memory_decides_how_deep_a_fast_device_may_go() -> None:
    # Base 200 MB, 51.2 MB for the tokens, 102.4 MB a trained layer.
    assert depth_caps(
        SIX_LAYERS,
        [device("a", memory_budget_bytes=bytes_) for bytes_ in (353.5e6, 353.6e6, 460e6, 8e9)],
    ).tolist() == [0, 1, 2, 6]


def test_a_device_without_the_memory_is_refused_in_one_sentence() -> None:
    configuration = lora_configuration(
        SIX_LAYERS,
        [device("big"), device("small", memory_budget_bytes=400e6)],
        ranks=RANKS,
        depth_min=2,
    )

    assert list(configuration.plans) == ["big"]
    assert configuration.refused == {
        "small": "training the top 2 of 6 layers on 1024 tokens needs 435 MiB and it may use"
        " 381 MiB; lower batch_size or max_tokens"
    }


def test_a_device_without_examples_is_refused() -> None:
    configuration = lora_configuration(
        SIX_LAYERS, [device("empty", examples=0)], ranks=RANKS, depth_min=1
    )

    assert not configuration.plans
    assert configuration.global_ranks == RANKS
    assert "holds no example" in configuration.refused["empty"]


def test_a_cohort_without_devices_has_no_plans() -> None:
    configuration = lora_configuration(SIX_LAYERS, [], ranks=RANKS, depth_min=1)

    assert (dict(configuration.plans), dict(configuration.refused)) == ({}, {})


def test_a_device_listed_twice_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="listed twice"):
        lora_configuration(SIX_LAYERS, [device("a"), device("a")], ranks=RANKS, depth_min=1)
