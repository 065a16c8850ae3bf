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

import math

import numpy as np
from numpy.typing import NDArray

from broker_server.strategies.strategy import Adapter
from wire_protocol.errors import ProtocolError


class HolderMean:
    """A running weighted sum with one weight per (tensor, rank row).

    Args:
        global_adapter: what every update is a delta against.
        uniform: count every device as 1 instead of by its examples.
        learning_rate: eta of the server; 1 replaces rows by their mean.

    Source: arXiv:2412.20004, adaptive per-layer aggregation; holders per rank
    row as in RBLA (arXiv:2408.08699) and FediLoRA (arXiv:2509.06984).
    """

    def __init__(
        self, global_adapter: Adapter, *, uniform: bool = False, learning_rate: float = 1.0
    ) -> None:
        self._old = global_adapter
        self._uniform = uniform
        self._learning_rate = learning_rate
        self._devices: set[str] = set()
        self._sums = {name: np.zeros(old.shape) for name, old in global_adapter.items()}
        self._weights = {name: _row_weights(name, old) for name, old in global_adapter.items()}

    def add(self, device_id: str, update: Adapter, *, weight: float, steps: int) -> None:
        """Add one update; see ``Aggregation.add``.

        ``steps`` is checked but does not scale the update: the paper's devices
        all do the same number.

        Raises:
            ProtocolError: a name, shape or value outside the global adapter, a
                weight that is not positive, no step, or a device added before.
        """
        self._check(device_id, update)
        if not (math.isfinite(weight) and weight > 0 and steps >= 1):
            raise ProtocolError(
                f"update of device {device_id} has weight {weight} and {steps} steps;"
                " both must be positive"
            )
        self._devices.add(device_id)
        factor = 1.0 if self._uniform else float(weight)
        for name, delta in update.items():
            held = tuple(slice(size) for size in delta.shape)
            self._sums[name][held] += np.multiply(delta, factor, dtype=np.float64)
            # Axes of length 1 broadcast: slicing them by a longer delta is harmless.
            self._weights[name][held] += factor

    def result(self) -> dict[str, NDArray[np.float32]]:
        """The new global adapter, with the names and shapes of the old one."""
        new: dict[str, NDArray[np.float32]] = {}
        for name, old in self._old.items():
            weight = self._weights[name]
            mean = np.zeros(old.shape)
            np.divide(self._sums[name], weight, out=mean, where=weight > 0)
            new[name] = (old + self._learning_rate * mean).astype(np.float32)
        return new

    def _check(self, device_id: str, update: Adapter) -> None:
        """Look at everything before anything is added, so that a refusal leaves no trace."""
        if device_id in self._devices:
            raise ProtocolError(f"device {device_id} sent a second update in one round")
        if not update:
            raise ProtocolError(f"update of device {device_id} holds no tensor")
        for name, delta in update.items():
            if name not in self._old:
                raise ProtocolError(f"update of device {device_id} has unknown {name[:80]!r}")
            old = self._old[name].shape
            if not _nests(name, delta.shape, old):
                raise ProtocolError(
                    f"{name} of device {device_id} has shape {delta.shape}, expected {old}"
                    " or fewer ranks"
                )
            if not np.isfinite(delta).all():
                raise ProtocolError(
                    f"{name} of device {device_id} holds values that are not finite"
                )


def _rank_axis(name: str) -> int | None:
    """Axis that counts ranks; None for the head, which is held whole."""
    if name.endswith("lora_A"):
        return 0
    return 1 if name.endswith("lora_B") else None


def _row_weights(name: str, old: NDArray[np.float32]) -> NDArray[np.float64]:
    """Zeros that broadcast against the tensor: its length along the rank axis, else 1."""
    axis = _rank_axis(name)
    return np.zeros(tuple(size if i == axis else 1 for i, size in enumerate(old.shape)))


def _nests(name: str, part: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    axis = _rank_axis(name)
    if len(part) != len(whole):
        return False
    return all(
        0 < mine <= full if i == axis else mine == full
        for i, (mine, full) in enumerate(zip(part, whole, strict=True))
    )
