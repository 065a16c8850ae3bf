"""How large an update is, block by block, in figures that devices can be compared by.

A block is a LoRA factor of one module, the product of a module's two factors, or
the head as a whole. Figures are per value and per step, so that a device with a
smaller rank or with fewer steps is measured like the others.

Knows updates; judges nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker_server.strategies.strategy import Adapter
from broker_server.strategies.updates import rank_axis

HEAD = "head"
PRODUCT = "product"

_Gram = NDArray[np.float64]

STEPS_POWER = 0.75
"""How an update grows with its steps: between noise (1/2) and drift (1). A cohort in
which all do the same steps is measured the same under any power."""


@dataclass(frozen=True)
class ProductParts:
    """What a module's update adds to the product B A, as Frobenius norms.

        (B + dB)(A + dA) - B A  =  dB A  +  B dA  +  dB dA

    Attributes:
        by_b: of dB A.
        by_a: of B dA.
        by_both: of dB dA.
        values: of the product, d_out times d_in.
    """

    by_b: float
    by_a: float
    by_both: float
    values: int

    def bound(self, scale_a: float = 1.0, scale_b: float = 1.0) -> float:
        """At least the norm of the change when the factors' updates are scaled."""
        linear = scale_b * self.by_b + scale_a * self.by_a
        return linear + scale_a * scale_b * self.by_both

    def scale_within(self, most: float, scale_a: float, scale_b: float) -> float:
        """Largest number of at most 1 for both factors that brings ``bound`` to ``most``."""
        if self.bound(scale_a, scale_b) <= most:
            return 1.0
        linear = scale_b * self.by_b + scale_a * self.by_a
        square = scale_a * scale_b * self.by_both
        # The positive root of square f^2 + linear f = most, written without cancellation.
        return 2.0 * most / (linear + math.sqrt(linear**2 + 4.0 * square * most))


@dataclass(frozen=True)
class UpdateSizes:
    """One update, measured.

    Attributes:
        blocks: root mean square of each factor and of the head, per ``pace``.
        products: by module.
        pace: what the steps account for.
    """

    blocks: dict[str, float]
    products: dict[str, ProductParts]
    pace: float

    def product_size(self, module: str) -> float:
        """Comparable size of a module's product change: per value and per pace."""
        parts = self.products[module]
        return parts.bound() / math.sqrt(parts.values) / self.pace


class Ruler:
    """Measures updates against one global adapter.

    Norms of products come from Gram matrices of rank size, the adapter's reckoned once:
    ||B A||^2 = sum of (B^T B) * (A A^T), and a smaller rank has the first rows and columns.

    Args:
        old: the global adapter.
    """

    def __init__(self, old: Adapter) -> None:
        self._shapes = {name: values.shape for name, values in old.items()}
        self._grams = {n: _gram(n, values) for n, values in old.items() if rank_axis(n) is not None}

    def measure(self, update: Adapter, *, steps: int) -> UpdateSizes:
        """Measure an update that fits the global adapter.

        Args:
            update: deltas against it.
            steps: local steps behind the update; at least one.
        """
        pace = float(steps) ** STEPS_POWER
        grams = {name: _gram(name, update[name]) for name in update if rank_axis(name) is not None}
        squares: dict[str, float] = {}
        counts: dict[str, int] = {}
        for name, delta in update.items():
            block, gram = block_of(name), grams.get(name)
            square = _sum_of_squares(delta) if gram is None else float(np.trace(gram))
            squares[block] = squares.get(block, 0.0) + square
            counts[block] = counts.get(block, 0) + delta.size
        blocks = {block: math.sqrt(squares[block] / counts[block]) / pace for block in squares}
        products = {module: self._product_parts(grams, module) for module in modules_in(update)}
        return UpdateSizes(blocks, products, pace)

    def _product_parts(self, grams: Mapping[str, _Gram], module: str) -> ProductParts:
        down_name, up_name = f"{module}.lora_A", f"{module}.lora_B"
        new_down, new_up = grams.get(down_name), grams.get(up_name)
        return ProductParts(
            by_b=_norm_of(new_up, self._grams[down_name]),
            by_a=_norm_of(self._grams[up_name], new_down),
            by_both=_norm_of(new_up, new_down),
            values=self._shapes[up_name][0] * self._shapes[down_name][1],
        )


def block_of(name: str) -> str:
    """The block that a tensor belongs to."""
    return HEAD if rank_axis(name) is None else name


def modules_in(update: Adapter) -> Iterator[str]:
    """Modules of which an update holds a factor, each once."""
    names = {name[: -len(".lora_A")] for name in update if rank_axis(name) is not None}
    return iter(sorted(names))


def whole_norm(update: Mapping[str, NDArray[np.floating[Any]]]) -> float:
    """Euclidean norm of all values of an update together."""
    return math.sqrt(sum(_sum_of_squares(delta) for delta in update.values()))


def _sum_of_squares(values: NDArray[np.floating[Any]]) -> float:
    vector = values.astype(np.float64, copy=False).ravel()
    return float(vector.dot(vector))


def _gram(name: str, factor: NDArray[np.float32]) -> _Gram:
    """(rank, rank) in float64, which no float32 can overflow: A A^T or B^T B."""
    values = factor.astype(np.float64)
    return values @ values.T if rank_axis(name) == 0 else values.T @ values


def _norm_of(up: _Gram | None, down: _Gram | None) -> float:
    """Frobenius norm of a product from its factors' Gram matrices; a missing factor is zero."""
    if up is None or down is None:
        return 0.0
    rank = min(len(up), len(down))
    # Rounding can leave a tiny negative sum where the product is zero.
    return math.sqrt(max(float(np.vdot(up[:rank, :rank], down[:rank, :rank])), 0.0))
