from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from broker_server.strategies.product_mean import ProductMean
from tests.support.capacities import RANKS, UPDATES, Tensors, tensors
from wire_protocol.errors import ProtocolError

Updates = list[tuple[Tensors, float]]


def aggregated(old: Tensors, updates: Updates) -> Tensors:
    aggregation = ProductMean(old)
    for number, (update, weight) in enumerate(updates):
        aggregation.add(f"d{number}", update, weight=weight, steps=10)
    return aggregation.result()


def product(adapter: Tensors, layer: int) -> NDArray[np.float64]:
    up, down = (adapter[f"layers.{layer}.q.lora_{factor}"] for factor in "BA")
    return up.astype(np.float64) @ down


def dense_mean(old: Tensors, updates: Updates, layer: int) -> NDArray[np.float64]:
    """The mean of the holders' products by examples, with the dense products formed."""
    total, mean = 0.0, np.zeros_like(product(old, layer))
    a, b = f"layers.{layer}.q.lora_A", f"layers.{layer}.q.lora_B"
    for update, weight in updates:
        if a in update:
            rank = len(update[a])
            up = old[b][:, :rank].astype(np.float64) + update[b]
            mean += weight * up @ (old[a][:rank].astype(np.float64) + update[a])
            total += weight
    return mean / total


def truncated(dense: NDArray[np.float64], rank: int) -> NDArray[np.float64]:
    left, values, right = np.linalg.svd(dense, full_matrices=False)
    best: NDArray[np.float64] = (left[:, :rank] * values[:rank]) @ right[:rank]
    return best


@given(UPDATES)
@settings(max_examples=60)
def test_the_new_product_is_the_best_of_its_rank_to_the_mean_product(updates: Updates) -> None:
    old = tensors(7)

    new = aggregated(old, updates)

    for layer, rank in enumerate(RANKS):
        if any(f"layers.{layer}.q.lora_A" in update for update, _ in updates):
            dense = dense_mean(old, updates, layer)
            best = float(np.linalg.norm(dense - truncated(dense, rank)))
            # Best matrices can be many where singular values are equal; their distance is one.
            reached = float(np.linalg.norm(dense - product(new, layer)))
            assert reached == pytest.approx(best, abs=1e-5)


@given(UPDATES, st.integers(1, 3))
@settings(max_examples=40)
def test_the_first_rows_are_the_best_truncation_for_a_device_of_lower_rank(
    updates: Updates, rank: int
) -> None:
    old = tensors(7)

    new = aggregated(old, updates)

    top = len(RANKS) - 1
    dense = dense_mean(old, updates, top)
    a, b = f"layers.{top}.q.lora_A", f"layers.{top}.q.lora_B"
    given_out = new[b][:, :rank].astype(np.float64) @ new[a][:rank]
    best = float(np.linalg.norm(dense - truncated(dense, rank)))
    assert float(np.linalg.norm(dense - given_out)) == pytest.approx(best, abs=1e-5)


@given(UPDATES, st.data())
@settings(max_examples=40)
def test_the_order_of_arrival_does_not_matter(updates: Updates, data: st.DataObject) -> None:
    old = tensors(7)
    arrived = data.draw(st.permutations(updates))

    one, other = aggregated(old, arrived), aggregated(old, updates)

    for layer, rank in enumerate(RANKS):
        # Cut below full rank, equal singular values leave a choice; its size is the same.
        mine, theirs = product(one, layer), product(other, layer)
        if rank < min(mine.shape):
            assert np.linalg.norm(mine) == pytest.approx(np.linalg.norm(theirs), abs=1e-5)
        else:
            np.testing.assert_allclose(mine, theirs, atol=1e-5)


@given(st.integers(0, 999), st.integers(1, 5))
def test_equal_updates_are_plain_fedavg_of_the_product(seed: int, devices: int) -> None:
    old, update = tensors(7), tensors(seed)
    trained = {name: old[name] + update[name] for name in old}

    new = aggregated(old, [(update, 1.0 + number) for number in range(devices)])

    for layer in range(len(RANKS)):
        np.testing.assert_allclose(product(new, layer), product(trained, layer), atol=1e-5)
    np.testing.assert_allclose(new["head.bias"], trained["head.bias"], atol=1e-6)


def test_many_updates_are_reduced_on_the_way_and_mean_the_same() -> None:
    old = tensors(7)
    updates = [(tensors(seed), 1.0 + seed % 3) for seed in range(40)]
    aggregation = ProductMean(old)
    for number, (update, weight) in enumerate(updates):
        aggregation.add(f"d{number}", update, weight=weight, steps=1)

    new = aggregation.result()

    assert all(stack.up.shape[1] <= 2 * 3 + 4 for stack in aggregation._stacks.values())
    for layer, rank in enumerate(RANKS):
        best = truncated(dense_mean(old, updates, layer), rank)
        np.testing.assert_allclose(product(new, layer), best, atol=1e-5)


@given(UPDATES, st.data(), st.sampled_from((1.0, 0.5)))
@settings(max_examples=60)
def test_by_steps_the_new_product_follows_the_mean_change_of_products_per_step(
    updates: Updates, data: st.DataObject, eta: float
) -> None:
    old = tensors(7)
    steps = [data.draw(st.integers(1, 30)) for _ in updates]
    aggregation = ProductMean(old, by_steps=True, keep_ranks=True, learning_rate=eta)
    for number, ((update, weight), done) in enumerate(zip(updates, steps, strict=True)):
        aggregation.add(f"d{number}", update, weight=weight, steps=done)

    new = aggregation.result()

    for layer, rank in enumerate(RANKS):
        a, b = f"layers.{layer}.q.lora_A", f"layers.{layer}.q.lora_B"
        change, share = np.zeros_like(product(old, layer)), 0.0
        for (update, weight), done in zip(updates, steps, strict=True):
            if a in update:
                held = len(update[a])
                began_up, began_down = old[b][:, :held].astype(np.float64), old[a][:held]
                trained = (began_up + update[b]) @ (began_down.astype(np.float64) + update[a])
                change += weight * (trained - began_up @ began_down)
                share += weight * done
        if share:
            dense = product(old, layer) + eta * max(steps) * change / share
            best = float(np.linalg.norm(dense - truncated(dense, rank)))
            reached = float(np.linalg.norm(dense - product(new, layer)))
            assert reached == pytest.approx(best, abs=1e-4)


def test_a_device_of_lower_rank_leaves_the_other_ranks_as_they_are_or_pulls_them_to_zero() -> None:
    old = tensors(7)
    narrow = {}
    for name, values in old.items():
        if name.endswith("lora_A"):
            narrow[name] = np.zeros_like(values[:1])
        elif name.endswith("lora_B"):
            narrow[name] = np.zeros_like(values[:, :1])
    kept, zeroed = ProductMean(old, keep_ranks=True), ProductMean(old)
    for aggregation in (kept, zeroed):
        aggregation.add("narrow", narrow, weight=1.0, steps=1)

    for layer in range(len(RANKS)):
        np.testing.assert_allclose(product(kept.result(), layer), product(old, layer), atol=1e-5)
        up, down = (old[f"layers.{layer}.q.lora_{factor}"] for factor in "BA")
        first = up[:, :1].astype(np.float64) @ down[:1]
        np.testing.assert_allclose(product(zeroed.result(), layer), first, atol=1e-5)


def test_a_layer_that_nobody_trained_keeps_its_value() -> None:
    old = tensors(1)

    new = aggregated(old, [(tensors(2, (0, 3, 4)), 1.0)])

    for factor in "AB":
        name = f"layers.0.q.lora_{factor}"
        np.testing.assert_array_equal(new[name], old[name])


def test_ranks_without_energy_can_still_learn() -> None:
    # Zeros in a row of A and in its column of B would stay zero for ever.
    old = tensors(1)
    for layer in range(len(RANKS)):
        old[f"layers.{layer}.q.lora_B"][:] = 0
    still = {name: np.zeros_like(values) for name, values in old.items()}

    new = aggregated(old, [(still, 1.0)])

    for name, values in old.items():
        np.testing.assert_array_equal(new[name], values)


def test_an_update_of_one_factor_is_refused() -> None:
    bad = {n: v for n, v in tensors(2).items() if not n.endswith("lora_B")}

    with pytest.raises(ProtocolError, match="without its partner"):
        ProductMean(tensors(1)).add("bad", bad, weight=1, steps=1)
