"""HetLoRA and FlexLoRA: ranks by capability, and two ways to put them together.

The two differ in aggregation alone: HetLoRA pads factors with zeros and weights
them by the norm of their product, FlexLoRA averages products and cuts the mean
to each rank by SVD.

Left out of HetLoRA: the penalty on the tail of a device's ranks and the
self-pruning that follows from it. Both are the device's work, and our devices
train the ranks that they are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from broker_server.strategies.capacity import DEFAULT_RHO
from broker_server.strategies.norm_mean import NormWeightedMean
from broker_server.strategies.options import integer
from broker_server.strategies.product_mean import ProductMean
from broker_server.strategies.strategy import (
    Adapter,
    Aggregation,
    Configuration,
    DeviceCapacity,
    RunShape,
)
from broker_server.strategies.tiers import RankTiers, tiered_configuration
from wire_protocol.lora import MAX_RANK

TIERED_OPTIONS = {
    "rank_min": integer(1, MAX_RANK),
    "rank_max": integer(1, MAX_RANK),
    "tiers": integer(1, 16),
}


@dataclass(frozen=True)
class TieredLora:
    """Every device trains all layers, with the rank of its tier.

    Attributes:
        rank_min: of the slowest tier.
        rank_max: of the fastest tier and of the global adapter.
        tiers: number of tiers between them.
        aggregation: ``norms`` (HetLoRA) or ``products`` (FlexLoRA).
        rho: weight of the past in the capacity estimates behind the tiers.

    Raises:
        ConfigError: ``rank_min`` exceeds ``rank_max``.

    Source: HetLoRA, arXiv:2401.06432, a baseline of arXiv:2412.20004;
    FlexLoRA, arXiv:2402.11505.
    """

    rank_min: int = 4
    rank_max: int = 16
    tiers: int = 3
    aggregation: Literal["norms", "products"] = "norms"
    rho: float = DEFAULT_RHO

    def __post_init__(self) -> None:
        self._tiers()

    def global_ranks(self, shape: RunShape) -> tuple[int, ...]:
        """The largest rank at every layer."""
        return (self.rank_max,) * shape.layer_count

    @property
    def narrow_ranks(self) -> tuple[int, ...]:
        """Those of the slower tiers."""
        return tuple(sorted(set(self._tiers().ranks()) - {self.rank_max}))

    def configure(
        self,
        shape: RunShape,
        devices: Sequence[DeviceCapacity],
        round_number: int,  # noqa: ARG002 - part of the interface; every round is the same
    ) -> Configuration:
        """Full depth for all, ranks by tier; who cannot hold full depth is refused."""
        return tiered_configuration(shape, devices, self._tiers())

    def begin(self, global_adapter: Adapter) -> Aggregation:
        """Norm-weighted factors, or the SVD of the mean product."""
        if self.aggregation == "norms":
            return NormWeightedMean(global_adapter)
        return ProductMean(global_adapter)

    def _tiers(self) -> RankTiers:
        return RankTiers(self.rank_min, self.rank_max, self.tiers)


def het_lora(rank_min: int = 4, rank_max: int = 16, tiers: int = 3) -> TieredLora:
    """HetLoRA, without self-pruning.

    Raises:
        ConfigError: ``rank_min`` exceeds ``rank_max``.
    """
    return TieredLora(rank_min, rank_max, tiers, "norms")


def flex_lora(rank_min: int = 4, rank_max: int = 16, tiers: int = 3) -> TieredLora:
    """FlexLoRA.

    Raises:
        ConfigError: ``rank_min`` exceeds ``rank_max``.
    """
    return TieredLora(rank_min, rank_max, tiers, "products")
