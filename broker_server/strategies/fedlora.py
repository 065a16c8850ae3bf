"""FedLoRA (FedIT): every device trains every layer with one rank; plain averaging.

A preset of the parts that LEGEND is made of, so that the two differ in
their configuration alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from broker_server.strategies.aggregate import HolderMean
from broker_server.strategies.capacity import DEFAULT_RHO
from broker_server.strategies.configure import lora_configuration
from broker_server.strategies.options import integer
from broker_server.strategies.strategy import Adapter, Configuration, DeviceCapacity, RunShape
from wire_protocol.lora import MAX_RANK

FEDLORA_OPTIONS = {"rank": integer(1, MAX_RANK)}


@dataclass(frozen=True)
class FedLora:
    """Federated averaging of LoRA factors, weighted by examples.

    Attributes:
        rank: of every layer on every device.
        rho: weight of the past in the capacity estimates behind ``predicted_s``.

    Source: FedIT, arXiv:2305.05644; the baseline of arXiv:2412.20004.
    """

    rank: int = 8
    rho: float = DEFAULT_RHO

    def global_ranks(self, shape: RunShape) -> tuple[int, ...]:
        """The same rank at every layer."""
        return (self.rank,) * shape.layer_count

    def configure(
        self,
        shape: RunShape,
        devices: Sequence[DeviceCapacity],
        round_number: int,  # noqa: ARG002 - part of the interface; every round is the same
    ) -> Configuration:
        """Full depth for all; who cannot hold it in memory is refused."""
        return lora_configuration(
            shape, devices, ranks=self.global_ranks(shape), depth_min=shape.layer_count
        )

    def begin(self, global_adapter: Adapter) -> HolderMean:
        """FedAvg: when all hold every row, the mean over holders is the mean over all."""
        return HolderMean(global_adapter)
