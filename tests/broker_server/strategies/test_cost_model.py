from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_server.strategies import DeviceCapacity, RunShape
from broker_server.strategies.cost_model import (
    completion_s,
    download_bytes,
    mean_waiting_s,
    memory_bytes,
    prefix_layers,
    upload_bytes,
)
from broker_server.strategies.prefix import PrefixMode, PrefixRule
from tests.support.capacities import SIX_LAYERS, device, fleets, shapes

RANKS = (4, 5, 6, 7, 8, 9)


@given(shapes(), fleets())
def test_completion_times_agree_with_equation_one(
    shape: RunShape, fleet: list[DeviceCapacity]
) -> None:
    ranks = tuple(range(1, shape.layer_count + 1))
    table = completion_s(shape, fleet, ranks)
    for row, one in enumerate(fleet):
        for depth in range(1, shape.layer_count + 1):
            layers = range(shape.layer_count - depth, shape.layer_count)
            sent = sum(shape.values_per_rank[layer] * ranks[layer] for layer in layers)
            loaded = sum(s * r for s, r in zip(shape.values_per_rank, ranks, strict=True))
            expected = (
                one.round_trip_s
                + 4 * (loaded + shape.head_values) / one.down_bytes_per_s
                + shape.steps * 512 * one.forward_s_per_token_layer * shape.layer_count
                + shape.steps * 512 * one.backward_s_per_token_layer * depth
                + 4 * (sent + shape.head_values) / one.up_bytes_per_s
            )
            assert table[row, depth - 1] == pytest.approx(expected, rel=1e-12)


def test_an_update_holds_the_top_layers_and_the_head() -> None:
    assert upload_bytes(SIX_LAYERS, RANKS)[1] == 4 * (1536 * (8 + 9) + 770)
    loaded = download_bytes(SIX_LAYERS, [device("a")], RANKS)
    assert (loaded == upload_bytes(SIX_LAYERS, RANKS)[-1]).all()


def test_a_smaller_codec_sends_fewer_bytes() -> None:
    int8 = dataclasses.replace(SIX_LAYERS, bytes_per_value_up=1.0)

    np.testing.assert_allclose(upload_bytes(int8, RANKS) * 4, upload_bytes(SIX_LAYERS, RANKS))


def test_memory_grows_by_the_same_amount_for_every_trained_layer() -> None:
    table = memory_bytes(SIX_LAYERS, [device("a")])

    assert table[0, 0] == 200e6 + 1024 * (50e3 + 100e3)
    np.testing.assert_allclose(np.diff(table[0]), 1024 * 100e3)


def test_devices_wait_for_the_slowest_of_them() -> None:
    assert mean_waiting_s(np.array([10.0, 4.0, 7.0])) == pytest.approx((0 + 6 + 3) / 3)


def test_a_device_that_never_finishes_cannot_be_built() -> None:
    with pytest.raises(ValueError, match="up_bytes_per_s of device a"):
        dataclasses.replace(device("a"), up_bytes_per_s=0.0)
    with pytest.raises(ValueError, match="round_trip_s of device a"):
        dataclasses.replace(device("a"), round_trip_s=float("nan"))


def test_a_run_needs_one_size_per_layer() -> None:
    with pytest.raises(ValueError, match="5 sizes for 6 layers"):
        dataclasses.replace(SIX_LAYERS, values_per_rank=(1536,) * 5)


def kept(shape: RunShape, mode: PrefixMode = "pretrained") -> RunShape:
    return dataclasses.replace(shape, prefix=PrefixRule(mode), batch_size=8)


def test_with_a_kept_prefix_a_device_loads_what_it_trains() -> None:
    loaded = download_bytes(kept(SIX_LAYERS), [device("a")], RANKS)
    np.testing.assert_allclose(loaded[0], upload_bytes(SIX_LAYERS, RANKS))


def test_a_snapshot_is_loaded_once() -> None:
    shape = kept(SIX_LAYERS, "periodic")
    cold, warm = device("a"), dataclasses.replace(device("a"), warm_depth=3, warm_examples=1)
    loaded = download_bytes(shape, [cold, warm], RANKS)
    np.testing.assert_allclose(loaded[0], download_bytes(SIX_LAYERS, [cold], RANKS)[0])
    np.testing.assert_allclose(loaded[1], upload_bytes(SIX_LAYERS, RANKS))


def test_frozen_layers_run_on_first_visits_only() -> None:
    shape = kept(SIX_LAYERS)
    visits = shape.steps * shape.batch_size
    cold = dataclasses.replace(device("a"), examples=visits // 2)
    warm = dataclasses.replace(cold, warm_depth=3, warm_examples=visits // 2)
    layers = prefix_layers(shape, [cold, warm])
    np.testing.assert_allclose(layers[0], 0.5 * np.array([5, 4, 3, 2, 1, 0]))
    # Above the cached boundary one or two layers run once; below it all of them.
    np.testing.assert_allclose(layers[1], 0.5 * np.array([2, 1, 0, 2, 1, 0]))


@given(shapes(), fleets(), st.integers(0, 12), st.integers(0, 500))
def test_depth_costs_time_whatever_is_cached(
    shape: RunShape, fleet: list[DeviceCapacity], warm_depth: int, warm_examples: int
) -> None:
    warm = [
        dataclasses.replace(
            one,
            warm_depth=min(warm_depth, shape.layer_count),
            warm_examples=min(warm_examples, one.examples),
        )
        for one in fleet
    ]
    ranks = tuple(range(1, shape.layer_count + 1))
    assert (np.diff(completion_s(kept(shape), warm, ranks), axis=1) > 0).all()
    assert (np.diff(completion_s(kept(shape, "periodic"), warm, ranks), axis=1) > 0).all()
