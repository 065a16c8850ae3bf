"""What a strategy may do besides its two verbs: learn from rounds, keep a state.

Most strategies do neither, so whoever runs them calls these functions, which
do nothing for a strategy without memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from broker_server.strategies.strategy import Adapter, Strategy

State = Mapping[str, NDArray[np.float32]]
"""Tensors by name, to be stored with a run's checkpoint."""


@dataclass(frozen=True)
class RoundOutcome:
    """How a committed round went.

    Attributes:
        round_number: from 1; 0 is the adapter before the first round.
        accuracy: of the new global adapter on the held-out examples, 0 to 1.
        duration_s: from the first assignment to the new global adapter.
    """

    round_number: int
    accuracy: float
    duration_s: float


@runtime_checkable
class LearnsFromRounds(Protocol):
    """A strategy whose configuration depends on how earlier rounds went."""

    def observe_round(self, outcome: RoundOutcome) -> None:
        """Take note of a round; a round that was seen before changes nothing."""
        ...


@runtime_checkable
class KeepsState(Protocol):
    """A strategy with tensors that must outlive the server process."""

    def state(self) -> dict[str, NDArray[np.float32]]:
        """What to store when a round is committed."""
        ...

    def restore(self, state: State) -> None:
        """Go on from a stored state."""
        ...


@runtime_checkable
class LearnsRanks(Protocol):
    """A strategy that gives layers other ranks while a run goes on."""

    def with_learned_ranks(self, adapter: Adapter, gradients: Sequence[Sequence[float]]) -> Adapter:
        """The new global adapter with the ranks of the next round.

        Args:
            adapter: as aggregated; called once for every round.
            gradients: by device, root mean square of a value's gradient in each
                layer that it trained, the output layer last; empty where unknown.
        """
        ...


def with_learned_ranks(
    strategy: Strategy, adapter: Adapter, gradients: Sequence[Sequence[float]]
) -> Adapter:
    """See ``LearnsRanks``; the adapter itself for a strategy that does not."""
    if isinstance(strategy, LearnsRanks):
        return strategy.with_learned_ranks(adapter, gradients)
    return adapter


def learn_from_round(strategy: Strategy, outcome: RoundOutcome) -> None:
    """Tell a strategy how a round went.

    After a restart, tell it every committed round again, in order: what a
    strategy learned is a function of the rounds it was told.
    """
    if isinstance(strategy, LearnsFromRounds):
        strategy.observe_round(outcome)


def saved_state(strategy: Strategy) -> dict[str, NDArray[np.float32]]:
    """Tensors to store with the checkpoint; empty for a strategy without any."""
    return strategy.state() if isinstance(strategy, KeepsState) else {}


def restore_state(strategy: Strategy, state: State) -> None:
    """Give a strategy back what ``saved_state`` returned before a restart."""
    if isinstance(strategy, KeepsState):
        strategy.restore(state)
