"""What goes into a strategy and what comes out: two verbs, configure and aggregate.

Knows the values that both verbs speak; knows no paper and no transport.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from broker_server.strategies.prefix import SYNCED, PrefixRule
from wire_protocol.lora import LoraConfig, TailRule

Adapter = Mapping[str, NDArray[np.float32]]
"""LoRA and head tensors by our names (see ``wire_protocol.model_family``), float32."""

Factors = Literal["both", "A", "B"]
"""Which LoRA factors a device trains and sends; the other stays as it was sent to it."""


@dataclass(frozen=True)
class DeviceCapacity:
    """What one device can do with the run's base model, by measurement.

    Attributes:
        forward_s_per_token_layer: F_i / L per token, every layer of the model.
        backward_s_per_token_layer: mu_i per token, one trained layer.
        round_trip_s: what an exchange costs beside its bytes.
        memory_base_bytes: the process with the model, before any token.
        memory_bytes_per_token: activations that every token needs.
        memory_bytes_per_token_layer: activations kept per token and trained layer.
        memory_budget_bytes: M_i, what training may use.
        examples: size of the local dataset of this run.
        warm_depth: deepest training whose frozen layers' output the device has
            cached; 0 for none.
        warm_examples: that are cached.
        training_watts: power while it trains; 0 where that is not known.

    Raises:
        ValueError: a speed that is not positive, or a value that is negative
            or not finite.

    Source: arXiv:2412.20004, capacity estimation.
    """

    device_id: str
    forward_s_per_token_layer: float
    backward_s_per_token_layer: float
    up_bytes_per_s: float
    down_bytes_per_s: float
    round_trip_s: float
    memory_base_bytes: float
    memory_bytes_per_token: float
    memory_bytes_per_token_layer: float
    memory_budget_bytes: float
    examples: int
    warm_depth: int = 0
    warm_examples: int = 0
    training_watts: float = 0.0

    def __post_init__(self) -> None:
        for name in _NUMBERS:
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0 or (value == 0 and name in _SPEEDS):
                raise ValueError(f"{name} of device {self.device_id} cannot be {value}")


_SPEEDS = frozenset(
    {
        "forward_s_per_token_layer",
        "backward_s_per_token_layer",
        "up_bytes_per_s",
        "down_bytes_per_s",
    }
)
_NUMBERS = tuple(field.name for field in fields(DeviceCapacity) if field.name != "device_id")


@dataclass(frozen=True)
class RunShape:
    """What is the same for every device of a run.

    Attributes:
        layer_count: L.
        values_per_rank: per layer, LoRA values for one unit of rank: the sum
            of d_in + d_out over its adapted modules.
        head_values: values of the classification head; 0 without one.
        tokens_per_step: mean tokens of a local step, for times.
        peak_tokens_per_step: most tokens a step can hold, for memory.
        steps: tau, local steps in a round.
        bytes_per_value_up: 4 for fp32, about 1 for int8.
        bytes_per_value_down: the same for the global adapter.
        b_share: share of ``values_per_rank`` that is lora_B; one half for
            square modules.
        batch_size: examples of a local step; used with a kept prefix only.
        prefix: whether devices keep the output of their frozen layers and load
            the trained layers only.

    Raises:
        ValueError: a count that is not positive, not one entry per layer, or
            a share that is not between 0 and 1.
    """

    layer_count: int
    values_per_rank: tuple[int, ...]
    head_values: int
    tokens_per_step: float
    peak_tokens_per_step: int
    steps: int
    bytes_per_value_up: float
    bytes_per_value_down: float
    b_share: float = 0.5
    batch_size: int = 1
    prefix: PrefixRule = SYNCED

    def __post_init__(self) -> None:
        if self.layer_count < 1 or len(self.values_per_rank) != self.layer_count:
            raise ValueError(f"{len(self.values_per_rank)} sizes for {self.layer_count} layers")
        positive = (
            *self.values_per_rank,
            self.tokens_per_step,
            self.peak_tokens_per_step,
            self.steps,
            self.bytes_per_value_up,
            self.bytes_per_value_down,
        )
        if self.head_values < 0 or not all(0 < value < math.inf for value in positive):
            raise ValueError(f"sizes of a run must be positive: {self}")
        if not 0 < self.b_share < 1:
            raise ValueError(f"b_share must lie between 0 and 1, not {self.b_share}")


@dataclass(frozen=True)
class Plan:
    """One device's share of a round.

    Attributes:
        predicted_s: completion time, from assignment to update (eq. 1).
        factors: what of every trained layer is trained; the head always is.
        quantised_layers: lowest trained layers that keep their activations in eight bits.
    """

    lora: LoraConfig
    steps: int
    predicted_s: float
    factors: Factors = "both"
    quantised_layers: int = 0


@dataclass(frozen=True)
class Configuration:
    """What a round asks of whom.

    Attributes:
        plans: by device; those in neither mapping were not offered.
        global_ranks: rank of the global adapter at every layer.
        refused: by device, one sentence why it cannot take part.
    """

    plans: Mapping[str, Plan]
    global_ranks: tuple[int, ...]
    refused: Mapping[str, str]


class Aggregation(Protocol):
    """One round's updates on their way to the next global adapter."""

    def add(self, device_id: str, update: Adapter, *, weight: float, steps: int) -> None:
        """Take one update; it may be forgotten afterwards.

        Args:
            device_id: whose it is; each device once.
            update: deltas against the global adapter, fewer layers or smaller
                (prefix-nested) ranks than it allowed.
            weight: number of examples behind the update.
            steps: local steps that were really done.

        Raises:
            ProtocolError: a name, shape or value outside the global adapter,
                or a second update of the same device; nothing was added.
        """
        ...

    def result(self) -> dict[str, NDArray[np.float32]]:
        """The new global adapter, with the names and shapes of the old one."""
        ...


@runtime_checkable
class GivesNarrowRanks(Protocol):
    """A strategy that asks some devices for fewer ranks than the global adapter has."""

    @property
    def narrow_ranks(self) -> tuple[int, ...]:
        """Those that it may ask for, the same in every trained layer."""
        ...


@runtime_checkable
class ShrinksTails(Protocol):
    """A strategy whose devices train with a penalty on their last ranks."""

    @property
    def tail(self) -> TailRule | None:
        """The penalty; None for none."""
        ...


class Strategy(Protocol):
    """A way to share one fine-tuning among unequal devices."""

    @property
    def rho(self) -> float:
        """Weight of the past in capacity estimates (eq. 3), 0 to below 1."""
        ...

    def global_ranks(self, shape: RunShape) -> tuple[int, ...]:
        """Rank of the global adapter at every layer, as the next round configures it.

        Raises:
            ConfigError: an option does not fit the base model.
        """
        ...

    def configure(
        self, shape: RunShape, devices: Sequence[DeviceCapacity], round_number: int
    ) -> Configuration:
        """Decide depth and ranks of every device; independent of their order.

        Args:
            shape: what is the same for every device.
            devices: the cohort, each device once.
            round_number: from 1.

        Raises:
            ConfigError: an option does not fit the base model.
        """
        ...

    def begin(self, global_adapter: Adapter) -> Aggregation:
        """Start to aggregate updates that are deltas against this adapter."""
        ...


def tail_rule(strategy: Strategy) -> TailRule | None:
    """See ``ShrinksTails``; None for a strategy that does not."""
    return strategy.tail if isinstance(strategy, ShrinksTails) else None


def narrow_ranks(strategy: Strategy) -> tuple[int, ...]:
    """See ``GivesNarrowRanks``; none for a strategy that does not."""
    return strategy.narrow_ranks if isinstance(strategy, GivesNarrowRanks) else ()
