"""Ranks by capability: every device trains all layers, fast devices with higher ranks.

Knows tiers; knows no aggregation. A device gets the first rows of the global
adapter, which has the highest rank everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from broker_server.strategies.cohort import able_cohort
from broker_server.strategies.cost_model import completion_s
from broker_server.strategies.strategy import Configuration, DeviceCapacity, Plan, RunShape
from wire_protocol.errors import ConfigError
from wire_protocol.lora import LoraConfig


@dataclass(frozen=True)
class RankTiers:
    """Ranks from ``rank_min`` to ``rank_max``, in equal ratios.

    Attributes:
        rank_min: of the slowest tier.
        rank_max: of the fastest tier, and of the global adapter.
        tiers: number of tiers.

    Raises:
        ConfigError: the smallest rank exceeds the largest.
    """

    rank_min: int
    rank_max: int
    tiers: int

    def __post_init__(self) -> None:
        if self.rank_min > self.rank_max:
            raise ConfigError(
                f"rank_min {self.rank_min} exceeds rank_max {self.rank_max}; swap them"
            )

    def ranks(self) -> tuple[int, ...]:
        """Rank of every tier, the fastest first."""
        exact = np.geomspace(self.rank_max, self.rank_min, self.tiers)
        return tuple(int(rank) for rank in np.rint(exact))


def tiered_configuration(
    shape: RunShape,
    devices: Sequence[DeviceCapacity],
    tiers: RankTiers,
    *,
    allowed: Callable[[str, int], int] = lambda _device, rank: rank,
) -> Configuration:
    """Full depth for all, with the rank of the device's tier.

    The tier follows from the predicted completion time at ``rank_max``: with
    three tiers the fastest third of the times is the first. Equal times are in
    the same tier, whatever the number of devices.

    Args:
        shape: what is the same for every device.
        devices: the cohort in any order, each device once.
        tiers: ranks to give.
        allowed: what a device may have of its tier's rank.

    Raises:
        ValueError: a device is listed twice.

    Source: HetLoRA (arXiv:2401.06432) and FlexLoRA (arXiv:2402.11505) give ranks by
    resources; tiers of predicted time by us.
    """
    layers = shape.layer_count
    global_ranks = (tiers.rank_max,) * layers
    cohort = able_cohort(shape, devices, depth_min=layers)
    if not cohort.devices:
        return Configuration({}, global_ranks, cohort.refused)
    at_most = completion_s(shape, cohort.devices, global_ranks)[:, -1]
    tier = _tier_of(at_most, tiers.tiers)
    of_tier = np.array(tiers.ranks())[tier].tolist()
    ranks = np.array(
        [allowed(one.device_id, rank) for one, rank in zip(cohort.devices, of_tier, strict=True)]
    )
    plans: dict[str, Plan] = {}
    for rank in np.unique(ranks).tolist():
        config = LoraConfig((rank,) * layers)
        members = [cohort.devices[row] for row in np.flatnonzero(ranks == rank).tolist()]
        # Adapters are kept at the ranks of the tiers; who trains fewer loads the next larger.
        loaded = (min(one for one in tiers.ranks() if one >= rank),) * layers
        times = completion_s(shape, members, config.ranks, global_ranks=loaded)[:, -1]
        for device, seconds in zip(members, times.tolist(), strict=True):
            plans[device.device_id] = Plan(config, shape.steps, seconds)
    return Configuration(plans, global_ranks, cohort.refused)


def _tier_of(times: NDArray[np.float64], tiers: int) -> NDArray[np.int64]:
    """Tier of every time, (n,); 0 for the fastest."""
    # Order statistics, not interpolated quantiles: equal times must stay in one tier.
    cuts = np.sort(times)[[-(-len(times) * tier // tiers) - 1 for tier in range(1, tiers)]]
    return np.searchsorted(cuts, times, side="left")
