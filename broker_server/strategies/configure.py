"""Parts of configuring: rank distribution, greedy depth, repair.

Ties LoRA configs to the cost model; knows no paper's choice of parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from broker_server.strategies.cohort import able_cohort
from broker_server.strategies.cost_model import completion_s, mean_waiting_s, quantised_layers
from broker_server.strategies.strategy import (
    Configuration,
    DeviceCapacity,
    Factors,
    Plan,
    RunShape,
)
from wire_protocol.errors import ConfigError
from wire_protocol.lora import MAX_RANK, LoraConfig


@dataclass(frozen=True)
class WaitingLimit:
    """W_max: the most mean waiting time that a round may have.

    Attributes:
        seconds: None for no limit of this kind.
        share: of the round's length; None for no limit of this kind.
    """

    seconds: float | None = None
    share: float | None = None

    def allowed_s(self, round_s: NDArray[np.float64]) -> NDArray[np.float64]:
        """Allowed mean waiting time of rounds of these lengths."""
        absolute = math.inf if self.seconds is None else self.seconds
        relative = math.inf if self.share is None else self.share
        return np.minimum(absolute, relative * round_s)


NO_LIMIT = WaitingLimit()


def rank_distribution(
    layer_count: int, *, rank_min: int, rank_step: float, rank_budget: int | None = None
) -> tuple[int, ...]:
    """Ranks that grow by the same step from the input to the output.

    r_l = r_0 + lambda * l, rounded. Above the budget, what exceeds rank 1 is
    scaled, which keeps the sequence arithmetic; rounding losses go to the output.

    Args:
        layer_count: L.
        rank_min: r_0, rank of the layer nearest the input, at least 1.
        rank_step: lambda, not negative.
        rank_budget: most units of rank over all layers.

    Raises:
        ConfigError: the budget is below rank 1 a layer, or a rank is too large.

    Source: arXiv:2412.20004, rank distribution (arithmetic, as reconstructed).
    """
    ranks = [math.floor(rank_min + rank_step * layer + 0.5) for layer in range(layer_count)]
    if rank_budget is not None and rank_budget < layer_count:
        raise ConfigError(
            f"rank_budget {rank_budget} is below rank 1 for each of {layer_count} layers; raise it"
        )
    if rank_budget is not None and rank_budget < sum(ranks):
        spare, excess = rank_budget - layer_count, sum(ranks) - layer_count
        ranks = [1 + spare * (rank - 1) // excess for rank in ranks]
        left = rank_budget - sum(ranks)
        ranks = [rank + (layer >= layer_count - left) for layer, rank in enumerate(ranks)]
    if ranks[-1] > MAX_RANK:
        raise ConfigError(
            f"rank {ranks[-1]} at the output exceeds {MAX_RANK}; lower rank_min or rank_step"
        )
    return tuple(ranks)


def greedy_depths(
    completion: NDArray[np.float64],
    caps: NDArray[np.int64],
    *,
    depth_min: int,
    pace_s: float,
) -> NDArray[np.int64]:
    """Deepen every device while it keeps the pace: while t_i(k+1) <= pace, k += 1.

    Args:
        completion: t_i(k), (n, L), increasing along a row, which is why
            counting replaces the loop.
        caps: kmax_i, (n,), none below ``depth_min``.
        depth_min: k_min, the depth of a device that cannot keep the pace.
        pace_s: T_ref.

    Returns:
        Depth of each device, (n,).

    Source: arXiv:2412.20004, greedy LCD algorithm, step 3 as reconstructed.
    """
    in_time: NDArray[np.int64] = np.count_nonzero(completion <= pace_s, axis=1)
    return np.minimum(np.maximum(in_time, depth_min), caps)


def greedy_pace(
    completion: NDArray[np.float64],
    caps: NDArray[np.int64],
    *,
    depth_min: int,
    examples: NDArray[np.float64],
    limit: WaitingLimit = NO_LIMIT,
) -> float:
    """T_ref: the slowest device at its smallest depth, repaired for W_max.

    Args:
        completion: t_i(k), (n, L).
        caps: kmax_i, (n,), none below ``depth_min``.
        depth_min: k_min.
        examples: of each device, (n,).
        limit: W_max.

    Returns:
        Seconds; the round's predicted length.

    Source: arXiv:2412.20004, greedy LCD algorithm, steps 3 and 4 as
    reconstructed.
    """
    slowest = float(completion[:, depth_min - 1].max())
    depths = greedy_depths(completion, caps, depth_min=depth_min, pace_s=slowest)
    waiting_s = mean_waiting_s(completion[np.arange(len(depths)), depths - 1])
    if waiting_s <= limit.allowed_s(np.array(slowest)):
        return slowest
    return _repaired_pace(completion, caps, depth_min=depth_min, examples=examples, limit=limit)


def _repaired_pace(
    completion: NDArray[np.float64],
    caps: NDArray[np.int64],
    *,
    depth_min: int,
    examples: NDArray[np.float64],
    limit: WaitingLimit,
) -> float:
    """Of all t_i(k), the pace with the most coverage per second that respects the limit.

    If none does, the one with the least waiting. Coverage counts the trained
    (example, layer) pairs. Paces below the slowest device at ``depth_min`` are
    not tried: it cannot follow, so they only make the others shallower and let
    them wait longer. O(n L log nL): every further layer of a device is one
    event at the pace that admits it, and running sums over the sorted events
    give waiting and coverage of every pace.
    """
    begin = completion[:, depth_min - 1]
    reachable = np.arange(depth_min + 1, completion.shape[1] + 1) <= caps[:, np.newaxis]
    times = completion[:, depth_min:][reachable]
    order = np.argsort(times, kind="stable")
    times = times[order]
    added_s = np.diff(completion[:, depth_min - 1 :], axis=1)[reachable][order]
    added_examples = np.broadcast_to(examples[:, np.newaxis], reachable.shape)[reachable][order]
    slowest = begin.max()
    paces = np.concatenate([[slowest], np.unique(times[times > slowest])])
    events = np.searchsorted(times, paces, side="right")
    total_s = begin.sum() + np.concatenate([[0.0], np.cumsum(added_s)])[events]
    covered = np.concatenate([[0.0], np.cumsum(added_examples)])[events]
    covered += examples.sum() * depth_min
    waiting_s = paces - total_s / len(begin)
    allowed = waiting_s <= limit.allowed_s(paces)
    if allowed.any():
        return float(paces[np.argmax(np.where(allowed, covered / paces, -math.inf))])
    return float(paces[np.argmin(waiting_s)])


def lora_configuration(
    shape: RunShape,
    devices: Sequence[DeviceCapacity],
    *,
    ranks: tuple[int, ...],
    depth_min: int,
    limit: WaitingLimit = NO_LIMIT,
    factors: Factors = "both",
    quantise: bool = False,
) -> Configuration:
    """Greedy LoRA configuration of a cohort, in O(n L log nL).

    Args:
        shape: what is the same for every device.
        devices: the cohort in any order, each device once.
        ranks: of the global adapter, at every layer.
        depth_min: k_min, 1..L; L itself gives every device full depth.
        limit: W_max.
        factors: what every device trains.
        quantise: a device whose memory is too small for a depth quantises
            activations, of no more layers than it has to.

    Raises:
        ValueError: a device is listed twice.

    Source: arXiv:2412.20004, greedy LCD algorithm as reconstructed.
    """
    cohort = able_cohort(shape, devices, depth_min=depth_min, quantise=quantise)
    caps = cohort.caps
    if not cohort.devices:
        return Configuration({}, ranks, cohort.refused)
    times = completion_s(shape, cohort.devices, ranks, factors=factors, quantise=quantise)
    pace_s = greedy_pace(times, caps, depth_min=depth_min, examples=cohort.examples, limit=limit)
    depths = greedy_depths(times, caps, depth_min=depth_min, pace_s=pace_s)
    chosen = np.arange(len(depths)), depths - 1
    quantised = quantised_layers(shape, cohort.devices, depths, quantise=quantise)
    configs = {int(depth): LoraConfig.top(int(depth), ranks) for depth in np.unique(depths)}
    plans = {
        device.device_id: Plan(configs[depth], shape.steps, seconds, factors, layers)
        for device, depth, seconds, layers in zip(
            cohort.devices, depths.tolist(), times[chosen].tolist(), quantised, strict=True
        )
    }
    return Configuration(plans, ranks, cohort.refused)


def same_configuration(
    shape: RunShape,
    devices: Sequence[DeviceCapacity],
    *,
    lora: LoraConfig,
    global_ranks: tuple[int, ...],
    factors: Factors = "both",
) -> Configuration:
    """One LoRA config for the whole cohort, with no regard to speed.

    Args:
        shape: what is the same for every device.
        devices: the cohort in any order, each device once.
        lora: what every device trains; its ranks at most ``global_ranks``.
        global_ranks: of the global adapter, at every layer.
        factors: what every device trains of it.

    Raises:
        ValueError: a device is listed twice.
    """
    cohort = able_cohort(shape, devices, depth_min=lora.depth)
    # Frozen layers are loaded as they are, and trained ones with the ranks that are trained.
    loaded = [mine or whole for mine, whole in zip(lora.ranks, global_ranks, strict=True)]
    times = completion_s(shape, cohort.devices, lora.ranks, global_ranks=loaded, factors=factors)
    plans = {
        device.device_id: Plan(lora, shape.steps, seconds, factors)
        for device, seconds in zip(cohort.devices, times[:, lora.depth - 1].tolist(), strict=True)
    }
    return Configuration(plans, global_ranks, cohort.refused)
