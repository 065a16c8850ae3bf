"""HetLoRA's aggregation: zero-padded factors, weighted by the norm of their product.

    w_i = ||B_i A_i||_F over all modules;   new = sum_i w_i pad(A_i) / sum_i w_i

and the same for B. Zero padding pulls the high rows of a layer toward zero
when low ranks report: that is the method, not an oversight. By us: a layer
counts only its holders, a row that nobody held keeps its value, and the head,
which has no product, is the mean by examples.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from broker_server.strategies.aggregate import HolderMean
from broker_server.strategies.self_pruning import SelfPruning
from broker_server.strategies.strategy import Adapter
from broker_server.strategies.updates import UpdateCheck, rank_axis

_LEAST_NORM = 1e-12
"""Devices whose products are all zero then count alike."""


class NormWeightedMean:
    """Running sums of zero-padded factors.

    Args:
        global_adapter: what every update is a delta against.
        pruning: told what every device began with and what it trained.

    Source: HetLoRA, arXiv:2401.06432; over all modules at once as reconstructed.
    """

    def __init__(self, global_adapter: Adapter, pruning: SelfPruning | None = None) -> None:
        self._old = global_adapter
        self._pruning = pruning
        self._check = UpdateCheck(global_adapter, "pairs")
        self._head = HolderMean({n: v for n, v in global_adapter.items() if rank_axis(n) is None})
        factors = {n: v for n, v in global_adapter.items() if rank_axis(n) is not None}
        self._sums = {name: np.zeros(old.shape) for name, old in factors.items()}
        self._weights = dict.fromkeys(factors, 0.0)
        self._ranks = dict.fromkeys(factors, 0)

    def add(self, device_id: str, update: Adapter, *, weight: float, steps: int) -> None:
        """Add one update; see ``Aggregation.add``. ``weight`` counts for the head alone.

        Raises:
            ProtocolError: see ``UpdateCheck.admit``.
        """
        self._check.admit(device_id, update, weight=weight, steps=steps)
        head = {name: delta for name, delta in update.items() if rank_axis(name) is None}
        if head:
            self._head.add(device_id, head, weight=weight, steps=steps)
        trained = {name: values_after(self._old, update, name) for name in update.keys() - head}
        if self._pruning and trained:
            before = {name: held_before(self._old, update, name) for name in trained}
            self._pruning.judge(device_id, before, trained)
        norm = product_norm(trained) + _LEAST_NORM
        for name, values in trained.items():
            self._sums[name][tuple(slice(size) for size in values.shape)] += norm * values
            self._weights[name] += norm
            self._ranks[name] = max(self._ranks[name], values.shape[rank_axis(name) or 0])

    def result(self) -> dict[str, NDArray[np.float32]]:
        """The new global adapter, with the names and shapes of the old one."""
        new = {name: values.copy() for name, values in self._old.items()}
        new.update(self._head.result())
        for name, rank in self._ranks.items():
            if rank:
                held = (slice(rank),) if rank_axis(name) == 0 else (slice(None), slice(rank))
                new[name][held] = self._sums[name][held] / self._weights[name]
        return new


def values_after(old: Adapter, update: Adapter, name: str) -> NDArray[np.float64]:
    """A tensor as the device had it after training: as many rank rows as it held."""
    return held_before(old, update, name).astype(np.float64) + update[name]


def held_before(old: Adapter, update: Adapter, name: str) -> NDArray[np.float32]:
    """The same before training: a view."""
    return old[name][tuple(slice(size) for size in update[name].shape)]


def product_norm(factors: dict[str, NDArray[np.float64]]) -> float:
    """Frobenius norm of B A over all modules, without the product.

    ||B A||^2 = tr((B^T B)(A A^T)), O(d r^2).

    Args:
        factors: ``lora_A`` (r, d_in) and ``lora_B`` (d_out, r) of every module.
    """
    total = 0.0
    for name, down in factors.items():
        if name.endswith("lora_A"):
            up = factors[name[:-1] + "B"]
            total += float(np.sum((up.T @ up) * (down @ down.T)))
    # Rounding can leave a tiny negative sum where the product is zero.
    return math.sqrt(max(total, 0.0))
