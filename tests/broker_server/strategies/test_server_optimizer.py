from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_server.strategies import restore_state, saved_state, strategy_named
from broker_server.strategies.aggregate import HolderMean
from broker_server.strategies.server_optimizer import OptimizerName, ServerOptimizer
from tests.support.capacities import RANKS, Tensors, assert_close, nested_ranks, tensors
from wire_protocol.errors import ConfigError

KINDS: tuple[OptimizerName, ...] = ("momentum", "adam", "yogi")
ETA, B1, B2, TAU = 0.01, 0.9, 0.99, 1e-3
# At the squared mean that yogi's second moment is, its sign hangs on the last digit.
MEANS = st.floats(-2, 2).filter(lambda mean: not math.isclose(abs(mean), TAU, rel_tol=1e-4))


def by_loop(kind: str, value: float, means: list[float | None]) -> float:
    """One value over many rounds, by the published equations; None where nobody held it."""
    first, second = 0.0, TAU**2
    for mean in means:
        if mean is None:
            continue
        if kind == "momentum":
            first = B1 * first + mean
            value += ETA * first
            continue
        first = B1 * first + (1 - B1) * mean
        if kind == "adam":
            second = B2 * second + (1 - B2) * mean**2
        else:
            second -= (1 - B2) * mean**2 * np.sign(second - mean**2)
        value += ETA * first / (math.sqrt(second) + TAU)
    return value


def optimizer(kind: OptimizerName) -> ServerOptimizer:
    return ServerOptimizer(kind, learning_rate=ETA, momentum=B1, decay=B2, tau=TAU)


def after_round(step: ServerOptimizer, old: Tensors, update: Tensors) -> Tensors:
    aggregation = HolderMean(old, step=step)
    aggregation.add("a", update, weight=3, steps=1)
    return aggregation.result()


@pytest.mark.parametrize("kind", KINDS)
@given(means=st.lists(st.none() | MEANS, min_size=1, max_size=8))
def test_a_value_moves_by_the_published_equations(
    kind: OptimizerName, means: list[float | None]
) -> None:
    step, old = optimizer(kind), {"w": np.array([0.25], dtype=np.float32)}
    value = old["w"].astype(np.float64)
    for mean in means:
        # The moments are kept as float32; the reference keeps float64.
        held = np.array([mean is not None])
        moved = step.moved("w", old["w"], np.array([mean or 0.0]), held)
        value = value + (moved - old["w"])

    assert value[0] == pytest.approx(by_loop(kind, 0.25, means), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_nobody_trained_keep_their_value_on_old_momentum(kind: OptimizerName) -> None:
    step, old = optimizer(kind), tensors(1)
    first = after_round(step, old, tensors(2))

    second = after_round(step, first, tensors(3, (0, 0, 3)))

    for name in ("layers.0.q.lora_A", "layers.1.q.lora_B"):
        np.testing.assert_array_equal(second[name], first[name])
    top = "layers.2.q.lora_A"
    np.testing.assert_array_equal(second[top][3], first[top][3])
    assert (second[top][:3] != first[top][:3]).all()


@given(st.sampled_from(KINDS), st.lists(nested_ranks(), min_size=1, max_size=4))
def test_a_restored_optimizer_goes_on_as_if_nothing_had_happened(
    kind: OptimizerName, rounds: list[tuple[int, ...]]
) -> None:
    step, adapter = optimizer(kind), tensors(1)
    for number, ranks in enumerate(rounds):
        adapter = after_round(step, adapter, tensors(number, ranks))
    restored = optimizer(kind)
    restored.restore(step.state())

    last = tensors(99, RANKS)
    assert_close(after_round(restored, adapter, last), after_round(step, adapter, last), atol=1e-6)


def test_the_state_of_legend_survives_through_its_strategy() -> None:
    options: dict[str, object] = {"server_optimizer": "momentum", "server_learning_rate": 0.5}
    strategy, old = strategy_named("legend", options), tensors(1)
    aggregation = strategy.begin(old)
    aggregation.add("a", tensors(2), weight=1, steps=1)
    adapter = aggregation.result()
    restarted = strategy_named("legend", options)
    restore_state(restarted, saved_state(strategy))

    results = []
    for one in (strategy, restarted):
        aggregation = one.begin(adapter)
        aggregation.add("a", tensors(3), weight=1, steps=1)
        results.append(aggregation.result())

    assert_close(*results)
    moved = results[0]["head.bias"] - adapter["head.bias"]
    expected = 0.5 * (0.9 * tensors(2)["head.bias"] + tensors(3)["head.bias"])
    np.testing.assert_allclose(moved, expected, rtol=1e-5, atol=1e-6)


def test_a_strategy_without_optimizer_has_no_state() -> None:
    for name in ("legend", "fedlora"):
        strategy = strategy_named(name, {})
        restore_state(strategy, {})
        assert saved_state(strategy) == {}


@pytest.mark.parametrize("kind", ["adam", "yogi"])
def test_the_learning_rate_of_a_mean_is_no_learning_rate_of_an_adaptive_optimizer(
    kind: str,
) -> None:
    with pytest.raises(ConfigError, match=r"server_learning_rate 1 .* near 0\.001"):
        strategy_named("legend", {"server_optimizer": kind})
    strategy_named("legend", {"server_optimizer": kind, "server_learning_rate": 0.001})
