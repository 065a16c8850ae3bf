"""Devices and run shapes for tests of the strategies."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

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
