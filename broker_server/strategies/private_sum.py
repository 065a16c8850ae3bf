"""User-level differential privacy: a noisy sum over a denominator that is known before.

    clipped_i = u_i min(1, C / ||u_i||)       the whole update, A, B and head together
    new       = old + eta (sum_i clipped_i + N(0, (z C)^2)) / n_row

One device changes the sum by at most C, because the norm is that of its whole
concatenated update; that both factors are aggregated does not matter. n_row is the
number of devices that were *assigned* the row, whether they answered or not: the
number of answers would depend on them. Every device counts as one, because a claimed
number of examples has no bound. Rows that were assigned to nobody get no noise and
keep their value; nothing that a device sends for them counts.

Neighbouring data sets differ in the update of one device, which is replaced by zeros
(add or remove within a known cohort). Which devices take part, what they can do and
what they were assigned is taken to be known. What that costs in epsilon is reckoned
in ``broker_server.privacy``.

Source: Gaussian mechanism on clipped sums, DP-FedAvg (arXiv:1710.06963) with its
fixed denominator; per row as LEGEND's holders need it, by us.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from broker_server.strategies.aggregate import HolderMean
from broker_server.strategies.defence import Finding
from broker_server.strategies.strategy import Adapter, Factors
from broker_server.strategies.update_sizes import whole_norm
from broker_server.strategies.updates import rank_axis
from wire_protocol.errors import ProtocolError
from wire_protocol.model_family import layer_of

ROUNDING = 1.1
"""A device clips before its codec rounds; as little above the norm is no offence."""


@dataclass(frozen=True)
class Assigned:
    """What one device was asked to train, whether it answered or not."""

    ranks: tuple[int, ...]
    factors: Factors = "both"


@dataclass(frozen=True)
class PrivacyRule:
    """How much one device may change, and what hides it.

    Attributes:
        clip_norm: C, largest norm of a whole update.
        noise_multiplier: z, noise per value in units of C; 0 hides nothing and
            exists for tests.
    """

    clip_norm: float
    noise_multiplier: float


def expected_holders(
    global_adapter: Adapter, assigned: Iterable[Assigned]
) -> dict[str, NDArray[np.float64]]:
    """Devices that were assigned each rank row, shaped to broadcast against the tensor."""
    counts = {name: _counts(name, old) for name, old in global_adapter.items()}
    for one in assigned:
        for name, count in counts.items():
            layer, axis = layer_of(name), rank_axis(name)
            if layer is None or axis is None:
                count += 1.0  # noqa: PLW2901 - in place: the array, not the name
            elif one.factors in ("both", name[-1]):
                rows = (slice(None),) * axis + (slice(one.ranks[layer]),)
                count[rows] += 1.0
    return counts


def clipped(update: Adapter, clip_norm: float) -> dict[str, NDArray[np.float64]]:
    """The update scaled down to a norm of at most ``clip_norm``, in float64.

    Raises:
        ProtocolError: its norm is not a number.
    """
    norm = whole_norm(update)
    if not np.isfinite(norm):
        raise ProtocolError("the norm of an update is not finite")
    scale = min(1.0, clip_norm / norm) if norm > 0 else 1.0
    return {name: delta.astype(np.float64) * scale for name, delta in update.items()}


class PrivateSum:
    """Clipped updates, summed; noise once, at the end.

    Args:
        global_adapter: what every update is a delta against.
        plain: the strategy's own aggregation: its checks and its server step.
        rule: norm and noise.
        assigned: every assignment of the round.
        generator: of the noise; must be seeded from the operating system.
    """

    def __init__(
        self,
        global_adapter: Adapter,
        plain: HolderMean,
        rule: PrivacyRule,
        *,
        assigned: Sequence[Assigned],
        generator: np.random.Generator,
    ) -> None:
        self._old = global_adapter
        self._plain = plain
        self._rule = rule
        self._expected = expected_holders(global_adapter, assigned)
        self._generator = generator
        self._sums = {name: np.zeros(old.shape) for name, old in global_adapter.items()}
        self.findings: list[Finding] = []

    def add(self, device_id: str, update: Adapter, *, weight: float, steps: int) -> None:
        """Add one update, clipped; see ``Aggregation.add``. Its weight does not count.

        Raises:
            ProtocolError: see ``HolderMean.add``.
        """
        self._plain.admit(device_id, update, weight=weight, steps=steps)
        norm, most = whole_norm(update), self._rule.clip_norm
        if norm > most * ROUNDING:
            reason = f"its norm is {norm:.3g}, above clip_norm {most:g}: the device did not clip"
            self.findings.append(Finding(device_id, "clipped", reason))
        for name, delta in clipped(update, most).items():
            self._sums[name][tuple(slice(size) for size in delta.shape)] += delta

    def result(self) -> dict[str, NDArray[np.float32]]:
        """The new global adapter, with the names and shapes of the old one."""
        sigma = self._rule.noise_multiplier * self._rule.clip_norm
        new: dict[str, NDArray[np.float32]] = {}
        # By name: a decoder may bring tensors in any order, and noise for tests must not care.
        for name, old in sorted(self._old.items()):
            count = self._expected[name]
            noise = self._generator.normal(0.0, sigma, old.shape) if sigma > 0 else 0.0
            mean = np.zeros(old.shape)
            np.divide(self._sums[name] + noise, count, out=mean, where=count > 0)
            new[name] = self._plain.follow(name, mean, count > 0)
        return new


def _counts(name: str, old: NDArray[np.float32]) -> NDArray[np.float64]:
    axis = rank_axis(name)
    return np.zeros(tuple(size if i == axis else 1 for i, size in enumerate(old.shape)))
