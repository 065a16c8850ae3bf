from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_server.strategies.norm_mean import NormWeightedMean, product_norm
from tests.support.capacities import RANKS, UPDATES, Tensors, assert_close, tensors
from wire_protocol.errors import ProtocolError


def aggregated(old: Tensors, updates: list[tuple[Tensors, float]]) -> Tensors:
    aggregation = NormWeightedMean(old)
    for number, (update, weight) in enumerate(updates):
        aggregation.add(f"d{number}", update, weight=weight, steps=10)
    return aggregation.result()


def by_equation(old: Tensors, updates: list[tuple[Tensors, float]]) -> Tensors:
    """Zero-padded factors weighted by the norm of the dense products."""
    factors, norms = [], []
    for update, _ in updates:
        trained = {}
        for name, delta in update.items():
            if "lora" in name:
                held = tuple(slice(size) for size in delta.shape)
                trained[name] = old[name][held].astype(np.float64) + delta
        squares = [
            np.linalg.norm(trained[name[:-1] + "B"] @ values) ** 2
            for name, values in trained.items()
            if name.endswith("A")
        ]
        factors.append(trained)
        norms.append(np.sqrt(sum(squares)))
    new = {name: values.astype(np.float64) for name, values in old.items()}
    for name, values in new.items():
        if "head" in name:
            total = sum(weight for _, weight in updates)
            mean = sum(update[name].astype(np.float64) * weight for update, weight in updates)
            new[name] = values + mean / total
            continue
        holders = [
            (one[name], norm) for one, norm in zip(factors, norms, strict=True) if name in one
        ]
        if not holders:
            continue
        padded = np.zeros_like(values)
        for one, norm in holders:
            padded[tuple(slice(size) for size in one.shape)] += one * norm
        axis = 0 if name.endswith("A") else 1
        rank = max(one.shape[axis] for one, _ in holders)
        rows = np.arange(values.shape[axis]) < rank
        mask = rows[:, np.newaxis] if axis == 0 else rows[np.newaxis]
        new[name] = np.where(mask, padded / sum(norm for _, norm in holders), values)
    return {name: values.astype(np.float32) for name, values in new.items()}


@given(UPDATES)
def test_factors_are_padded_and_weighted_by_the_norm_of_their_product(
    updates: list[tuple[Tensors, float]],
) -> None:
    old = tensors(7)

    assert_close(aggregated(old, updates), by_equation(old, updates), atol=1e-6)


@given(UPDATES, st.data())
def test_the_order_of_arrival_does_not_matter(
    updates: list[tuple[Tensors, float]], data: st.DataObject
) -> None:
    old = tensors(7)
    arrived = data.draw(st.permutations(updates))

    assert_close(aggregated(old, arrived), aggregated(old, updates), atol=1e-6)


@given(st.integers(0, 999), st.integers(1, 5))
def test_equal_updates_are_plain_fedavg(seed: int, devices: int) -> None:
    old, update = tensors(7), tensors(seed)

    new = aggregated(old, [(update, 1.0 + number) for number in range(devices)])

    expected = {name: old[name] + update[name] for name in old}
    assert_close(new, expected, atol=1e-6)


def test_products_of_nothing_count_alike() -> None:
    old = {name: np.zeros_like(values) for name, values in tensors(1).items()}
    a = "layers.0.q.lora_A"
    updates = []
    for value in (1.0, 3.0):
        update = {name: np.zeros_like(values) for name, values in old.items()}
        update[a] = np.full_like(old[a], value)
        updates.append((update, 1.0))

    assert aggregated(old, updates)[a].tolist() == np.full_like(old[a], 2.0).tolist()


def test_layers_and_rows_that_nobody_trained_keep_their_value() -> None:
    old = tensors(1)

    new = aggregated(old, [(tensors(2, (0, 2, 3)), 1.0)])

    np.testing.assert_array_equal(new["layers.0.q.lora_A"], old["layers.0.q.lora_A"])
    np.testing.assert_array_equal(new["layers.2.q.lora_B"][:, 3], old["layers.2.q.lora_B"][:, 3])
    assert (new["layers.2.q.lora_B"][:, :3] != old["layers.2.q.lora_B"][:, :3]).all()


@given(st.integers(0, 999), st.tuples(*[st.integers(1, 6)] * 3))
def test_the_norm_needs_no_dense_product(seed: int, ranks: tuple[int, ...]) -> None:
    factors = {
        name: values.astype(np.float64)
        for name, values in tensors(seed, ranks).items()
        if "lora" in name
    }
    dense = [
        factors[f"layers.{layer}.q.lora_B"] @ factors[f"layers.{layer}.q.lora_A"]
        for layer in range(len(ranks))
    ]

    assert product_norm(factors) == pytest.approx(np.linalg.norm(np.stack(dense)))


def test_an_update_of_one_factor_is_refused() -> None:
    bad = {n: v for n, v in tensors(2, RANKS).items() if not n.endswith("lora_A")}

    with pytest.raises(ProtocolError, match="without its partner"):
        NormWeightedMean(tensors(1)).add("bad", bad, weight=1, steps=1)
