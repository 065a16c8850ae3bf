"""What of an assignment fits into this device's memory.

Pure: no I/O, no clock. Knows the memory model and the order of remedies; must
not know where the budget comes from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from wire_protocol.errors import DeviceError, FailureCode
from wire_protocol.lora import LoraConfig, kept_layers
from wire_protocol.parts import ComputeReport

CHECKPOINT_KEPT_SHARE = 0.2
"""Share of a layer's activations that gradient checkpointing keeps until its turn.

One layer at a time is recomputed and then held in full, so ``depth`` layers
cost as much as ``1 + 0.2 * (depth - 1)``: about 30 % at depth 12 and nothing
saved at depth 1. Measured on RoBERTa-base at depth 12, 16 x 128 tokens: 3744 MB
without, 1521 MB with, over a base of 820 MB, which is 0.12; 0.2 leaves room
for models with wider feed-forward layers.
"""

LEAST_BATCH_SHARE = 4
"""The batch is halved down to a quarter before other remedies: a smaller one
trains on less per step, gradient checkpointing only takes longer (29 % measured)."""

_MB = 1e6


@dataclass(frozen=True)
class AdmissionRequest:
    """What an assignment asks of the memory."""

    lora: LoraConfig
    batch_size: int
    max_tokens: int
    quantised_layers: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.max_tokens < 1:
            raise ValueError(f"nothing to train: {self.batch_size} x {self.max_tokens} tokens")


@dataclass(frozen=True)
class MemoryModel:
    """Peak memory of a training step, linear in tokens and in tokens x depth.

    Source: arXiv:2412.20004, memory capacity (mu) per device.
    """

    base_bytes: float
    bytes_per_token: float
    bytes_per_token_layer: float

    @classmethod
    def of(cls, compute: ComputeReport) -> MemoryModel:
        """Take the memory numbers of a benchmark."""
        return cls(
            base_bytes=compute.memory_base_bytes,
            bytes_per_token=compute.memory_bytes_per_token,
            bytes_per_token_layer=compute.memory_bytes_per_token_layer,
        )

    def peak_bytes(
        self, *, tokens: int, depth: int, gradient_checkpointing: bool, quantised_layers: int = 0
    ) -> float:
        """Expected peak of one step over ``tokens`` tokens at ``depth`` trained layers."""
        layers = kept_layers(depth, min(depth, quantised_layers))
        if gradient_checkpointing:
            layers = 1 + CHECKPOINT_KEPT_SHARE * (depth - 1)
        return self.base_bytes + tokens * (
            self.bytes_per_token + self.bytes_per_token_layer * layers
        )


@dataclass(frozen=True)
class Admitted:
    """How the assignment is carried out; never more than was asked.

    ``reason`` is one line for people: empty when nothing had to give.
    """

    batch_size: int
    gradient_checkpointing: bool
    depth: int
    reason: str


def admit(request: AdmissionRequest, memory: MemoryModel, *, budget_bytes: int) -> Admitted:
    """Find the least change that makes an assignment fit.

    Remedies, each on top of the one before: halve the batch down to a quarter,
    turn on gradient checkpointing, lower the depth down to 1, halve the batch
    down to 1.

    Raises:
        DeviceError: ``DOES_NOT_FIT``: not even one example at depth 1 fits.
    """
    needed_bytes = 0.0
    for choice in _choices(request):
        needed_bytes = memory.peak_bytes(
            tokens=choice.batch_size * request.max_tokens,
            depth=choice.depth,
            gradient_checkpointing=choice.gradient_checkpointing,
            quantised_layers=request.quantised_layers,
        )
        if needed_bytes <= budget_bytes:
            return _explained(choice, request, budget_bytes)
    raise DeviceError(
        FailureCode.DOES_NOT_FIT,
        f"one example of {request.max_tokens} tokens at depth 1 needs {needed_bytes / _MB:.0f} MB, "
        f"{budget_bytes / _MB:.0f} MB are free; stop other programs on the device, or use a "
        "smaller base model or fewer max_tokens",
    )


def _choices(request: AdmissionRequest) -> Iterator[Admitted]:
    """Every way to carry out the assignment, in order of preference."""
    least = max(1, request.batch_size // LEAST_BATCH_SHARE)
    depth = request.lora.depth
    batch_size = request.batch_size
    yield Admitted(batch_size, gradient_checkpointing=False, depth=depth, reason="")
    while batch_size > least:
        batch_size = max(least, batch_size // 2)
        yield Admitted(batch_size, gradient_checkpointing=False, depth=depth, reason="")
    for shallower in range(depth, 0, -1):
        # A single layer is recomputed in full: checkpointing would cost time and save nothing.
        yield Admitted(batch_size, gradient_checkpointing=shallower > 1, depth=shallower, reason="")
    while batch_size > 1:
        batch_size //= 2
        yield Admitted(batch_size, gradient_checkpointing=False, depth=1, reason="")


def _explained(choice: Admitted, request: AdmissionRequest, budget_bytes: int) -> Admitted:
    changes = []
    if choice.batch_size < request.batch_size:
        changes.append(f"batch {request.batch_size} -> {choice.batch_size}")
    if choice.gradient_checkpointing:
        changes.append("gradient checkpointing")
    if choice.depth < request.lora.depth:
        changes.append(f"depth {request.lora.depth} -> {choice.depth}")
    if not changes:
        return choice
    return Admitted(
        choice.batch_size,
        gradient_checkpointing=choice.gradient_checkpointing,
        depth=choice.depth,
        reason=f"{', '.join(changes)} to fit into {budget_bytes / _MB:.0f} MB",
    )
