"""The adapter that a run begins with, before any device has trained.

Knows tensor names and shapes through ``wire_protocol.model_family``; pure, and
NumPy only. B is zero, so that round 0 is the base model with a random head.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from wire_protocol.model_family import (
    HEAD_WEIGHT,
    ModelShape,
    Shape,
    adapter_shapes,
)

HEAD_DEVIATION = 0.02
"""Standard deviation of a new head: ``initializer_range`` of the BERT family."""


def initial_adapter(
    shape: ModelShape, ranks: Sequence[int], *, label_count: int, seed: int
) -> dict[str, NDArray[np.float32]]:
    """Draw the adapter of round 0.

    Every tensor has its own random stream, and rows are drawn in order: a
    tensor does not change with the ranks of other layers, and a lower rank of
    the same layer holds the first rows of a higher one.

    Args:
        shape: sizes of the base model.
        ranks: LoRA rank at every layer; 0 leaves a layer out.
        label_count: classes of the head; 0 for causal language models.
        seed: not negative.

    Returns:
        ``lora_A`` (r, d_in) uniform in +-1/sqrt(d_in), ``lora_B`` (d_out, r)
        zero, ``head.weight`` (labels, hidden) normal, ``head.bias`` zero.

    Raises:
        ConfigError: ``ranks`` does not have one entry per layer.

    Source: peft's ``LoraLayer.reset_lora_parameters``, Kaiming uniform with
    a = sqrt(5), whose bound is 1/sqrt(d_in).
    """
    expected = adapter_shapes(shape, tuple(ranks), label_count)
    return {name: _tensor(name, size, seed) for name, size in expected.items()}


def _tensor(name: str, size: Shape, seed: int) -> NDArray[np.float32]:
    generator = _generator(name, seed)
    if name.endswith("lora_A"):
        bound = 1.0 / math.sqrt(size[1])
        return generator.uniform(-bound, bound, size).astype(np.float32)
    if name == HEAD_WEIGHT:
        return generator.normal(0.0, HEAD_DEVIATION, size).astype(np.float32)
    return np.zeros(size, dtype=np.float32)


def _generator(name: str, seed: int) -> np.random.Generator:
    """A stream that depends on the seed and the tensor's name alone."""
    digest = hashlib.sha256(name.encode()).digest()
    entropy = [seed, int.from_bytes(digest[:16], "big")]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))
