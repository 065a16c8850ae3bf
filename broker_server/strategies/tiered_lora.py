"""HetLoRA and FlexLoRA: ranks by capability, and two ways to put them together.

The two differ in aggregation alone: HetLoRA pads factors with zeros and weights
them by the norm of their product, FlexLoRA averages products and cuts the mean
to each rank by SVD.

HetLoRA's devices also train with a penalty on their last ranks, and those whose
last ranks shrink get fewer from then on (``self_pruning``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from broker_server.strategies.capacity import DEFAULT_RHO
from broker_server.strategies.norm_mean import NormWeightedMean
from broker_server.strategies.options import integer, number, optional, share
from broker_server.strategies.product_mean import ProductMean
from broker_server.strategies.self_pruning import SelfPruning
from broker_server.strategies.strategy import (
    Adapter,
    Aggregation,
    Configuration,
    DeviceCapacity,
    RunShape,
)
from broker_server.strategies.tiers import RankTiers, tiered_configuration
from wire_protocol.lora import MAX_RANK, TailRule

TIERED_OPTIONS = {
    "rank_min": integer(1, MAX_RANK),
    "rank_max": integer(1, MAX_RANK),
    "tiers": integer(1, 16),
}

HETLORA_OPTIONS = {
    **TIERED_OPTIONS,
    "keep_share": optional(share(below_one=True)),
    "tail_weight": number(0),
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
        keep_share: gamma of self-pruning; None prunes nobody.
        tail_weight: lambda, weight of the last ranks in a device's loss.

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
    keep_share: float | None = None
    tail_weight: float = 0.0
    _pruning: SelfPruning | None = field(default=None, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        self._tiers()
        if self.keep_share is not None:
            pruning = SelfPruning(self.keep_share, self.rank_min)
            object.__setattr__(self, "_pruning", pruning)

    @property
    def tail(self) -> TailRule | None:
        """See ``ShrinksTails.tail``."""
        return TailRule(self.keep_share, self.tail_weight) if self.keep_share else None

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
        if self._pruning is None:
            return tiered_configuration(shape, devices, self._tiers())
        return tiered_configuration(shape, devices, self._tiers(), allowed=self._pruning.allowed)

    def begin(self, global_adapter: Adapter) -> Aggregation:
        """Norm-weighted factors, or the SVD of the mean product."""
        if self.aggregation == "norms":
            return NormWeightedMean(global_adapter, self._pruning)
        return ProductMean(global_adapter)

    def state(self) -> dict[str, NDArray[np.float32]]:
        """How often devices were pruned."""
        return self._pruning.state() if self._pruning else {}

    def restore(self, state: Mapping[str, NDArray[np.float32]]) -> None:
        """See ``KeepsState.restore``."""
        if self._pruning:
            self._pruning.restore(state)

    def _tiers(self) -> RankTiers:
        return RankTiers(self.rank_min, self.rank_max, self.tiers)


def het_lora(
    rank_min: int = 4,
    rank_max: int = 16,
    tiers: int = 3,
    keep_share: float | None = 0.99,
    tail_weight: float = 1e-3,
) -> TieredLora:
    """HetLoRA.

    Raises:
        ConfigError: ``rank_min`` exceeds ``rank_max``.
    """
    return TieredLora(
        rank_min, rank_max, tiers, "norms", keep_share=keep_share, tail_weight=tail_weight
    )


def flex_lora(rank_min: int = 4, rank_max: int = 16, tiers: int = 3) -> TieredLora:
    """FlexLoRA.

    Raises:
        ConfigError: ``rank_min`` exceeds ``rank_max``.
    """
    return TieredLora(rank_min, rank_max, tiers, "products")
