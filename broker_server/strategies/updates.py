"""What an update must look like before any aggregator may add it.

Knows names and shapes; knows no way to aggregate.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from broker_server.strategies.strategy import Adapter
from wire_protocol.errors import ProtocolError
from wire_protocol.tensors import not_finite

Allowed = Literal["any", "pairs", "B", "one"]
"""Factors that updates may hold: any; A and B of a module together; only B; one of
the two, the same in all updates of a round."""

Layout = tuple[tuple[str, tuple[int, ...]], ...]
"""Names and shapes of an update in its order; devices with equal configs send equal ones."""


class UpdateCheck:
    """Refuses what does not fit the global adapter, before anything is added.

    Args:
        global_adapter: what every update is a delta against.
        allowed: factors that updates may hold.
    """

    def __init__(self, global_adapter: Adapter, allowed: Allowed = "any") -> None:
        self._shapes = {name: values.shape for name, values in global_adapter.items()}
        self._partners = {name: _partner(name) for name in global_adapter}
        self._allowed = allowed
        self._devices: set[str] = set()
        self._fitting: set[Layout] = set()
        self._factor = "lora_B" if allowed == "B" else None

    def admit(self, device_id: str, update: Adapter, *, weight: float, steps: int) -> Layout:
        """Accept an update and remember its device; a refusal leaves no trace.

        Returns:
            The update's names and shapes.

        Raises:
            ProtocolError: a name, shape, value or factor that was not asked for,
                a weight that is not positive, no step, or a device admitted before.
        """
        if device_id in self._devices:
            raise ProtocolError(f"device {device_id} sent a second update in one round")
        if not update:
            raise ProtocolError(f"update of device {device_id} holds no tensor")
        layout = layout_of(update)
        if layout not in self._fitting:
            for name, delta in update.items():
                self._check_tensor(device_id, name, delta)
            for name in update:
                self._check_pair(device_id, name, update)
        bad = not_finite(update)
        if bad is not None:
            raise ProtocolError(f"{bad} of device {device_id} holds values that are not finite")
        factor = self._checked_factor(device_id, update)
        if not (math.isfinite(weight) and weight > 0 and steps >= 1):
            raise ProtocolError(
                f"update of device {device_id} has weight {weight} and {steps} steps;"
                " both must be positive"
            )
        self._factor = factor
        self._fitting.add(layout)
        self._devices.add(device_id)
        return layout

    def _check_tensor(self, device_id: str, name: str, delta: NDArray[np.float32]) -> None:
        expected = self._shapes.get(name)
        if expected is None:
            raise ProtocolError(f"update of device {device_id} has unknown {name[:80]!r}")
        if delta.shape != expected and not _nests(name, delta.shape, expected):
            raise ProtocolError(
                f"{name} of device {device_id} has shape {delta.shape}, expected {expected}"
                " or fewer ranks"
            )

    def _check_pair(self, device_id: str, name: str, update: Adapter) -> None:
        partner_name = self._partners[name]
        if partner_name is None:
            return
        partner = update.get(partner_name)
        axis = rank_axis(name) or 0
        if partner is None and self._allowed == "pairs":
            raise ProtocolError(f"update of device {device_id} holds {name} without its partner")
        if partner is not None and partner.shape[1 - axis] != update[name].shape[axis]:
            raise ProtocolError(f"{name} of device {device_id} has another rank than its partner")

    def _checked_factor(self, device_id: str, update: Adapter) -> str | None:
        """The one factor of this round so far, this update included."""
        if self._allowed in ("any", "pairs"):
            return None
        held = {name[-6:] for name in update if rank_axis(name) is not None}
        if self._factor is not None:
            held.add(self._factor)
        if len(held) > 1:
            wanted = self._factor or "one factor"
            raise ProtocolError(
                f"update of device {device_id} holds a factor that it should not have trained;"
                f" this round trains {wanted} alone"
            )
        return next(iter(held), None)


def layout_of(update: Adapter) -> Layout:
    """Names and shapes of an update."""
    return tuple([(name, delta.shape) for name, delta in update.items()])


def rank_axis(name: str) -> int | None:
    """Axis that counts ranks; None for the head, which is held whole."""
    if name.endswith("lora_A"):
        return 0
    return 1 if name.endswith("lora_B") else None


def held_rank(name: str, shape: tuple[int, ...]) -> int:
    """Rank rows of a tensor of this shape; the head is one row."""
    axis = rank_axis(name)
    return 1 if axis is None else shape[axis]


def _partner(name: str) -> str | None:
    """The other factor of a module; None for the head."""
    if rank_axis(name) is None:
        return None
    return name[:-1] + ("B" if name.endswith("A") else "A")


def _nests(name: str, part: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    axis = rank_axis(name)
    if len(part) != len(whole):
        return False
    return all(
        0 < mine <= full if i == axis else mine == full
        for i, (mine, full) in enumerate(zip(part, whole, strict=True))
    )
