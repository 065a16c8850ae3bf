"""Coordinate-wise trimmed mean and median over the holders of each rank row.

For every coordinate the holders' values are sorted; the lowest and the highest
are left out; the rest is averaged by weight. The median leaves out all but the
middle one or two. Where fewer than ``ENOUGH`` devices hold a row, nothing is left
out: two of four would decide alone what is an outlier.

Neither is linear: a minority that honestly differs (one label on few devices) is
left out like an attacker. That is why it is an option and no default. All updates
of a round are in memory at once.

Source: Yin et al., arXiv:1803.01498; per rank row and by weight, by us.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from broker_server.strategies.aggregate import HolderMean
from broker_server.strategies.strategy import Adapter
from broker_server.strategies.updates import rank_axis

ENOUGH = 5
"""Holders from which values are left out."""

_Part = tuple[NDArray[np.float32], float, int]
"""A delta, its p_i and its steps (1 where steps do not count)."""


class RobustMean:
    """Keeps the updates and puts them together at the end.

    Args:
        global_adapter: what every update is a delta against.
        plain: the strategy's own aggregation: its checks, weights and server step.
        kind: ``trimmed_mean`` or ``median``.
        trim: share of the holders left out at each end by ``trimmed_mean``.
    """

    def __init__(
        self,
        global_adapter: Adapter,
        plain: HolderMean,
        *,
        kind: Literal["trimmed_mean", "median"],
        trim: float,
    ) -> None:
        self._old = global_adapter
        self._plain = plain
        self._kind = kind
        self._trim = trim
        self._parts: dict[str, list[_Part]] = {name: [] for name in global_adapter}

    def add(self, device_id: str, update: Adapter, *, weight: float, steps: int) -> None:
        """Keep one update; see ``Aggregation.add``.

        Raises:
            ProtocolError: see ``HolderMean.add``.
        """
        factor, counted = self._plain.admit(device_id, update, weight=weight, steps=steps)
        for name, delta in update.items():
            self._parts[name].append((delta, factor, counted))

    def result(self) -> dict[str, NDArray[np.float32]]:
        """The new global adapter, with the names and shapes of the old one."""
        most_steps = max((part[2] for parts in self._parts.values() for part in parts), default=1)
        return {name: self._new(name, most_steps) for name in self._old}

    def _new(self, name: str, most_steps: int) -> NDArray[np.float32]:
        old, axis = self._old[name], rank_axis(name)
        mean, held = np.zeros(old.shape), np.zeros(old.shape, dtype=bool)
        begin = 0
        # Ranks nest: between two neighbouring ranks of the cohort the holders are the same.
        ends = {part[0].shape[axis] if axis is not None else 1 for part in self._parts[name]}
        for end in sorted(ends):
            rows = _rows(axis, begin, end)
            holders = [
                part for part in self._parts[name] if axis is None or part[0].shape[axis] >= end
            ]
            mean[rows] = self._middle(holders, rows, most_steps)
            held[rows] = True
            begin = end
        return self._plain.follow(name, mean, held)

    def _middle(
        self, holders: list[_Part], rows: tuple[slice, ...], most_steps: int
    ) -> NDArray[np.float64]:
        # As in FedNova: the mean of updates per step, weighted by examples and steps.
        values = np.stack([d[rows].astype(np.float64) * (most_steps / s) for d, _, s in holders])
        weights = np.array([factor * steps for _, factor, steps in holders], dtype=np.float64)
        weights = np.broadcast_to(weights.reshape(-1, *[1] * (values.ndim - 1)), values.shape)
        left_out = self._left_out(len(holders))
        if left_out:
            # Equal values by weight: which of them is left out must not depend on their order.
            order = np.lexsort((weights, values), axis=0)[left_out : len(holders) - left_out]
            values = np.take_along_axis(values, order, axis=0)
            weights = np.take_along_axis(weights, order, axis=0)
        total: NDArray[np.float64] = np.sum(values * weights, axis=0) / np.sum(weights, axis=0)
        return total

    def _left_out(self, holders: int) -> int:
        """Values left out at each end."""
        if holders < ENOUGH:
            return 0
        if self._kind == "median":
            return (holders - 1) // 2
        return min(int(self._trim * holders), (holders - 1) // 2)


def _rows(axis: int | None, begin: int, end: int) -> tuple[slice, ...]:
    """The rank rows from ``begin`` to ``end``; everything without a rank axis."""
    if axis is None:
        return (slice(None),)
    return (slice(begin, end),) if axis == 0 else (slice(None), slice(begin, end))
