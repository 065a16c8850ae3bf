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
from wire_protocol.lora import QUANTISED_KEPT, QUANTISED_WORK

BELIEVED_WATTS = 20.0
"""Between the boards of one fleet lies no more than this, either way."""


def upload_bytes(
    shape: RunShape, ranks: Sequence[int], *, factors: Factors = "both"
) -> NDArray[np.float64]:
    """Bytes of an update at depth 1..L: the top layers and the head, (L,)."""
    share = {"both": 1.0, "A": 1.0 - shape.b_share, "B": shape.b_share}[factors]
    per_layer = np.array(shape.values_per_rank, dtype=np.float64) * np.array(ranks) * share
    return (np.cumsum(per_layer[::-1]) + shape.head_values) * shape.bytes_per_value_up


def download_bytes(
    shape: RunShape, devices: Sequence[DeviceCapacity], ranks: Sequence[int]
) -> NDArray[np.float64]:
    """Bytes that devices load at depth 1..L, (n, L).

    With a synced prefix the whole global adapter: layers below a device's depth
    are applied frozen, so its features are those of the deeper devices, at the
    price of a download that depth does not shrink. With a kept one the trained
    layers, and once the snapshot of the others if there is one.
    """
    per_layer = np.array(shape.values_per_rank, dtype=np.float64) * np.array(ranks)
    top = np.cumsum(per_layer[::-1]) + shape.head_values
    whole = np.broadcast_to(top[-1], (len(devices), shape.layer_count))
    if shape.prefix.is_kept:
        cold = _column(devices, "warm_depth") == 0
        whole = np.where(cold & (shape.prefix.mode == "periodic"), whole, top)
    return whole * shape.bytes_per_value_down


def prefix_layers(shape: RunShape, devices: Sequence[DeviceCapacity]) -> NDArray[np.float64]:
    """Frozen layers that a visit of an example computes on average, depth 1..L, (n, L).

    All L - k without a cache. With one, an example is computed on its first visit
    only, and what the device has cached for a deeper training begins there:

        (u / v) ((1 - c / n) (L - k) + (c / n) (k_warm - k))

    for v visits to n examples in a round, u = min(n, v) first ones, c of them cached.
    """
    depth = np.arange(1, shape.layer_count + 1, dtype=np.float64)
    frozen = np.broadcast_to(shape.layer_count - depth, (len(devices), shape.layer_count))
    if not shape.prefix.is_kept:
        return frozen
    examples = np.maximum(_column(devices, "examples"), 1.0)
    visits = float(shape.steps * shape.batch_size)
    warm_depth = _column(devices, "warm_depth")
    held = np.minimum(_column(devices, "warm_examples") / examples, 1.0)
    held = np.where(depth <= warm_depth, held, 0.0)
    first = np.minimum(examples, visits) / visits
    between = np.maximum(warm_depth - depth, 0.0)
    saved: NDArray[np.float64] = first * ((1.0 - held) * frozen + held * between)
    return saved


def completion_s(
    shape: RunShape,
    devices: Sequence[DeviceCapacity],
    ranks: Sequence[int],
    *,
    global_ranks: Sequence[int] | None = None,
    factors: Factors = "both",
    quantise: bool = False,
) -> NDArray[np.float64]:
    """Seconds from assignment to update for every device and depth, (n, L).

    t_i(k) = round trip + down bytes(k) / down rate
           + steps * tokens * (F_i (k + frozen(k)) + mu_i k) + up bytes(k) / up rate   (1)

    Strictly increasing along a row, because every trained layer costs time.

    Args:
        shape: what is the same for every device.
        devices: in the order of the rows.
        ranks: that are trained and sent, at every layer.
        global_ranks: that are loaded, at every layer; None for the same.
        factors: that are sent.
        quantise: see ``step_s``.

    Source: arXiv:2412.20004, eq. 1 as reconstructed; per token and byte by us.
    """
    loaded = ranks if global_ranks is None else global_ranks
    down_bytes = download_bytes(shape, devices, loaded)
    exchange = _column(devices, "round_trip_s") + down_bytes / _column(devices, "down_bytes_per_s")
    up_bytes = upload_bytes(shape, ranks, factors=factors)
    work = shape.steps * step_s(shape, devices, quantise=quantise)
    return exchange + work + up_bytes / _column(devices, "up_bytes_per_s")


def step_s(
    shape: RunShape, devices: Sequence[DeviceCapacity], *, quantise: bool = False
) -> NDArray[np.float64]:
    """Seconds of one local step for every device and depth, (n, L).

    T (F_i (k + frozen(k)) + mu_i k); see ``prefix_layers``.

    Args:
        shape: what is the same for every device.
        devices: in the order of the rows.
        quantise: as many layers as memory asks for keep their activations in eight
            bits, each at ``QUANTISED_WORK`` of its forward pass.
    """
    depth = np.arange(1, shape.layer_count + 1)
    layers = depth + prefix_layers(shape, devices)
    if quantise:
        layers = layers + QUANTISED_WORK * layers_to_quantise(shape, devices)
    forward = layers * _column(devices, "forward_s_per_token_layer")
    backward = _column(devices, "backward_s_per_token_layer") * depth
    return shape.tokens_per_step * (forward + backward)


def training_watts(devices: Sequence[DeviceCapacity]) -> NDArray[np.float64]:
    """Power of every device while it trains, (n, 1).

    One that is not known has the median of those that are, or 1 W, so that joules
    are at least seconds; one that is ``BELIEVED_WATTS`` times off is not believed.
    """
    watts = _column(devices, "training_watts")
    known = watts[watts > 0]
    usual = float(np.median(known)) if len(known) else 1.0
    return np.clip(
        np.where(watts > 0, watts, usual), usual / BELIEVED_WATTS, usual * BELIEVED_WATTS
    )


def layers_to_quantise(shape: RunShape, devices: Sequence[DeviceCapacity]) -> NDArray[np.int64]:
    """Fewest layers to quantise so that a depth fits into memory, (n, L).

    All k of them where even that is not enough. The last of them spares
    nothing, see ``wire_protocol.lora.kept_layers``.

    Source: FedQuad, arXiv:2506.01001: depth and quantised layers chosen greedily
    under memory; that the fewest are best follows from our costs.
    """
    depth = np.arange(1, shape.layer_count + 1)
    budget = _column(devices, "memory_budget_bytes")
    per_layer = _column(devices, "memory_bytes_per_token_layer") * (1.0 - QUANTISED_KEPT)
    excess = memory_bytes(shape, devices) - budget
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        spared = np.ceil(excess / (shape.peak_tokens_per_step * per_layer))
    needed = np.where(excess > 0, np.minimum(spared + 1.0, depth), 0.0).astype(np.int64)
    # The division may have been rounded down to one layer too few.
    short = memory_bytes(shape, devices, quantised=needed) > budget
    return np.where(short, np.minimum(needed + 1, depth), needed)


def quantised_layers(
    shape: RunShape,
    devices: Sequence[DeviceCapacity],
    depths: NDArray[np.int64],
    *,
    quantise: bool,
) -> list[int]:
    """How many layers each device quantises at its depth; none unless ``quantise``."""
    if not quantise:
        return [0] * len(devices)
    chosen: list[int] = layers_to_quantise(shape, devices)[
        np.arange(len(devices)), depths - 1
    ].tolist()
    return chosen


def memory_bytes(
    shape: RunShape,
    devices: Sequence[DeviceCapacity],
    *,
    quantised: NDArray[np.int64] | None = None,
) -> NDArray[np.float64]:
    """Peak memory of a local step for every device and depth, (n, L).

    memory_i(k) = base + peak tokens * (per token + per token and layer * kept(k))

    The memory side of (4); ``kept`` is k, or less with ``quantised`` layers, (n, L).
    LoRA weights and their optimiser state count as part of the base: they are a few
    percent of the activations.
    """
    kept = np.arange(1, shape.layer_count + 1, dtype=np.float64)
    if quantised is not None:
        kept = kept - (1.0 - QUANTISED_KEPT) * np.maximum(quantised - 1, 0)
    per_token = (
        _column(devices, "memory_bytes_per_token")
        + _column(devices, "memory_bytes_per_token_layer") * kept
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
