"""Which transformer layers carry LoRA, with which rank, written how.

Valid on Python 3.8; imports nothing outside the standard library.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Tuple

LORA_SCALE = 2.0
"""alpha / r, the factor in front of B A. The same at every rank, so that a
changed rank does not silently change the learning rate."""

MAX_RANK = 256


class Codec(str, Enum):
    """How the numbers of an adapter are written."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"
    INT4 = "int4"


BYTES_PER_VALUE = {Codec.FP32: 4.0, Codec.FP16: 2.0, Codec.INT8: 0.96, Codec.INT4: 0.45}
"""What a value takes as measured at the shapes of real adapters: int8 carries one float32 scale per
row, and both coarse codecs are deflated."""

QUANTISED_KEPT = 0.27
"""Share of a layer's activations that is left of them in eight bits, as measured on MiniLM."""

QUANTISED_WORK = 0.3
"""What quantising a layer's activations costs of its forward pass, as measured there on a CPU."""


@dataclass(frozen=True)
class TailRule:
    """How training shrinks the last ranks of a module.

    Attributes:
        share: of the ranks that are no tail.
        weight: of the tail's size in the loss.

    Source: HetLoRA (arXiv:2401.06432), gamma and lambda of its self-pruning.
    """

    share: float
    weight: float


def kept_ranks(rank: int, share: float) -> int:
    """Ranks in front of the tail: the whole part of ``share * rank``."""
    return math.floor(share * rank)


def kept_layers(depth: float, quantised: float) -> float:
    """Layers' worth of activations that a training step holds at its worst moment.

    One quantised layer at a time holds all of its own until its forward pass is over, so that
    quantising a single one spares nothing.

    Args:
        depth: trained layers.
        quantised: those of them that keep their activations in eight bits.
    """
    return depth - (1.0 - QUANTISED_KEPT) * max(0.0, quantised - 1.0)


def quantising_token_layers(tokens: int, quantised: int) -> int:
    """What quantising costs a step, as token-layer pairs of a forward pass."""
    return round(QUANTISED_WORK * tokens * quantised)


@dataclass(frozen=True)
class LoraConfig:
    """LoRA rank at every transformer layer of the base model.

    ``ranks[l]`` is the rank at layer ``l``, counted from the input (0) to the
    output (L-1). Rank 0 means that the layer is not trained. Trained layers
    are a contiguous block that ends at the output, so depth says which they are.

    Raises:
        ValueError: no layer, no trained layer, a rank outside 0..256, or a
            frozen layer above a trained one.

    Source: arXiv:2412.20004, LoRA depth and rank distribution.
    """

    ranks: Tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.ranks or self.ranks[-1] == 0:
            raise ValueError("a LoRA config needs at least the output layer")
        if any(rank < 0 or rank > MAX_RANK for rank in self.ranks):
            raise ValueError(f"LoRA ranks must lie in 0..{MAX_RANK}: {self.ranks}")
        if any(rank == 0 for rank in self.ranks[len(self.ranks) - self.depth :]):
            raise ValueError(f"trained layers must be contiguous up to the output: {self.ranks}")

    @classmethod
    def top(cls, depth: int, ranks: Tuple[int, ...]) -> LoraConfig:
        """Keep ``ranks`` at the ``depth`` layers nearest the output, 0 below."""
        if not 1 <= depth <= len(ranks):
            raise ValueError(f"depth {depth} is outside 1..{len(ranks)}")
        frozen = len(ranks) - depth
        return cls((0,) * frozen + tuple(ranks[frozen:]))

    @property
    def layer_count(self) -> int:
        """Layers of the base model, trained or not."""
        return len(self.ranks)

    @property
    def depth(self) -> int:
        """Number of trained layers, counted from the output."""
        return sum(rank > 0 for rank in self.ranks)

    @property
    def layers(self) -> range:
        """Indices of the trained layers."""
        return range(self.layer_count - self.depth, self.layer_count)
