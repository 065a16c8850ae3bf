"""FlexLoRA's aggregation: the mean of the products B A, cut to the global rank.

    B A = SVD_r( sum_{i holds layer} p_i B_i A_i / sum_{i holds layer} p_i )

The dense product is never formed: the devices' factors are stacked, both
stacks are reduced by QR, and the SVD is one of their small core. Rows come out
by falling singular value, so that the first rows which a device of lower rank
gets are its best truncation.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from broker_server.strategies.aggregate import HolderMean
from broker_server.strategies.norm_mean import values_after
from broker_server.strategies.strategy import Adapter
from broker_server.strategies.updates import UpdateCheck, rank_axis

_NO_ENERGY = 1e-7
"""A singular value below this share of the largest is rounding noise of float32 factors."""

Matrix = NDArray[np.float64]


class ProductMean:
    """Stacked factors of every module, and an ordinary mean for the head.

    A stack that outgrows its matrix is reduced on the way, so memory is at
    most two dense factors a module, however many devices report.

    Args:
        global_adapter: what every update is a delta against.

    Source: FlexLoRA, arXiv:2402.11505; QR of the stacks as in HLoRA
    (arXiv:2503.00813); a layer counts only its holders as in arXiv:2412.20004.
    """

    def __init__(self, global_adapter: Adapter) -> None:
        self._old = global_adapter
        self._check = UpdateCheck(global_adapter, "pairs")
        self._head = HolderMean({n: v for n, v in global_adapter.items() if rank_axis(n) is None})
        modules = [name[: -len(".lora_A")] for name in global_adapter if name.endswith("lora_A")]
        self._stacks: dict[str, tuple[Matrix, Matrix]] = {
            module: (
                np.zeros((global_adapter[f"{module}.lora_B"].shape[0], 0)),
                np.zeros((0, global_adapter[f"{module}.lora_A"].shape[1])),
            )
            for module in modules
        }
        self._weights = dict.fromkeys(modules, 0.0)

    def add(self, device_id: str, update: Adapter, *, weight: float, steps: int) -> None:
        """Add one update; see ``Aggregation.add``.

        Raises:
            ProtocolError: see ``UpdateCheck.admit``.
        """
        self._check.admit(device_id, update, weight=weight, steps=steps)
        head = {name: delta for name, delta in update.items() if rank_axis(name) is None}
        if head:
            self._head.add(device_id, head, weight=weight, steps=steps)
        # The root on both sides keeps the two stacks equally scaled.
        root = float(np.sqrt(weight))
        for module, (up, down) in self._stacks.items():
            names = f"{module}.lora_A", f"{module}.lora_B"
            if names[0] in update:
                trained_down, trained_up = (values_after(self._old, update, n) for n in names)
                stack = np.hstack([up, root * trained_up]), np.vstack([down, root * trained_down])
                self._stacks[module] = _reduced(*stack)
                self._weights[module] += weight

    def result(self) -> dict[str, NDArray[np.float32]]:
        """The new global adapter, with the names and shapes of the old one."""
        new = {name: values.copy() for name, values in self._old.items()}
        new.update(self._head.result())
        for module, (up, down) in self._stacks.items():
            if self._weights[module] > 0:
                old_down = self._old[f"{module}.lora_A"]
                factors = best_product(up, down / self._weights[module], old_down)
                new[f"{module}.lora_B"], new[f"{module}.lora_A"] = factors
        return new


def _reduced(up: Matrix, down: Matrix) -> tuple[Matrix, Matrix]:
    """The same product with at most min(d_out, d_in) inner ranks."""
    if up.shape[1] <= 2 * min(up.shape[0], down.shape[1]):
        return up, down
    left, values, right = _thin_svd(up, down)
    return left * values, right


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
