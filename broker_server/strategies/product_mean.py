"""Aggregation of products: the mean of the devices' B A, cut to the global rank.

    FlexLoRA   B A = SVD_r( sum_{i holds layer} p_i B_i A_i / sum_{i holds layer} p_i )
    by us      B A = SVD_r( B0 A0 + eta S_max sum_i p_i (B_i A_i - B0 A0) / sum_i p_i S_i )

B0 A0 is what the devices began with, in the second form as many of its ranks as device i
held, S_i its steps. With equal steps, equal ranks and eta = 1 the two are one.

The dense product is never formed while factors are smaller: the devices' factors are
stacked, both stacks are reduced by QR, and the SVD is one of their small core. Rows come
out by falling singular value, so that the first rows which a device of lower rank gets are
its best truncation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from broker_server.strategies.aggregate import HolderMean
from broker_server.strategies.norm_mean import values_after
from broker_server.strategies.strategy import Adapter
from broker_server.strategies.updates import UpdateCheck, rank_axis

_NO_ENERGY = 1e-7
"""A singular value below this share of the largest is rounding noise of float32 factors."""

_ROUNDING = 1e-12

Matrix = NDArray[np.float64]


@dataclass
class _Stack:
    """One module's factors so far.

    Attributes:
        up, down: the sum of p_i B_i A_i is their product.
        began: sum of p_i over the devices that began with each rank of the old product.
        share: sum of p_i S_i, or of p_i where steps do not count.
    """

    up: Matrix
    down: Matrix
    began: NDArray[np.float64]
    share: float = 0.0


class ProductMean:
    """Stacked factors of every module, and an ordinary mean for the head.

    A stack that outgrows its matrix is multiplied out on the way, so memory is at
    most two dense factors a module, however many devices report.

    Args:
        global_adapter: what every update is a delta against.
        uniform: count every device as 1 instead of by its examples.
        learning_rate: eta of the server; 1 goes all the way to the mean.
        by_steps: see ``HolderMean``.
        keep_ranks: what a device did not hold of a module counts as unchanged;
            False as zero, which is FlexLoRA.

    Source: FlexLoRA, arXiv:2402.11505; QR of the stacks as in HLoRA
    (arXiv:2503.00813); a layer counts only its holders as in arXiv:2412.20004;
    by steps as in FedNova (arXiv:2007.07481).
    """

    def __init__(
        self,
        global_adapter: Adapter,
        *,
        uniform: bool = False,
        learning_rate: float = 1.0,
        by_steps: bool = False,
        keep_ranks: bool = False,
    ) -> None:
        self._old = global_adapter
        self._learning_rate = learning_rate
        self._keep_ranks = keep_ranks
        self._most_steps = 1
        self._check = UpdateCheck(global_adapter, "pairs")
        self._head = HolderMean(
            {n: v for n, v in global_adapter.items() if rank_axis(n) is None},
            uniform=uniform,
            learning_rate=learning_rate,
            by_steps=by_steps,
        )
        modules = [name[: -len(".lora_A")] for name in global_adapter if name.endswith("lora_A")]
        self._stacks = {module: self._empty(module) for module in modules}

    def add(self, device_id: str, update: Adapter, *, weight: float, steps: int) -> None:
        """Add one update; see ``Aggregation.add``.

        Raises:
            ProtocolError: see ``UpdateCheck.admit``.
        """
        self._check.admit(device_id, update, weight=weight, steps=steps)
        head = {name: delta for name, delta in update.items() if rank_axis(name) is None}
        if head:
            self._head.add(device_id, head, weight=weight, steps=steps)
        factor, counted_steps = self._head.counts(weight, steps)
        self._most_steps = max(self._most_steps, counted_steps)
        # The root on both sides keeps the two stacks equally scaled.
        root = float(np.sqrt(factor))
        for module, stack in self._stacks.items():
            names = f"{module}.lora_A", f"{module}.lora_B"
            if names[0] in update:
                down, up = (values_after(self._old, update, n) for n in names)
                stack.up = np.hstack([stack.up, root * up])
                stack.down = np.vstack([stack.down, root * down])
                _reduce(stack)
                stack.began[: len(down) if self._keep_ranks else None] += factor
                stack.share += factor * counted_steps

    def result(self) -> dict[str, NDArray[np.float32]]:
        """The new global adapter, with the names and shapes of the old one."""
        new = {name: values.copy() for name, values in self._old.items()}
        new.update(self._head.result())
        for module, stack in self._stacks.items():
            if stack.share > 0:
                factors = self._factors(module, stack)
                new[f"{module}.lora_B"], new[f"{module}.lora_A"] = factors
        return new

    def _empty(self, module: str) -> _Stack:
        up, down = (self._old[f"{module}.lora_{factor}"] for factor in "BA")
        inner = np.zeros((up.shape[0], 0)), np.zeros((0, down.shape[1]))
        return _Stack(*inner, began=np.zeros(len(down)))

    def _factors(
        self, module: str, stack: _Stack
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        old_up, old_down = (self._old[f"{module}.lora_{factor}"] for factor in "BA")
        scale = self._learning_rate * self._most_steps / stack.share
        rest = 1.0 - scale * stack.began
        up, down = scale * stack.up, stack.down
        if np.abs(rest).max() > _ROUNDING:
            up = np.hstack([up, old_up * rest])
            down = np.vstack([down, old_down])
        return best_product(up, down, old_down)


def _reduce(stack: _Stack) -> None:
    """The same product with at most min(d_out, d_in) inner ranks."""
    smaller = min(stack.up.shape[0], stack.down.shape[1])
    if stack.up.shape[1] > 2 * smaller:
        product = stack.up @ stack.down
        if len(product) == smaller:
            stack.up, stack.down = np.eye(smaller), product
        else:
            stack.up, stack.down = product, np.eye(smaller)


def best_product(
    up: Matrix, down: Matrix, old_down: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """B (d_out, r) and A (r, d_in) of the best rank-r product, r that of ``old_down``.

    Signs are those that make the largest entry of every column of B positive.
    A rank without energy keeps its old row of A and a zero column of B:
    zeros in both would never learn again.
    """
    left, values, right = _thin_svd(up, down)
    rank = old_down.shape[0]
    new_up = np.zeros((up.shape[0], rank), dtype=np.float32)
    new_down = old_down.copy()
    kept = min(rank, int(np.count_nonzero(values > _NO_ENERGY * max(float(values[0]), 1e-30))))
    roots = np.sqrt(values[:kept])
    # Of the two signs of a singular pair take the one whose largest entry is positive.
    largest = left[np.argmax(np.abs(left[:, :kept]), axis=0), np.arange(kept)]
    signs = np.where(largest < 0, -1.0, 1.0)
    new_up[:, :kept] = left[:, :kept] * roots * signs
    new_down[:kept] = right[:kept] * (roots * signs)[:, np.newaxis]
    return new_up, new_down


def _thin_svd(up: Matrix, down: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """SVD of ``up @ down`` by QR of both and SVD of the core, O(d m^2)."""
    left, left_core = np.linalg.qr(up)
    right, right_core = np.linalg.qr(down.T)
    core_left, values, core_right = np.linalg.svd(left_core @ right_core.T, full_matrices=False)
    return left @ core_left, values, core_right @ right.T
