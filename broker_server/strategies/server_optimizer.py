"""Server optimizers: the mean of a round's updates as a pseudo-gradient.

    momentum   m = b1 m + mean              new = old + eta m
    adam       m = b1 m + (1 - b1) mean     v = b2 v + (1 - b2) mean^2
               new = old + eta m / (sqrt(v) + tau)
    yogi       as adam, v = v - (1 - b2) mean^2 sign(v - mean^2)

Moments move only in rank rows that had a holder, so that a layer which nobody
trained neither drifts on old momentum nor forgets it. Knows no aggregation.

Source: FedAvgM (arXiv:1909.06335), FedAdam and FedYogi (arXiv:2003.00295); lazy
rows as in lazy Adam, by us.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from wire_protocol.errors import ConfigError

OptimizerName = Literal["none", "momentum", "adam", "yogi"]

ADAPTIVE_RATE_MAX = 0.1
"""Above this an adaptive optimizer would move every value by more than it is worth."""


class ServerOptimizer:
    """Moments of one run, tensor by tensor; lives as long as the run.

    A round must call ``moved`` once for every tensor.

    Args:
        kind: ``momentum``, ``adam`` or ``yogi``.
        learning_rate: eta.
        momentum: b1.
        decay: b2; not used by ``momentum``.
        tau: keeps adam and yogi from dividing by nothing; v begins at its square.
    """

    def __init__(
        self,
        kind: OptimizerName,
        *,
        learning_rate: float,
        momentum: float = 0.9,
        decay: float = 0.99,
        tau: float = 1e-3,
    ) -> None:
        self._kind = kind
        self._learning_rate = learning_rate
        self._momentum = momentum
        self._decay = decay
        self._tau = tau
        self._first: dict[str, NDArray[np.float64]] = {}
        self._second: dict[str, NDArray[np.float64]] = {}

    def moved(
        self,
        name: str,
        old: NDArray[np.float32],
        mean: NDArray[np.float64],
        held: NDArray[np.bool_],
    ) -> NDArray[np.float64]:
        """See ``ServerStep.moved``."""
        first = self._first.get(name, np.zeros(old.shape))
        fresh = mean if self._kind == "momentum" else (1 - self._momentum) * mean
        first = _as_stored(np.where(held, self._momentum * first + fresh, first))
        self._first[name] = first
        direction = first
        if self._kind != "momentum":
            second = self._second.get(name, np.full(old.shape, self._tau**2))
            second = _as_stored(np.where(held, self._squares(second, mean**2), second))
            self._second[name] = second
            direction = first / (np.sqrt(second) + self._tau)
        return np.where(held, old + self._learning_rate * direction, old)

    def state(self) -> dict[str, NDArray[np.float32]]:
        """The moments as tensors, to be stored: ``first/NAME`` and ``second/NAME``."""
        return {
            f"{part}/{name}": values.astype(np.float32)
            for part, moments in (("first", self._first), ("second", self._second))
            for name, values in moments.items()
        }

    def restore(self, state: Mapping[str, NDArray[np.float32]]) -> None:
        """Go on from what ``state`` returned."""
        for part, moments in (("first", self._first), ("second", self._second)):
            moments.clear()
            for name, values in state.items():
                if name.startswith(f"{part}/"):
                    moments[name[len(part) + 1 :]] = values.astype(np.float64)

    def _squares(
        self, second: NDArray[np.float64], square: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        if self._kind == "adam":
            return self._decay * second + (1 - self._decay) * square
        return second - (1 - self._decay) * square * np.sign(second - square)


def _as_stored(moments: NDArray[np.float64]) -> NDArray[np.float64]:
    """Only what ``state`` can say: a run that was resumed then goes on to the same last bit."""
    return moments.astype(np.float32).astype(np.float64)


def server_optimizer(
    kind: OptimizerName, *, learning_rate: float, momentum: float
) -> ServerOptimizer | None:
    """The optimizer of a strategy's options; None for the plain mean.

    Raises:
        ConfigError: a learning rate for the mean, given to an adaptive optimizer.
    """
    if kind == "none":
        return None
    if kind != "momentum" and learning_rate > ADAPTIVE_RATE_MAX:
        raise ConfigError(
            f"server_learning_rate {learning_rate:g} with server_optimizer {kind} would move"
            " every value by about as much in a round; give one near 0.001"
        )
    return ServerOptimizer(kind, learning_rate=learning_rate, momentum=momentum)
