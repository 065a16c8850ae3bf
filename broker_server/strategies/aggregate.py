"""Adaptive per-layer aggregation: a mean over the devices that hold each rank row.

For every tensor and every rank row j (row of lora_A, column of lora_B):

    new = old + eta * sum_{i holds j} p_i delta_i / sum_{i holds j} p_i     (5)

A device holds row j if it trained the layer with a rank above j. Rows without
holder keep their value bit for bit. With equal base this is eq. 5's mean of
factors, because every update is a delta against the same adapter.

Memory is one adapter in float64 and one tensor, however many devices report, and where its tensors
go for every layout (names and shapes, in their order) that updates came in. Sums are kept
in float64, so the order of arrival can change at most the last bit of a
float32 result; add updates in the order of device_id to get the same bits again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from broker_server.strategies.strategy import Adapter
from broker_server.strategies.updates import Allowed, Layout, UpdateCheck, held_rank, rank_axis


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
        self._scratch = np.empty(
            max((values.size for values in global_adapter.values()), default=0)
        )
        self._places: dict[Layout, _Places] = {}

    def add(self, device_id: str, update: Adapter, *, weight: float, steps: int) -> None:
        """Add one update; see ``Aggregation.add``.

        Raises:
            ProtocolError: a name, shape, value or factor outside what was asked
                for, a weight that is not positive, no step, or a device added before.
        """
        layout = self._check.admit(device_id, update, weight=weight, steps=steps)
        factor, counted_steps = self.counts(weight, steps)
        self._most_steps = max(self._most_steps, counted_steps)
        places = self._places.get(layout)
        if places is None:
            places = self._places[layout] = _places(layout, self._sums, self._scratch)
        for (weighted, total), delta in zip(places.tensors, update.values(), strict=True):
            # Two steps: NumPy is slow at converting and multiplying at once.
            weighted[...] = delta
            np.multiply(weighted, factor, out=weighted)
            np.add(total, weighted, out=total)
        places.share += factor * counted_steps

    def admit(
        self, device_id: str, update: Adapter, *, weight: float, steps: int
    ) -> tuple[float, int]:
        """Check an update without adding it; how it counts: its p_i, and its steps or 1.

        Raises:
            ProtocolError: see ``add``.
        """
        self._check.admit(device_id, update, weight=weight, steps=steps)
        return self.counts(weight, steps)

    def result(self) -> dict[str, NDArray[np.float32]]:
        """The new global adapter, with the names and shapes of the old one."""
        shares = _shares(self._places)
        new: dict[str, NDArray[np.float32]] = {}
        for name, old in self._old.items():
            weight = _row_weights(name, old.shape, shares.get(name, {}))
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

    def counts(self, weight: float, steps: int) -> tuple[float, int]:
        """How an update counts: its p_i, and its steps or 1."""
        return 1.0 if self._uniform else float(weight), steps if self._by_steps else 1


@dataclass
class _Places:
    """Where the tensors of updates of one layout go; found once, for most of a round is alike.

    Attributes:
        tensors: for each, float64 memory to weigh it in (the same for all of a
            shape, so that it stays in the processor's cache) and its part of the sums.
        share: sum of the weights of the updates so far.
    """

    tensors: list[tuple[NDArray[np.float64], NDArray[np.float64]]]
    share: float = 0.0


def _places(
    layout: Layout, sums: Mapping[str, NDArray[np.float64]], scratch: NDArray[np.float64]
) -> _Places:
    return _Places(
        [
            (
                scratch[: math.prod(shape)].reshape(shape),
                sums[name][tuple(slice(size) for size in shape)],
            )
            for name, shape in layout
        ]
    )


def _shares(places: Mapping[Layout, _Places]) -> dict[str, dict[int, float]]:
    """Sums of weights by tensor and by the rank that was held."""
    shares: dict[str, dict[int, float]] = {}
    for layout, held in places.items():
        for name, shape in layout:
            by_rank, rank = shares.setdefault(name, {}), held_rank(name, shape)
            by_rank[rank] = by_rank.get(rank, 0.0) + held.share
    return shares


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
