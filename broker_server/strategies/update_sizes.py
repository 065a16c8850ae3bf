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

from broker_server.strategies.norm_mean import product_norm
from broker_server.strategies.strategy import Adapter
from broker_server.strategies.updates import rank_axis

HEAD = "head"
PRODUCT = "product"

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


def measure(old: Adapter, update: Adapter, *, steps: int) -> UpdateSizes:
    """Measure an update that fits the global adapter.

    Args:
        old: the global adapter.
        update: deltas against it.
        steps: local steps behind the update; at least one.
    """
    pace = float(steps) ** STEPS_POWER
    squares: dict[str, float] = {}
    counts: dict[str, int] = {}
    for name, delta in update.items():
        block = block_of(name)
        squares[block] = squares.get(block, 0.0) + _sum_of_squares(delta)
        counts[block] = counts.get(block, 0) + delta.size
    blocks = {block: math.sqrt(squares[block] / counts[block]) / pace for block in squares}
    products = {module: _product_parts(old, update, module) for module in modules_in(update)}
    return UpdateSizes(blocks, products, pace)


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
    return float(np.sum(np.square(values, dtype=np.float64)))


def _product_parts(old: Adapter, update: Adapter, module: str) -> ProductParts:
    down_name, up_name = f"{module}.lora_A", f"{module}.lora_B"
    rank = update[down_name].shape[0] if down_name in update else update[up_name].shape[1]
    down = old[down_name][:rank].astype(np.float64)
    up = old[up_name][:, :rank].astype(np.float64)
    new_down = _delta(update, down_name, down)
    new_up = _delta(update, up_name, up)
    return ProductParts(
        by_b=_norm_of(new_up, down),
        by_a=_norm_of(up, new_down),
        by_both=_norm_of(new_up, new_down),
        values=up.shape[0] * down.shape[1],
    )


def _delta(update: Adapter, name: str, like: NDArray[np.float64]) -> NDArray[np.float64]:
    return update[name].astype(np.float64) if name in update else np.zeros_like(like)


def _norm_of(up: NDArray[np.float64], down: NDArray[np.float64]) -> float:
    """Frobenius norm of ``up @ down`` from two Gram matrices of rank size."""
    return product_norm({"m.lora_A": down, "m.lora_B": up})
