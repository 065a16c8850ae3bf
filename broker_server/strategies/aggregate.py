"""Adaptive per-layer aggregation: a mean over the devices that hold each rank row.

For every tensor and every rank row j (row of lora_A, column of lora_B):

    new = old + eta * sum_{i holds j} p_i delta_i / sum_{i holds j} p_i     (5)

A device holds row j if it trained the layer with a rank above j. Rows without
holder keep their value bit for bit. With equal base this is eq. 5's mean of
factors, because every update is a delta against the same adapter.

Memory is one adapter in float64, however many devices report. Sums are kept
in float64, so the order of arrival can change at most the last bit of a
float32 result; add updates in the order of device_id to get the same bits again.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from broker_server.strategies.strategy import Adapter
from broker_server.strategies.updates import Allowed, UpdateCheck, rank_axis


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
        return old + self._learning_rate * mean


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
        self._sums = {name: np.zeros(old.shape) for name, old in global_adapter.items()}
        self._weights = {name: _row_weights(name, old) for name, old in global_adapter.items()}

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
            held = tuple(slice(size) for size in delta.shape)
            self._sums[name][held] += np.multiply(delta, factor, dtype=np.float64)
            # Axes of length 1 broadcast: slicing them by a longer delta is harmless.
            self._weights[name][held] += share

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
            weight = self._weights[name]
            mean = np.zeros(old.shape)
            np.divide(self._sums[name] * self._most_steps, weight, out=mean, where=weight > 0)
            new[name] = self.follow(name, mean, weight > 0)
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


def _row_weights(name: str, old: NDArray[np.float32]) -> NDArray[np.float64]:
    """Zeros that broadcast against the tensor: its length along the rank axis, else 1."""
    axis = rank_axis(name)
    return np.zeros(tuple(size if i == axis else 1 for i, size in enumerate(old.shape)))
