"""Adaptive per-layer aggregation: a mean over the devices that hold each rank row.

For every tensor and every rank row j (row of lora_A, column of lora_B):

    new = old + eta * sum_{i holds j} p_i delta_i / sum_{i holds j} p_i     (5)

A device holds row j if it trained the layer with a rank above j. Rows without
holder keep their value bit for bit. With equal base this is eq. 5's mean of
factors, because every update is a delta against the same adapter.

Memory is one adapter in float64 and one tensor, however many devices report. Sums are kept
in float64, so the order of arrival can change at most the last bit of a
float32 result; add updates in the order of device_id to get the same bits again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from broker_server.strategies.strategy import Adapter
from broker_server.strategies.updates import Allowed, UpdateCheck, held_rank, rank_axis


class ServerStep(Protocol):
    """How far the server follows the mean of the updates of one tensor."""

    def moved(
        self,
        name: str,
        old: NDArray[np.float32],
        mean: NDArray[np.float64],
        held: NDArray[np.bool_],
    ) -> NDArray[np.float64]:
        """The new tensor.

        Args:
            name: of the tensor.
            old: its value, which must come back where nobody held a row.
            mean: of the updates; zero where nobody held a row.
            held: rows with a holder, broadcastable against the tensor.
        """
        ...


class PlainStep:
    """new = old + eta mean."""

    def __init__(self, learning_rate: float = 1.0) -> None:
        self._learning_rate = learning_rate

    def moved(
        self,
        name: str,  # noqa: ARG002 - part of the interface; every tensor is treated alike
        old: NDArray[np.float32],
        mean: NDArray[np.float64],
        held: NDArray[np.bool_],  # noqa: ARG002 - the mean is zero where nobody held a row
    ) -> NDArray[np.float64]:
        """See ``ServerStep.moved``."""
        return old + (mean if self._learning_rate == 1.0 else self._learning_rate * mean)


class HolderMean:
    """A running weighted sum with one weight per (tensor, rank row).

    Args:
        global_adapter: what every update is a delta against.
        uniform: count every device as 1 instead of by its examples.
        learning_rate: eta of the server; 1 replaces rows by their mean.
        step: how the server follows the mean; None for ``learning_rate`` times it.
        by_steps: count an update by its steps, and per step: a device that
            did half of them then neither pulls back toward the old value
            nor counts as much as the others (FedNova).
        allowed: factors that updates may hold.

    Source: arXiv:2412.20004, adaptive per-layer aggregation; holders per rank
    row as in RBLA (arXiv:2408.08699) and FediLoRA (arXiv:2509.06984); by steps
    as in FedNova (arXiv:2007.07481).
    """

    def __init__(
        self,
        global_adapter: Adapter,
        *,
        uniform: bool = False,
        learning_rate: float = 1.0,
        step: ServerStep | None = None,
        by_steps: bool = False,
        allowed: Allowed = "any",
    ) -> None:
        self._old = global_adapter
        self._uniform = uniform
        self._step = step or PlainStep(learning_rate)
        self._by_steps = by_steps
        self._most_steps = 1
        self._check = UpdateCheck(global_adapter, allowed)
        self._sums = _zeros_like(global_adapter)
        self._shares: dict[str, dict[int, float]] = {name: {} for name in global_adapter}
        self._scratch = _Scratch()

    def add(self, device_id: str, update: Adapter, *, weight: float, steps: int) -> None:
        """Add one update; see ``Aggregation.add``.

        Raises:
            ProtocolError: a name, shape, value or factor outside what was asked
                for, a weight that is not positive, no step, or a device added before.
        """
        factor, counted_steps = self.admit(device_id, update, weight=weight, steps=steps)
        share = factor * counted_steps
        self._most_steps = max(self._most_steps, counted_steps)
        for name, delta in update.items():
            total = self._sums[name]
            if delta.shape != total.shape:
                total = total[tuple(slice(size) for size in delta.shape)]
            # Two steps: NumPy is slow at converting and multiplying at once.
            weighted = self._scratch.filled(delta)
            weighted *= factor
            total += weighted
            shares, rank = self._shares[name], held_rank(name, delta.shape)
            shares[rank] = shares.get(rank, 0.0) + share

    def admit(
        self, device_id: str, update: Adapter, *, weight: float, steps: int
    ) -> tuple[float, int]:
        """Check an update without adding it; how it counts: its p_i, and its steps or 1.

        Raises:
            ProtocolError: see ``add``.
        """
        self._check.admit(device_id, update, weight=weight, steps=steps)
        return 1.0 if self._uniform else float(weight), steps if self._by_steps else 1

    def result(self) -> dict[str, NDArray[np.float32]]:
        """The new global adapter, with the names and shapes of the old one."""
        new: dict[str, NDArray[np.float32]] = {}
        for name, old in self._old.items():
            weight = _row_weights(name, old.shape, self._shares[name])
            held = weight > 0
            # Where nobody held a row the sum is zero, and stays so divided by anything.
            mean = self._sums[name] / np.where(held, weight, 1.0)
            if self._by_steps:
                mean *= self._most_steps
            new[name] = self.follow(name, mean, held)
        return new

    def follow(
        self, name: str, mean: NDArray[np.float64], held: NDArray[np.bool_]
    ) -> NDArray[np.float32]:
        """The new tensor, given the mean of its updates, however that was found.

        Args:
            name: of the tensor.
            mean: zero where nobody held a row.
            held: rows with a holder, broadcastable against the tensor.
        """
        return self._step.moved(name, self._old[name], mean, held).astype(np.float32)


class _Scratch:
    """Memory for one tensor in float64, used again for the next: it then stays in the cache."""

    def __init__(self) -> None:
        self._values = np.empty(0)
        self._views: dict[tuple[int, ...], NDArray[np.float64]] = {}

    def filled(self, tensor: NDArray[np.float32]) -> NDArray[np.float64]:
        """The tensor in float64; good until the next call."""
        if tensor.size > self._values.size:
            self._values = np.empty(tensor.size)
            self._views.clear()
        view = self._views.get(tensor.shape)
        if view is None:
            view = self._values[: tensor.size].reshape(tensor.shape)
            self._views[tensor.shape] = view
        view[...] = tensor
        return view


def _zeros_like(adapter: Adapter) -> dict[str, NDArray[np.float64]]:
    """A zero per value, all in one piece: the system hands out large pieces faster."""
    values = np.zeros(sum(tensor.size for tensor in adapter.values()))
    zeros: dict[str, NDArray[np.float64]] = {}
    begin = 0
    for name, tensor in adapter.items():
        zeros[name] = values[begin : begin + tensor.size].reshape(tensor.shape)
        begin += tensor.size
    return zeros


def _row_weights(
    name: str, shape: tuple[int, ...], shares: Mapping[int, float]
) -> NDArray[np.float64]:
    """Sum of the weights that hold each rank row, shaped to broadcast against the tensor.

    Args:
        name: of the tensor.
        shape: of the tensor.
        shares: sum of the weights by the rank that was held: ranks nest.
    """
    if list(shares) == [held_rank(name, shape)]:
        return np.full((1,) * len(shape), shares[held_rank(name, shape)])
    axis = rank_axis(name)
    weights = np.zeros(tuple(size if i == axis else 1 for i, size in enumerate(shape)))
    rows = weights.reshape(-1)
    for rank, share in sorted(shares.items()):
        rows[:rank] += share
    return weights
