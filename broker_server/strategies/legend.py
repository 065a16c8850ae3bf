"""LEGEND: depth by capacity, rank by layer, mean over holders.

A preset of parts: arithmetic rank distribution, greedy LoRA configuration,
adaptive per-layer aggregation. Knows the choice of parts and their parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from broker_server.strategies.aggregate import HolderMean
from broker_server.strategies.capacity import DEFAULT_RHO
from broker_server.strategies.configure import (
    WaitingLimit,
    lora_configuration,
    rank_distribution,
)
from broker_server.strategies.options import choice, integer, number, optional
from broker_server.strategies.strategy import Adapter, Configuration, DeviceCapacity, RunShape
from wire_protocol.errors import ConfigError
from wire_protocol.lora import MAX_RANK

LEGEND_OPTIONS = {
    "rank_min": integer(1, MAX_RANK),
    "rank_step": number(0, MAX_RANK),
    "rank_budget": optional(integer(1)),
    "depth_min": optional(integer(1)),
    "waiting_max_s": optional(number(0)),
    "waiting_max_share": optional(number(0, 1)),
    "rho": number(0, 1),
    "weighting": choice("examples", "uniform"),
    "server_learning_rate": number(0, low_included=False),
}


@dataclass(frozen=True)
class Legend:
    """LEGEND with its parameters.

    Attributes:
        rank_min: r_0, rank of the layer nearest the input.
        rank_step: lambda, ranks added per layer toward the output.
        rank_budget: most units of rank over all layers; None for no limit.
        depth_min: k_min, smallest depth of a device; None for a quarter of
            the layers: the slowest device sets the pace at this depth, so it
            is what a uniform fleet trains.
        waiting_max_s: W_max in seconds; None for no limit.
        waiting_max_share: W_max as a share of the round; None for no limit.
        rho: weight of the past in capacity estimates.
        weighting: ``examples`` or ``uniform``, p_i of the aggregation.
        server_learning_rate: eta; 1 is the paper's plain mean.

    Raises:
        ConfigError: two waiting limits at once.

    Source: arXiv:2412.20004.
    """

    rank_min: int = 4
    rank_step: float = 1.0
    rank_budget: int | None = None
    depth_min: int | None = None
    waiting_max_s: float | None = None
    waiting_max_share: float | None = None
    rho: float = DEFAULT_RHO
    weighting: str = "examples"
    server_learning_rate: float = 1.0

    def __post_init__(self) -> None:
        if self.waiting_max_s is not None and self.waiting_max_share is not None:
            raise ConfigError(
                "give waiting_max_s or waiting_max_share of strategy legend, not both"
            )

    def global_ranks(self, shape: RunShape) -> tuple[int, ...]:
        """Arithmetic ranks, highest at the output.

        Raises:
            ConfigError: the budget or a rank does not fit the base model.
        """
        return rank_distribution(
            shape.layer_count,
            rank_min=self.rank_min,
            rank_step=self.rank_step,
            rank_budget=self.rank_budget,
        )

    def configure(
        self,
        shape: RunShape,
        devices: Sequence[DeviceCapacity],
        round_number: int,  # noqa: ARG002 - part of the interface; LEGEND looks at capacity alone
    ) -> Configuration:
        """Greedy LoRA configuration at the pace of the slowest device.

        Raises:
            ConfigError: ``depth_min`` or a rank does not fit the base model.
        """
        return lora_configuration(
            shape,
            devices,
            ranks=self.global_ranks(shape),
            depth_min=self._smallest_depth(shape.layer_count),
            limit=WaitingLimit(self.waiting_max_s, self.waiting_max_share),
        )

    def begin(self, global_adapter: Adapter) -> HolderMean:
        """Mean over the holders of each rank row."""
        return HolderMean(
            global_adapter,
            uniform=self.weighting == "uniform",
            learning_rate=self.server_learning_rate,
        )

    def _smallest_depth(self, layer_count: int) -> int:
        if self.depth_min is None:
            return -(-layer_count // 4)
        if self.depth_min > layer_count:
            raise ConfigError(
                f"depth_min {self.depth_min} exceeds the {layer_count} layers of the base model"
            )
        return self.depth_min
