"""Devices, run shapes and small adapters for tests of the strategies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from broker_server.strategies import DeviceCapacity, RunShape

WEIGHTS_PER_LAYER = 1_769_472
"""Six layers of hidden size 384, as in all-MiniLM-L6-v2."""

SIX_LAYERS = RunShape(
    layer_count=6,
    values_per_rank=(1536,) * 6,
    head_values=770,
    tokens_per_step=512.0,
    peak_tokens_per_step=1024,
    steps=10,
    bytes_per_value_up=4.0,
    bytes_per_value_down=4.0,
)


def device(
    device_id: str,
    *,
    gflop_per_s: float = 62.0,
    up_bytes_per_s: float = 1e6,
    memory_budget_bytes: float = 8e9,
    examples: int = 100,
) -> DeviceCapacity:
    """A device whose forward and backward cost two operations a weight and token."""
    seconds = 2 * WEIGHTS_PER_LAYER / (gflop_per_s * 1e9)
    return DeviceCapacity(
        device_id=device_id,
        forward_s_per_token_layer=seconds,
        backward_s_per_token_layer=seconds,
        up_bytes_per_s=up_bytes_per_s,
        down_bytes_per_s=1e6,
        round_trip_s=0.05,
        memory_base_bytes=200e6,
        memory_bytes_per_token=50e3,
        memory_bytes_per_token_layer=100e3,
        memory_budget_bytes=memory_budget_bytes,
        examples=examples,
    )


_SPEEDS = st.floats(1e-7, 1e-3)
_RATES = st.floats(1e4, 1e8)


@st.composite
def fleets(draw: st.DrawFn, *, max_devices: int = 6) -> list[DeviceCapacity]:
    """Devices that differ in everything, with ids ``d0``, ``d1``, ..."""
    count = draw(st.integers(1, max_devices))
    return [
        DeviceCapacity(
            device_id=f"d{number}",
            forward_s_per_token_layer=draw(_SPEEDS),
            backward_s_per_token_layer=draw(_SPEEDS),
            up_bytes_per_s=draw(_RATES),
            down_bytes_per_s=draw(_RATES),
            round_trip_s=draw(st.floats(0, 2)),
            memory_base_bytes=draw(st.floats(0, 1e9)),
            memory_bytes_per_token=draw(st.floats(0, 1e5)),
            memory_bytes_per_token_layer=draw(st.floats(0, 1e6)),
            memory_budget_bytes=draw(st.floats(0, 8e9)),
            examples=draw(st.integers(0, 10_000)),
        )
        for number in range(count)
    ]


@st.composite
def shapes(draw: st.DrawFn) -> RunShape:
    """Runs of one to eight layers of unequal size."""
    layer_count = draw(st.integers(1, 8))
    return replace(
        SIX_LAYERS,
        layer_count=layer_count,
        values_per_rank=tuple(
            draw(st.lists(st.integers(1, 5000), min_size=layer_count, max_size=layer_count))
        ),
        head_values=draw(st.integers(0, 5000)),
        steps=draw(st.integers(1, 50)),
    )


D_IN, D_OUT, LABELS = 3, 4, 2
RANKS = (2, 3, 4)
"""Ranks of the global adapter in tests of aggregation."""

Tensors = dict[str, NDArray[np.float32]]


def tensors(seed: int, ranks: tuple[int, ...] = RANKS, *, size: float = 1.0) -> Tensors:
    """Random values with the names of a three-layer model; rank 0 leaves a layer out."""
    generator = np.random.default_rng(seed)

    def drawn(*shape: int) -> NDArray[np.float32]:
        return generator.uniform(-size, size, shape).astype(np.float32)

    values: Tensors = {"head.weight": drawn(LABELS, D_IN), "head.bias": drawn(LABELS)}
    for layer, rank in enumerate(ranks):
        if rank:
            values[f"layers.{layer}.q.lora_A"] = drawn(rank, D_IN)
            values[f"layers.{layer}.q.lora_B"] = drawn(D_OUT, rank)
    return values


@st.composite
def nested_ranks(draw: st.DrawFn) -> tuple[int, ...]:
    """Ranks of a device: a depth, and at most the global rank in every trained layer."""
    depth = draw(st.integers(1, len(RANKS)))
    return tuple(
        draw(st.integers(1, rank)) if layer >= len(RANKS) - depth else 0
        for layer, rank in enumerate(RANKS)
    )


UPDATES = st.lists(
    st.tuples(st.builds(tensors, st.integers(0, 999), nested_ranks()), st.integers(1, 5000)),
    min_size=1,
    max_size=6,
)
"""Updates and the examples behind them."""


def assert_close(
    one: Mapping[str, NDArray[np.float32]],
    other: Mapping[str, NDArray[np.float32]],
    *,
    atol: float = 1e-7,
) -> None:
    """Two adapters are the same but for the rounding of float32."""
    assert one.keys() == other.keys()
    for name, values in one.items():
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, other[name], rtol=1e-6, atol=atol, err_msg=name)
