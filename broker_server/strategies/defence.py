"""Defence against poisoned updates: what is far from usual counts less, or not at all.

For every block (a LoRA factor, the product of a module's factors, the head):

    usual    = median over the last rounds of the median over the round's holders
    clipped  if size > clip_limit * usual      scaled down to that limit
    refused  if size > refuse_limit * usual    the whole update is left out

Local steps are Adam's, whose size is bounded by the learning rate: an honest update
is rarely twice as large as the median one, so that nothing is clipped in a fleet
without attackers. A claimed number of examples counts for at most ``weight_limit``
times the median one. Where fewer than ``few_holders`` devices hold a rank row, the
row keeps a part of its old, trusted value:

    new = old + min(1, holders / few_holders) * (aggregated - old)

Medians do not depend on the order of updates. The history is float32 and is saved
with the strategy's state, so that a resumed run decides alike. What it cannot do:
tell an honest minority from attackers by direction, hence it does not try; and help
a block whose holders are mostly attackers from the first round on.

Source: clipping to a running median as in arXiv:1911.07963 (norm bounding), the
product as LoRA needs it, by us.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from broker_server.strategies.strategy import Adapter
from wire_protocol.errors import ConfigError

Estimator = Literal["mean", "trimmed_mean", "median"]

HISTORY_ROUNDS = 8
"""Rounds whose medians make up what is usual: an ambush of one round changes little."""

STATE_PREFIX = "defence/usual/"


@dataclass(frozen=True)
class DefenceRule:
    """How much is too much.

    Attributes:
        clip_limit: times the usual size that a block may have.
        refuse_limit: times the usual size from which an update is left out;
            None never refuses.
        weight_limit: times the median weight that a device may have; None
            believes every weight.
        few_holders: holders from which a rank row is trusted in full; more than 1
            slows down layers that only the deepest devices train.
        estimator: how the updates are put together once they are clipped.
        trim: share of the holders left out at each end by ``trimmed_mean``.

    Raises:
        ConfigError: ``refuse_limit`` lies below ``clip_limit``.
    """

    clip_limit: float = 2.0
    refuse_limit: float | None = 5.0
    weight_limit: float | None = 3.0
    few_holders: int = 1
    estimator: Estimator = "mean"
    trim: float = 0.2

    def __post_init__(self) -> None:
        if self.refuse_limit is not None and self.refuse_limit < self.clip_limit:
            raise ConfigError(
                f"refuse_limit {self.refuse_limit:g} lies below clip_limit {self.clip_limit:g};"
                " refuse what is larger than what is clipped"
            )


@dataclass(frozen=True)
class Finding:
    """What was done about one update, in words for people.

    Attributes:
        verdict: ``refused``, ``clipped``, or ``weight`` for a weight not believed.
    """

    device_id: str
    verdict: Literal["refused", "clipped", "weight"]
    reason: str


@dataclass(frozen=True)
class Verdict:
    """How one update counts.

    Attributes:
        scales: number of at most 1 by tensor; those not named count in full.
        weight: that it counts with; 0 leaves it out.
    """

    scales: Mapping[str, float]
    weight: float
    findings: tuple[Finding, ...] = ()

    @property
    def refused(self) -> bool:
        """True if the update is left out."""
        return self.weight == 0

    def applied(self, update: Adapter) -> Adapter:
        """The update as it counts; the same arrays where nothing is scaled."""
        return {
            name: delta * np.float32(self.scales[name]) if name in self.scales else delta
            for name, delta in update.items()
        }


class Defence:
    """What is usual in a run; lives as long as the run.

    Args:
        rule: how much is too much.
    """

    def __init__(self, rule: DefenceRule | None = None) -> None:
        self.rule = rule or DefenceRule()
        self._history: dict[str, NDArray[np.float32]] = {}

    def usual(self, block: str, now: float | None) -> float | None:
        """Median of the remembered rounds and of this one; None without either."""
        past = [float(value) for value in self._history.get(block, ())]
        sample = past if now is None else [*past, now]
        return float(np.median(sample)) if sample else None

    def remember(self, block: str, size: float) -> None:
        """Add a round's median size of a block."""
        past = self._history.get(block, np.zeros(0, dtype=np.float32))
        self._history[block] = np.append(past, np.float32(size))[-HISTORY_ROUNDS:]

    def state(self) -> dict[str, NDArray[np.float32]]:
        """The history as tensors, to be stored."""
        return {f"{STATE_PREFIX}{block}": sizes for block, sizes in self._history.items()}

    def restore(self, state: Mapping[str, NDArray[np.float32]]) -> None:
        """Go on from what ``state`` returned; other names are left alone."""
        self._history = {
            name[len(STATE_PREFIX) :]: np.array(sizes, dtype=np.float32)
            for name, sizes in state.items()
            if name.startswith(STATE_PREFIX)
        }
