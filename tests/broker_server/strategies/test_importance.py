"""Ranks that follow what layers need: shares, order, and adapters that keep what they learned."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from broker_server.strategies import restore_state, saved_state, strategy_named
from broker_server.strategies.importance import (
    LearnedRanks,
    ranks_by_importance,
    relative_importance,
    resized,
)
from broker_server.strategies.private_sum import PrivacyRule
from broker_server.strategies.protected import Received, aggregate_round, protected_strategy
from tests.support.capacities import RANKS, SIX_LAYERS, device, tensors
from wire_protocol.errors import ConfigError
from wire_protocol.lora import MAX_RANK

IMPORTANCE = arrays.arrays(
    np.float64, st.integers(1, 24), elements=st.floats(0.01, 100) | st.just(np.nan)
)


def product(adapter: dict[str, np.ndarray], layer: int) -> np.ndarray:
    name = f"layers.{layer}.q.lora_"
    return np.asarray(adapter[f"{name}B"] @ adapter[f"{name}A"])


def test_importance_is_that_of_the_median_device_and_relative_to_the_output() -> None:
    gradients = [(1.0, 2.0, 4.0), (3.0, 6.0), (0.2, 0.1), (5.0,)]
    found = relative_importance(gradients, 3)
    np.testing.assert_allclose(found, [0.25, 0.5, 1.0])
    assert np.isnan(relative_importance([(2.0, 1.0)], 3)[0])


@pytest.mark.parametrize("silly", [(), (1.0, 0.0), (0.0,)])
def test_a_device_whose_sizes_say_nothing_does_not_count(silly: tuple[float, ...]) -> None:
    assert relative_importance([silly, (2.0, 4.0)], 2).tolist() == [0.5, 1.0]


def test_one_device_cannot_claim_a_layer_for_itself() -> None:
    honest = [(1.0, 1.0, 1.0)] * 4
    lying = [(1e30, 1.0, 1.0)]
    assert relative_importance([*honest, *lying], 3).tolist() == [1.0, 1.0, 1.0]
    assert relative_importance(lying, 3).max() <= 100


def test_ranks_are_shared_out_by_importance() -> None:
    assert ranks_by_importance(np.array([1.0, 1.0, 2.0]), 11) == (3, 3, 5)
    # What falls is pooled: no layer has more than the one above it.
    assert ranks_by_importance(np.array([4.0, 1.0, 1.0]), 9) == (3, 3, 3)


@given(IMPORTANCE, st.data())
def test_the_whole_budget_is_used_and_ranks_never_fall(
    importance: np.ndarray, data: st.DataObject
) -> None:
    layers = len(importance)
    budget = data.draw(st.integers(layers, min(layers * MAX_RANK, 40 * layers)))
    ranks = ranks_by_importance(importance, budget)
    assert sum(ranks) == budget
    assert ranks[0] >= 1
    assert list(ranks) == sorted(ranks)
    assert ranks[-1] <= MAX_RANK


def test_more_rank_changes_nothing_and_less_keeps_the_best_that_fits() -> None:
    old = tensors(0)
    new = resized(old, (1, 3, 6), seed=5)
    assert [new[f"layers.{layer}.q.lora_A"].shape[0] for layer in range(3)] == [1, 3, 6]
    np.testing.assert_array_equal(product(new, 2), product(old, 2))
    assert np.abs(new["layers.2.q.lora_A"][4:]).min() > 0
    assert not new["layers.2.q.lora_B"][:, 4:].any()
    for name in ("layers.1.q.lora_A", "layers.1.q.lora_B", "head.weight"):
        np.testing.assert_array_equal(new[name], old[name])
    left, values, right = np.linalg.svd(product(old, 0))
    best = values[0] * np.outer(left[:, 0], right[0])
    np.testing.assert_allclose(product(new, 0), best, atol=1e-5)


def test_an_adapter_that_learned_nothing_keeps_its_rows_when_it_shrinks() -> None:
    old = tensors(0)
    old["layers.2.q.lora_B"][:] = 0
    new = resized(old, (2, 3, 2), seed=0)
    np.testing.assert_array_equal(new["layers.2.q.lora_A"], old["layers.2.q.lora_A"][:2])
    assert not new["layers.2.q.lora_B"].any()


def test_ranks_are_decided_every_so_many_rounds_and_survive_a_restart() -> None:
    adapter = tensors(0)
    gradients = [(1.0, 1.0, 4.0)]
    learned = LearnedRanks(every=2, rho=0.5)
    assert learned.after_round(adapter, gradients) is adapter
    assert learned.ranks is None

    again = LearnedRanks(every=2, rho=0.5)
    again.restore(learned.state())
    first, second = learned.after_round(adapter, []), again.after_round(adapter, [])

    assert learned.ranks == again.ranks == (2, 2, 5)
    assert sum(learned.ranks) == sum(RANKS)
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


def test_ranks_that_are_right_already_leave_the_adapter_alone() -> None:
    learned = LearnedRanks(every=1, rho=0.5)
    adapter = tensors(0)
    assert learned.after_round(adapter, [(1.0, 2.0, 3.0)]) is adapter
    assert learned.ranks == RANKS


def test_without_any_report_ranks_stay() -> None:
    learned = LearnedRanks(every=1, rho=0.5)
    adapter = tensors(0)
    assert learned.after_round(adapter, []) is adapter
    assert learned.ranks is None


def reported(device_id: str, gradients: tuple[float, ...], seed: int) -> Received:
    return Received(device_id, 10.0, 5, lambda: tensors(seed, size=0.01), gradients)


def test_a_round_ends_with_the_ranks_of_the_next_one() -> None:
    shape = replace(SIX_LAYERS, layer_count=3, values_per_rank=(7, 7, 7))
    options = {"ranks": "importance", "ranks_every": 1, "server_optimizer": "momentum"}
    strategy = strategy_named("legend", {**options, "rank_min": 2})
    assert strategy.global_ranks(shape) == RANKS
    received = [reported("a", (1.0, 1.0, 4.0), 1), reported("b", (1.0, 4.0), 2)]

    plain = aggregate_round(strategy_named("legend", {"server_optimizer": "momentum"}),
                            tensors(0), received, []).adapter  # fmt: skip
    new = aggregate_round(strategy, tensors(0), received, []).adapter

    assert strategy.global_ranks(shape) == (2, 2, 5)
    configured = strategy.configure(shape, [device("a")], 2)
    assert configured.global_ranks == (2, 2, 5)
    np.testing.assert_allclose(product(dict(new), 2), product(dict(plain), 2), atol=1e-6)
    # Moments of other shapes would break the next round.
    aggregate_round(strategy, new, [], [])

    again = strategy_named("legend", {**options, "rank_min": 2})
    restore_state(again, saved_state(strategy))
    assert again.global_ranks(shape) == (2, 2, 5)


def test_privacy_does_not_go_with_ranks_that_follow_gradients() -> None:
    with pytest.raises(ConfigError, match="ranks importance follows gradients"):
        protected_strategy("legend", {"ranks": "importance"}, privacy=PrivacyRule(1.0, 1.0))
