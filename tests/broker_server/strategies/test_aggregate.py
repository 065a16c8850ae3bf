from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_server.strategies.aggregate import HolderMean
from broker_server.strategies.strategy import Adapter
from tests.support.capacities import (
    D_IN,
    D_OUT,
    RANKS,
    UPDATES,
    Tensors,
    assert_close,
    tensors,
)
from wire_protocol.errors import ProtocolError


def by_loop(old: Adapter, updates: Sequence[tuple[Adapter, float]]) -> Tensors:
    """Equation 5, one rank row of one tensor at a time."""
    new = {name: values.astype(np.float64) for name, values in old.items()}
    for name, values in new.items():
        held = [(u[name].astype(np.float64), w) for u, w in updates if name in u]
        if name.startswith("head"):
            rows, parts = values[np.newaxis], [(part[np.newaxis], w) for part, w in held]
        elif name.endswith("lora_B"):
            rows, parts = values.T, [(part.T, w) for part, w in held]
        else:
            rows, parts = values, held
        for row in range(len(rows)):
            holders = [(part[row], w) for part, w in parts if len(part) > row]
            if holders:
                rows[row] += sum(d * w for d, w in holders) / sum(w for _, w in holders)
    return {name: values.astype(np.float32) for name, values in new.items()}


def aggregated(
    old: Adapter, updates: Sequence[tuple[Adapter, float]], *, uniform: bool = False
) -> Tensors:
    aggregation = HolderMean(old, uniform=uniform)
    for number, (update, weight) in enumerate(updates):
        aggregation.add(f"d{number}", update, weight=weight, steps=10)
    return aggregation.result()


@given(UPDATES)
def test_the_new_adapter_agrees_with_equation_five(updates: list[tuple[Tensors, float]]) -> None:
    old = tensors(7, RANKS)

    assert_close(aggregated(old, updates), by_loop(old, updates))


def test_a_layer_that_nobody_trained_keeps_its_value() -> None:
    old = tensors(1, RANKS)

    new = aggregated(old, [(tensors(2, (0, 0, 4)), 10), (tensors(3, (0, 3, 4)), 20)])

    for name in ("layers.0.q.lora_A", "layers.0.q.lora_B"):
        np.testing.assert_array_equal(new[name], old[name])
    assert not np.array_equal(new["layers.1.q.lora_A"], old["layers.1.q.lora_A"])


def test_a_rank_row_that_nobody_trained_keeps_its_value() -> None:
    old = tensors(1, RANKS)

    new = aggregated(old, [(tensors(2, (0, 0, 3)), 10)])

    np.testing.assert_array_equal(new["layers.2.q.lora_A"][3], old["layers.2.q.lora_A"][3])
    np.testing.assert_array_equal(new["layers.2.q.lora_B"][:, 3], old["layers.2.q.lora_B"][:, 3])
    assert not np.array_equal(new["layers.2.q.lora_A"][2], old["layers.2.q.lora_A"][2])


def test_a_layer_with_one_holder_takes_its_whole_update() -> None:
    old, deep, shallow = tensors(1, RANKS), tensors(2, RANKS), tensors(3, (0, 0, 4))

    new = aggregated(old, [(deep, 1), (shallow, 1000)])

    name = "layers.0.q.lora_B"
    np.testing.assert_allclose(new[name], old[name] + deep[name], rtol=1e-6)


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(1, 500)), min_size=1, max_size=5))
def test_equal_configs_are_plain_fedavg(members: list[tuple[int, int]]) -> None:
    old = tensors(1, RANKS)
    updates = [(tensors(seed, RANKS), float(examples)) for seed, examples in members]
    total = sum(examples for _, examples in members)
    expected = {
        name: sum((old[name].astype(np.float64) + u[name]) * w / total for u, w in updates)
        for name in old
    }

    new = aggregated(old, updates)

    for name, values in expected.items():
        np.testing.assert_allclose(new[name], values, rtol=1e-5, atol=1e-6)


@given(UPDATES)
def test_every_value_moves_within_the_hull_of_the_updates(
    updates: list[tuple[Tensors, float]],
) -> None:
    old = tensors(5, RANKS)

    new = aggregated(old, updates)

    for name, values in new.items():
        moved = values.astype(np.float64) - old[name]
        low, high = np.full(values.shape, np.inf), np.full(values.shape, -np.inf)
        for update, _ in updates:
            if name in update:
                held = tuple(slice(size) for size in update[name].shape)
                low[held] = np.minimum(low[held], update[name])
                high[held] = np.maximum(high[held], update[name])
        unheld = np.isinf(low)
        assert (moved[unheld] == 0).all()
        assert (moved >= low - 1e-6)[~unheld].all()
        assert (moved <= high + 1e-6)[~unheld].all()


@given(UPDATES, st.data())
def test_one_update_split_in_two_halves_counts_once(
    updates: list[tuple[Tensors, float]], data: st.DataObject
) -> None:
    old = tensors(5, RANKS)
    index = data.draw(st.integers(0, len(updates) - 1))
    update, weight = updates[index]
    split = [*updates[:index], (update, weight / 2), *updates[index + 1 :], (update, weight / 2)]

    assert_close(aggregated(old, split), aggregated(old, updates))


@given(UPDATES, st.data())
def test_the_order_of_arrival_does_not_matter(
    updates: list[tuple[Tensors, float]], data: st.DataObject
) -> None:
    old = tensors(5, RANKS)
    arrived = data.draw(st.permutations(updates))

    assert_close(aggregated(old, arrived), aggregated(old, updates))


def test_uniform_weighting_counts_every_device_once() -> None:
    old, one, two = tensors(1, RANKS), tensors(2, RANKS), tensors(3, RANKS)

    new = aggregated(old, [(one, 1), (two, 999)], uniform=True)

    name = "head.bias"
    np.testing.assert_allclose(new[name], old[name] + (one[name] + two[name]) / 2, rtol=1e-5)


def test_a_server_learning_rate_scales_the_step() -> None:
    old, update = tensors(1, RANKS), tensors(2, RANKS)
    aggregation = HolderMean(old, learning_rate=0.5)
    aggregation.add("a", update, weight=3, steps=1)

    new = aggregation.result()

    for name, values in new.items():
        np.testing.assert_allclose(values, old[name] + update[name] / 2, rtol=1e-5, atol=1e-7)


def test_an_update_of_one_factor_leaves_the_other() -> None:
    old = tensors(1, RANKS)
    only_b = {name: v for name, v in tensors(2, RANKS).items() if name.endswith("lora_B")}

    new = aggregated(old, [(only_b, 5)])

    np.testing.assert_array_equal(new["layers.2.q.lora_A"], old["layers.2.q.lora_A"])
    assert not np.array_equal(new["layers.2.q.lora_B"], old["layers.2.q.lora_B"])


def test_the_sum_does_not_grow_with_the_number_of_updates() -> None:
    old = tensors(1, RANKS)
    aggregation = HolderMean(old)
    kept = [tensors(seed, RANKS) for seed in range(3)]
    for number in range(300):
        aggregation.add(f"d{number}", kept[number % 3], weight=1, steps=1)

    assert_close(aggregation.result(), by_loop(old, [(update, 1.0) for update in kept]))


@pytest.mark.parametrize(
    ("name", "shape", "complaint"),
    [
        ("layers.2.q.lora_A", (5, D_IN), "has shape"),
        ("layers.2.q.lora_A", (4, D_IN + 1), "has shape"),
        ("layers.2.q.lora_A", (0, D_IN), "has shape"),
        ("layers.2.q.lora_B", (D_OUT - 1, 4), "has shape"),
        ("layers.2.q.lora_B", (D_OUT,), "has shape"),
        ("head.bias", (1,), "has shape"),
        ("layers.3.q.lora_A", (2, D_IN), "unknown"),
    ],
)
def test_an_update_that_does_not_fit_is_refused_without_a_trace(
    name: str, shape: tuple[int, ...], complaint: str
) -> None:
    old, good = tensors(1, RANKS), tensors(2, RANKS)
    aggregation = HolderMean(old)
    bad: Tensors = {**tensors(3, RANKS), name: np.ones(shape, dtype=np.float32)}

    with pytest.raises(ProtocolError, match=complaint):
        aggregation.add("bad", bad, weight=1, steps=1)
    aggregation.add("good", good, weight=1, steps=1)

    assert_close(aggregation.result(), aggregated(old, [(good, 1)]))


def test_an_update_with_a_value_that_is_not_finite_is_refused() -> None:
    bad = tensors(3, RANKS)
    bad["head.bias"][0] = np.nan

    with pytest.raises(ProtocolError, match=r"head\.bias of device bad .* not finite"):
        HolderMean(tensors(1, RANKS)).add("bad", bad, weight=1, steps=1)


def test_an_empty_update_is_refused() -> None:
    with pytest.raises(ProtocolError, match="holds no tensor"):
        HolderMean(tensors(1, RANKS)).add("bad", {}, weight=1, steps=1)


@pytest.mark.parametrize(("weight", "steps"), [(0, 1), (-1, 1), (float("inf"), 1), (1, 0)])
def test_an_update_without_examples_or_steps_is_refused(weight: float, steps: int) -> None:
    with pytest.raises(ProtocolError, match="must be positive"):
        HolderMean(tensors(1, RANKS)).add("bad", tensors(2, RANKS), weight=weight, steps=steps)


def test_a_device_counts_once_a_round() -> None:
    aggregation = HolderMean(tensors(1, RANKS))
    aggregation.add("a", tensors(2, RANKS), weight=1, steps=1)

    with pytest.raises(ProtocolError, match="second update"):
        aggregation.add("a", tensors(2, RANKS), weight=1, steps=1)


def test_a_device_with_half_the_steps_counts_half_and_in_full() -> None:
    # Per step "a" moves by 0.1 and "b" by 0.4; "b" did half the steps, so a step of the
    # mean is (10 * 0.1 + 5 * 0.4) / 15 = 0.2, and ten of them are 2.
    old: Tensors = {"head.bias": np.zeros(1, dtype=np.float32)}
    aggregation = HolderMean(old, by_steps=True)
    aggregation.add("a", {"head.bias": np.array([1.0], dtype=np.float32)}, weight=7, steps=10)
    aggregation.add("b", {"head.bias": np.array([2.0], dtype=np.float32)}, weight=7, steps=5)

    assert aggregation.result()["head.bias"].tolist() == [pytest.approx(2.0)]


@given(UPDATES, st.integers(1, 50))
def test_counting_by_steps_changes_nothing_when_all_do_the_same(
    updates: list[tuple[Tensors, float]], steps: int
) -> None:
    old = tensors(7)
    aggregation = HolderMean(old, by_steps=True)
    for number, (update, weight) in enumerate(updates):
        aggregation.add(f"d{number}", update, weight=weight, steps=steps)

    assert_close(aggregation.result(), aggregated(old, updates), atol=1e-6)


def test_factors_of_one_module_must_have_the_same_rank() -> None:
    bad = tensors(3)
    bad["layers.2.q.lora_A"] = bad["layers.2.q.lora_A"][:2]

    with pytest.raises(ProtocolError, match="another rank than its partner"):
        HolderMean(tensors(1)).add("bad", bad, weight=1, steps=1)


def test_the_order_of_tensors_in_an_update_changes_nothing() -> None:
    old, update = tensors(1, RANKS), tensors(2, RANKS)
    backwards = dict(reversed(update.items()))

    one_layout = aggregated(old, [(update, 1.0), (update, 2.0)])

    assert_close(aggregated(old, [(update, 1.0), (backwards, 2.0)]), one_layout)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_update_of_a_layout_that_was_taken_before_is_still_looked_at(value: float) -> None:
    old, good = tensors(1, RANKS), tensors(2, RANKS)
    bad = {name: values.copy() for name, values in good.items()}
    bad[next(iter(bad))].flat[0] = value
    aggregation = HolderMean(old)
    aggregation.add("good", good, weight=1.0, steps=1)

    with pytest.raises(ProtocolError, match="not finite"):
        aggregation.add("bad", bad, weight=1.0, steps=1)

    assert_close(aggregation.result(), aggregated(old, [(good, 1.0)]))
