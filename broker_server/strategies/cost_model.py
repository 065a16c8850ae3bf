"""What a depth costs: seconds, bytes of traffic and bytes of memory.

Everything is a table with one row a device and one column a depth (column 0
is depth 1), so that a fleet is one NumPy expression. Knows no decision.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from broker_server.strategies.strategy import DeviceCapacity, Factors, RunShape


def upload_bytes(
    shape: RunShape, ranks: Sequence[int], *, factors: Factors = "both"
) -> NDArray[np.float64]:
    """Bytes of an update at depth 1..L: the top layers and the head, (L,)."""
    share = {"both": 1.0, "A": 1.0 - shape.b_share, "B": shape.b_share}[factors]
    per_layer = np.array(shape.values_per_rank, dtype=np.float64) * np.array(ranks) * share
    return (np.cumsum(per_layer[::-1]) + shape.head_values) * shape.bytes_per_value_up


def download_bytes(shape: RunShape, ranks: Sequence[int]) -> float:
    """Bytes of the global adapter, which every device loads whole.

    Layers below a device's depth are applied frozen: its features are those
    of the deeper devices, at the price of a download that depth does not shrink.
    """
    values = sum(size * rank for size, rank in zip(shape.values_per_rank, ranks, strict=True))
    return (values + shape.head_values) * shape.bytes_per_value_down


def completion_s(
    shape: RunShape,
    devices: Sequence[DeviceCapacity],
    ranks: Sequence[int],
    *,
    global_ranks: Sequence[int] | None = None,
    factors: Factors = "both",
) -> NDArray[np.float64]:
    """Seconds from assignment to update for every device and depth, (n, L).

    t_i(k) = round trip + down bytes / down rate
           + steps * tokens * (F_i L + mu_i k) + up bytes(k) / up rate     (1)

    Strictly increasing along a row, because every trained layer costs time.

    Args:
        shape: what is the same for every device.
        devices: in the order of the rows.
        ranks: that are trained and sent, at every layer.
        global_ranks: that are loaded, at every layer; None for the same.
        factors: that are sent.

    Source: arXiv:2412.20004, eq. 1 as reconstructed; per token and byte by us.
    """
    down_bytes = download_bytes(shape, ranks if global_ranks is None else global_ranks)
    exchange = _column(devices, "round_trip_s") + down_bytes / _column(devices, "down_bytes_per_s")
    up_bytes = upload_bytes(shape, ranks, factors=factors)
    work = shape.steps * step_s(shape, devices)
    return exchange + work + up_bytes / _column(devices, "up_bytes_per_s")


def step_s(shape: RunShape, devices: Sequence[DeviceCapacity]) -> NDArray[np.float64]:
    """Seconds of one local step for every device and depth, (n, L): T (F_i L + mu_i k)."""
    depth = np.arange(1, shape.layer_count + 1)
    forward = shape.layer_count * _column(devices, "forward_s_per_token_layer")
    backward = _column(devices, "backward_s_per_token_layer") * depth
    return shape.tokens_per_step * (forward + backward)


def memory_bytes(shape: RunShape, devices: Sequence[DeviceCapacity]) -> NDArray[np.float64]:
    """Peak memory of a local step for every device and depth, (n, L).

    memory_i(k) = base + peak tokens * (per token + per token and layer * k)

    The memory side of (4). LoRA weights and their optimiser state count as
    part of the base: they are a few percent of the activations.
    """
    depth = np.arange(1, shape.layer_count + 1)
    per_token = (
        _column(devices, "memory_bytes_per_token")
        + _column(devices, "memory_bytes_per_token_layer") * depth
    )
    return _column(devices, "memory_base_bytes") + shape.peak_tokens_per_step * per_token


def mean_waiting_s(completion: NDArray[np.float64]) -> float:
    """Average time that devices wait for the slowest of the round.

    W = (1/n) sum_i (max_j t_j - t_i)     (2)

    Args:
        completion: t_i in seconds, (n,), not empty.

    Source: arXiv:2412.20004, eq. 2 as reconstructed.
    """
    return float(completion.max() - completion.mean())


def _column(devices: Sequence[DeviceCapacity], name: str) -> NDArray[np.float64]:
    values = map(operator.attrgetter(name), devices)
    return np.fromiter(values, dtype=np.float64, count=len(devices))[:, np.newaxis]
