"""FFA-LoRA and RoLoRA: FedLoRA that trains one factor at a time.

With the other factor frozen and equal everywhere, the mean of factors is the
mean of products. Both are FedLoRA's parts with a factor schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from broker_server.strategies.aggregate import HolderMean
from broker_server.strategies.capacity import DEFAULT_RHO
from broker_server.strategies.configure import same_configuration
from broker_server.strategies.factors import ALLOWED, FactorSchedule, factors_in
from broker_server.strategies.strategy import Adapter, Configuration, DeviceCapacity, RunShape
from wire_protocol.lora import LoraConfig


@dataclass(frozen=True)
class OneFactorLora:
    """Every layer on every device with one rank, one factor at a time.

    Attributes:
        rank: of every layer on every device.
        schedule: ``B`` (FFA-LoRA) or ``alternating`` (RoLoRA).
        rho: weight of the past in the capacity estimates behind ``predicted_s``.

    Source: FFA-LoRA, arXiv:2403.12313; RoLoRA, arXiv:2502.01755.
    """

    rank: int = 8
    schedule: FactorSchedule = "alternating"
    rho: float = DEFAULT_RHO

    def global_ranks(self, shape: RunShape) -> tuple[int, ...]:
        """The same rank at every layer."""
        return (self.rank,) * shape.layer_count

    def configure(
        self, shape: RunShape, devices: Sequence[DeviceCapacity], round_number: int
    ) -> Configuration:
        """Full depth for all, with the factor of the round."""
        ranks = self.global_ranks(shape)
        return same_configuration(
            shape,
            devices,
            lora=LoraConfig(ranks),
            global_ranks=ranks,
            factors=factors_in(self.schedule, round_number),
        )

    def begin(self, global_adapter: Adapter) -> HolderMean:
        """FedAvg; refuses updates with a factor that should have been frozen."""
        return HolderMean(global_adapter, allowed=ALLOWED[self.schedule])


def ffa_lora(rank: int = 8) -> OneFactorLora:
    """FFA-LoRA: A stays as it was drawn."""
    return OneFactorLora(rank, "B")


def ro_lora(rank: int = 8) -> OneFactorLora:
    """RoLoRA: B in odd rounds, A in even ones."""
    return OneFactorLora(rank, "alternating")
