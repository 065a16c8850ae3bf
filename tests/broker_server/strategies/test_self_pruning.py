"""HetLoRA's self-pruning against its equations."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from broker_server.run_setup import recipe_of
from broker_server.run_spec import parse_run_spec
from broker_server.strategies import restore_state, saved_state, strategy_named
from broker_server.strategies.protected import protected_strategy
from broker_server.strategies.self_pruning import SelfPruning, tail_score
from broker_server.strategies.strategy import Strategy
from tests.support.capacities import SIX_LAYERS, device
from wire_protocol.errors import ConfigError
from wire_protocol.lora import TailRule, kept_ranks

MODULES = ("layers.0.query", "layers.1.query")


def factors(seed: int, rank: int = 16) -> dict[str, NDArray[np.float32]]:
    """LoRA factors of two modules of 12 inputs and 10 outputs."""
    generator = np.random.default_rng(seed)
    made = {}
    for module in MODULES:
        made[f"{module}.lora_A"] = generator.normal(size=(rank, 12)).astype(np.float32)
        made[f"{module}.lora_B"] = generator.normal(size=(10, rank)).astype(np.float32)
    return made


def exact(tensors: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float64]]:
    return {name: values.astype(np.float64) for name, values in tensors.items()}


def with_tail(
    tensors: dict[str, NDArray[np.float32]], times: float, kept: int
) -> dict[str, NDArray[np.float32]]:
    """The same, but for the rows of A behind ``kept``."""
    changed = {name: values.copy() for name, values in tensors.items()}
    for name, values in changed.items():
        if name.endswith("lora_A"):
            values[kept:] *= np.float32(times)
    return changed


@given(st.integers(1, 40), st.floats(0.05, 0.99), st.integers(0, 50))
def test_the_tail_score_is_that_of_the_paper(rank: int, share: float, seed: int) -> None:
    held = exact(factors(seed, rank))
    g = int(np.floor(share * rank))

    expected = sum(
        np.sqrt((held[f"{module}.lora_B"][:, g:] ** 2).sum())
        * np.sqrt((held[f"{module}.lora_A"][g:, :] ** 2).sum())
        for module in MODULES
    )

    assert tail_score(held, share) == pytest.approx(expected)


@given(st.integers(1, 40), st.floats(0.05, 0.99), st.integers(1, 8), st.floats(0.1, 3.0))
def test_a_device_is_pruned_exactly_when_its_tail_shrank(
    rank: int, share: float, rank_min: int, times: float
) -> None:
    before = factors(1, rank)
    after = with_tail(before, times, kept_ranks(rank, share))
    pruning = SelfPruning(share, rank_min)

    pruning.judge("d", exact(before), exact(after))

    shrank = tail_score(exact(after), share) < tail_score(exact(before), share)
    cut = min(rank, max(rank_min, int(np.floor(share * rank))))
    assert pruning.allowed("d", rank) == (cut if shrank else rank)
    assert pruning.allowed("another", rank) == rank


def test_a_device_that_was_cut_in_a_low_tier_still_gets_more_in_a_high_one() -> None:
    pruning = SelfPruning(0.99, 4)
    low = factors(1, 8)
    pruning.judge("d", exact(low), exact(with_tail(low, 0.5, 7)))

    assert [pruning.allowed("d", rank) for rank in (16, 8, 4)] == [15, 7, 4]


def test_a_rank_that_cannot_be_cut_is_not_remembered_as_cut() -> None:
    pruning = SelfPruning(0.99, 4)
    least = factors(1, 4)
    pruning.judge("d", exact(least), exact(with_tail(least, 0.5, 3)))

    assert pruning.allowed("d", 16) == 16
    assert pruning.state() == {}


def a_round(strategy: Strategy, shrinking: str) -> None:
    """Two devices train; the tail of one shrinks, that of the other grows."""
    base = factors(1)
    aggregation = strategy.begin(base)
    for name in ("fast", "same"):
        trained = with_tail(base, 0.5 if name == shrinking else 2.0, kept_ranks(16, 0.9))
        update = {key: trained[key] - base[key] for key in base}
        aggregation.add(name, update, weight=1.0, steps=1)
    aggregation.result()


def ranks_of(strategy: Strategy) -> dict[str, int]:
    fleet = [device("fast", gflop_per_s=100), device("same", gflop_per_s=100)]
    plans = strategy.configure(SIX_LAYERS, fleet, 2).plans
    return {name: plan.lora.ranks[0] for name, plan in plans.items()}


@pytest.mark.parametrize("protected", [False, True])
def test_hetlora_gives_a_device_whose_tail_shrank_fewer_ranks(protected: bool) -> None:
    make = protected_strategy if protected else strategy_named
    strategy = make("hetlora", {"keep_share": 0.9})

    a_round(strategy, shrinking="fast")

    assert ranks_of(strategy) == {"fast": 14, "same": 16}


def test_a_run_that_was_resumed_knows_who_was_pruned() -> None:
    before = strategy_named("hetlora", {"keep_share": 0.9})
    a_round(before, shrinking="same")
    after = strategy_named("hetlora", {"keep_share": 0.9})

    restore_state(after, saved_state(before))

    assert ranks_of(after) == ranks_of(before) == {"fast": 16, "same": 14}
    restore_state(after, {})
    assert ranks_of(after) == {"fast": 16, "same": 16}


def test_a_share_of_null_prunes_nobody_and_penalises_nothing() -> None:
    strategy = strategy_named("hetlora", {"keep_share": None})

    a_round(strategy, shrinking="fast")

    assert ranks_of(strategy) == {"fast": 16, "same": 16}
    assert recipe_for("hetlora", {"keep_share": None}) is None


def recipe_for(name: str, options: dict[str, object]) -> TailRule | None:
    """The penalty that devices of such a run are told."""
    spec = parse_run_spec(
        {
            "name": "run",
            "model": "tiny",
            "dataset": "d",
            "labels": ["a", "b"],
            "rounds": 1,
            "strategy": name,
            "evaluation": {"sha256": "ab" * 32, "size_bytes": 1},
        }
    )
    tail = recipe_of(spec, protected_strategy(name, options)).tail
    return TailRule(tail.share, tail.weight) if tail else None


def test_devices_are_told_the_penalty_and_only_by_hetlora() -> None:
    assert recipe_for("hetlora", {"tail_weight": 0.5}) == TailRule(0.99, 0.5)
    assert recipe_for("flexlora", {}) is None
    assert recipe_for("legend", {}) is None


@pytest.mark.parametrize("share", [0, 1, -0.5, "0.9", True])
def test_a_share_that_is_none_is_a_wrong_option(share: object) -> None:
    with pytest.raises(ConfigError, match=r"keep_share.*above 0 and below 1"):
        strategy_named("hetlora", {"keep_share": share})
