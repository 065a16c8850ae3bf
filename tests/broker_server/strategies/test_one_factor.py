from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_server.strategies import strategy_named
from broker_server.strategies.cost_model import upload_bytes
from broker_server.strategies.factors import factors_in
from tests.support.capacities import (
    RANKS,
    SIX_LAYERS,
    Tensors,
    device,
    nested_ranks,
    tensors,
)
from wire_protocol.errors import ProtocolError


def of_factor(update: Tensors, factor: str) -> Tensors:
    """What a device sends that trained this factor, and the head."""
    return {n: v for n, v in update.items() if n.endswith(factor) or n.startswith("head")}


def test_ffa_trains_b_in_every_round() -> None:
    ffa = strategy_named("ffa", {"rank": 4})

    for round_number in (1, 2, 7):
        plan = ffa.configure(SIX_LAYERS, [device("a")], round_number).plans["a"]
        assert (plan.factors, plan.lora.ranks) == ("B", (4,) * 6)


def test_rolora_alternates_and_begins_with_b() -> None:
    rolora = strategy_named("rolora", {})

    trained = [
        rolora.configure(SIX_LAYERS, [device("a")], number).plans["a"].factors
        for number in (1, 2, 3, 4)
    ]

    assert trained == ["B", "A", "B", "A"]


def test_legend_can_alternate_too() -> None:
    legend = strategy_named("legend", {"factors": "alternating", "pace": "slowest"})

    plans = legend.configure(SIX_LAYERS, [device("a")], 2).plans

    assert plans["a"].factors == "A"
    assert plans["a"].lora.depth == 2
    assert factors_in("both", 2) == "both"


def test_one_factor_halves_what_is_sent_of_square_modules() -> None:
    whole = upload_bytes(SIX_LAYERS, (8,) * 6)[-1]
    head = 770 * 4

    for factor in ("A", "B"):
        one = upload_bytes(SIX_LAYERS, (8,) * 6, factors=factor)[-1]
        assert one - head == (whole - head) / 2


def test_factors_of_unequal_size_share_the_upload_as_they_are() -> None:
    shape = replace(SIX_LAYERS, head_values=0, b_share=0.25)
    whole = upload_bytes(shape, (8,) * 6)

    np.testing.assert_allclose(upload_bytes(shape, (8,) * 6, factors="B"), whole / 4)
    np.testing.assert_allclose(upload_bytes(shape, (8,) * 6, factors="A"), whole * 3 / 4)
    with pytest.raises(ValueError, match="b_share must lie between 0 and 1"):
        replace(shape, b_share=1.0)


@pytest.mark.parametrize("factor", ["A", "B"])
@given(
    devices=st.lists(
        st.tuples(st.integers(0, 99), nested_ranks(), st.integers(1, 9)), min_size=1, max_size=5
    )
)
def test_the_mean_of_one_factor_is_the_mean_of_products(
    factor: str, devices: list[tuple[int, tuple[int, ...], int]]
) -> None:
    # Over the holders of each rank row, whose share of the product is b_j a_j.
    old = tensors(1)
    aggregation = strategy_named("rolora", {}).begin(old)
    updates = []
    for number, (seed, ranks, weight) in enumerate(devices):
        update = of_factor(tensors(seed, ranks), factor)
        aggregation.add(f"d{number}", update, weight=weight, steps=1)
        updates.append((update, weight))

    new = aggregation.result()

    for layer, rank in enumerate(RANKS):
        a, b = f"layers.{layer}.q.lora_A", f"layers.{layer}.q.lora_B"
        for row in range(rank):
            total, mean = 0.0, np.zeros((len(old[b]), old[a].shape[1]))
            for update, weight in updates:
                held = update.get(a if factor == "A" else b)
                if held is None or held.shape[0 if factor == "A" else 1] <= row:
                    continue
                down, up = old[a][row].copy(), old[b][:, row].copy()
                if factor == "A":
                    down += held[row]
                else:
                    up += held[:, row]
                mean += weight * np.outer(up, down)
                total += weight
            if total:
                got = np.outer(new[b][:, row], new[a][row])
                np.testing.assert_allclose(got, mean / total, atol=1e-5)


def test_the_frozen_factor_keeps_its_value() -> None:
    old = tensors(1)
    aggregation = strategy_named("ffa", {}).begin(old)
    aggregation.add("a", of_factor(tensors(2), "B"), weight=1, steps=1)

    new = aggregation.result()

    np.testing.assert_array_equal(new["layers.0.q.lora_A"], old["layers.0.q.lora_A"])
    assert (new["layers.0.q.lora_B"] != old["layers.0.q.lora_B"]).all()


@pytest.mark.parametrize(
    ("name", "sent"),
    [("ffa", ["A"]), ("ffa", ["AB"]), ("rolora", ["AB"]), ("rolora", ["A", "B"])],
)
def test_a_factor_that_should_have_been_frozen_is_refused(name: str, sent: list[str]) -> None:
    aggregation = strategy_named(name, {}).begin(tensors(1))
    *good, bad = sent
    for factor in good:
        aggregation.add("good", of_factor(tensors(2), factor), weight=1, steps=1)
    update = tensors(3) if bad == "AB" else of_factor(tensors(3), bad)

    with pytest.raises(ProtocolError, match="a factor that it should not have trained"):
        aggregation.add("bad", update, weight=1, steps=1)
