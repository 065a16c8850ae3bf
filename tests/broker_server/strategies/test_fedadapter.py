from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_server.strategies import (
    DeviceCapacity,
    RoundOutcome,
    RunShape,
    Strategy,
    learn_from_round,
    strategy_named,
)
from broker_server.strategies.cost_model import memory_bytes
from broker_server.strategies.fedadapter import FedAdapter
from tests.support.capacities import SIX_LAYERS, device, fleets, shapes
from wire_protocol.errors import ConfigError

ACCURACIES = st.lists(st.tuples(st.floats(0, 1), st.floats(0.1, 100)), max_size=30)


def sizes(strategy: Strategy, rounds: list[tuple[float, float]]) -> list[tuple[int, int]]:
    """Depth and rank of every round of a run with these accuracies and durations."""
    seen = []
    learn_from_round(strategy, RoundOutcome(0, 0.2, 0.0))
    for number, (accuracy, duration_s) in enumerate(rounds, start=1):
        lora = strategy.configure(SIX_LAYERS, [device("a")], number).plans["a"].lora
        seen.append((lora.depth, lora.ranks[-1]))
        learn_from_round(strategy, RoundOutcome(number, accuracy, duration_s))
    return seen


def test_candidates_take_turns_and_the_one_with_the_most_gain_per_second_wins() -> None:
    # Gains 0.1 in 10 s (shallow), 0.3 in 20 s (deep), 0.1 in 10 s (wide): deep wins, and
    # the next trial begins with its second candidate, because gains shrink with time.
    rounds = [(0.3, 10.0), (0.6, 20.0), (0.7, 10.0), (0.7, 1.0), (0.7, 1.0), (0.7, 1.0), (0.7, 1)]

    seen = sizes(FedAdapter(trial_rounds=1), rounds)

    assert seen == [(1, 4), (2, 4), (1, 8), (3, 4), (2, 8), (2, 4), (2, 8)]


def test_equal_gains_keep_the_smaller_candidate() -> None:
    seen = sizes(FedAdapter(trial_rounds=1), [(0.2, 1.0)] * 4)

    # Nothing was gained: (1, 4) starts again, in turns that begin with deep.
    assert seen == [(1, 4), (2, 4), (1, 8), (2, 4)]


def test_a_turn_lasts_as_many_rounds_as_its_option_says() -> None:
    seen = sizes(FedAdapter(trial_rounds=3), [(0.2, 1.0)] * 9)

    assert seen == [(1, 4)] * 3 + [(2, 4)] * 3 + [(1, 8)] * 3


def by_simulation(rounds: list[tuple[float, float]], layers: int) -> list[tuple[int, int]]:
    """The trials written as one loop with mutable state."""
    depth, rank, before, trial, seen, left = 1, 4, 0.2, 0, [], list(rounds)
    while True:
        options = [(depth, rank)]
        options += [(depth + 1, rank)] if depth < layers else []
        options += [(depth, min(rank + 4, 16))] if rank < 16 else []
        scores = {}
        for turn in range(len(options)):
            size = options[(trial + turn) % len(options)]
            spent = 0.0
            for _ in range(2):
                seen.append(size)
                if not left:
                    return seen[:-1]
                accuracy, duration = left.pop(0)
                spent += duration
            scores[size] = (accuracy - before) / spent
            before = accuracy
        best = max(scores.values())
        depth, rank = next(size for size in options if scores[size] == best)
        trial += 1


@given(ACCURACIES)
def test_growth_is_that_of_the_loop(rounds: list[tuple[float, float]]) -> None:
    assert sizes(FedAdapter(), rounds) == by_simulation(rounds, 6)


@given(ACCURACIES)
def test_a_past_round_is_configured_as_it_was(rounds: list[tuple[float, float]]) -> None:
    strategy = FedAdapter()
    seen = sizes(strategy, rounds)

    for number, size in enumerate(seen, start=1):
        lora = strategy.configure(SIX_LAYERS, [device("a")], number).plans["a"].lora
        assert (lora.depth, lora.ranks[-1]) == size


@given(ACCURACIES)
def test_a_strategy_that_is_told_all_rounds_again_goes_on_as_before(
    rounds: list[tuple[float, float]],
) -> None:
    lasting, restarted = FedAdapter(), FedAdapter()
    sizes(lasting, rounds)
    for strategy in (restarted, lasting):
        learn_from_round(strategy, RoundOutcome(0, 0.2, 0.0))
        for number, (accuracy, duration_s) in enumerate(rounds, start=1):
            learn_from_round(strategy, RoundOutcome(number, accuracy, duration_s))

    following = len(rounds) + 1
    configurations = [
        one.configure(SIX_LAYERS, [device("a")], following) for one in (lasting, restarted)
    ]

    assert configurations[0] == configurations[1]


@given(shapes(), fleets(), ACCURACIES, st.data())
def test_all_devices_train_the_same_within_their_memory(
    shape: RunShape,
    fleet: list[DeviceCapacity],
    rounds: list[tuple[float, float]],
    data: st.DataObject,
) -> None:
    strategy = FedAdapter(trial_rounds=1)
    for number, (accuracy, duration_s) in enumerate(rounds, start=1):
        learn_from_round(strategy, RoundOutcome(number, accuracy, duration_s))
    shuffled = data.draw(st.permutations(fleet))

    configuration = strategy.configure(shape, fleet, len(rounds) + 1)

    assert configuration == strategy.configure(shape, shuffled, len(rounds) + 1)
    assert configuration.global_ranks == (16,) * shape.layer_count
    assert len({plan.lora for plan in configuration.plans.values()}) <= 1
    for one in fleet:
        if one.device_id in configuration.plans:
            depth = configuration.plans[one.device_id].lora.depth
            assert memory_bytes(shape, [one])[0, depth - 1] <= one.memory_budget_bytes


def test_without_being_told_of_rounds_it_stays_where_it_began() -> None:
    plans = [FedAdapter().configure(SIX_LAYERS, [device("a")], n).plans["a"] for n in (1, 50)]

    assert {plan.lora.ranks for plan in plans} == {(0, 0, 0, 0, 0, 4)}


def test_a_strategy_that_does_not_learn_may_be_told_of_rounds() -> None:
    strategy = strategy_named("fedlora", {})
    before = strategy.configure(SIX_LAYERS, [device("a")], 1)

    learn_from_round(strategy, RoundOutcome(1, 0.5, 1.0))

    assert strategy.configure(SIX_LAYERS, [device("a")], 1) == before


def test_a_start_beyond_the_model_or_the_largest_rank_is_a_wrong_option() -> None:
    with pytest.raises(ConfigError, match="depth_start 7 exceeds the 6 layers"):
        strategy_named("fedadapter", {"depth_start": 7}).global_ranks(SIX_LAYERS)
    with pytest.raises(ConfigError, match="rank_start 32 exceeds rank_max 16"):
        strategy_named("fedadapter", {"rank_start": 32})
