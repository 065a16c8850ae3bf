"""Ranks by what layers turn out to need: importance from gradients, and adapters of other ranks.

Knows numbers: gradient sizes in, ranks and resized factors out; no device, no paper's defaults.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from broker_server.strategies.product_mean import best_product
from broker_server.strategies.strategy import Adapter
from broker_server.strategies.updates import rank_axis
from wire_protocol.lora import MAX_RANK
from wire_protocol.model_family import layer_of

State = Mapping[str, NDArray[np.float32]]
_EMPHASIS_MAX = 100.0
"""No layer counts for more or less than this many output layers, whatever devices say."""


def relative_importance(
    gradients: Sequence[Sequence[float]], layer_count: int
) -> NDArray[np.float64]:
    """Size of a value's gradient in every layer over that in the output layer, (L,).

    The median over the devices that trained the layer; NaN for a layer that nobody did.

    Args:
        gradients: by device, from its lowest trained layer to the output; those without
            a usable last value do not count.
        layer_count: L.
    """
    table = np.full((len(gradients), layer_count), np.nan)
    for row, sizes in zip(table, gradients, strict=True):
        held = np.array(sizes[-layer_count:], dtype=np.float64)
        if len(held) and held[-1] > 0:
            row[layer_count - len(held) :] = held / held[-1]
    known = ~np.isnan(table).all(axis=0)
    found = np.full(layer_count, np.nan)
    found[known] = np.nanmedian(table[:, known], axis=0)
    bounded: NDArray[np.float64] = np.clip(found, 1 / _EMPHASIS_MAX, _EMPHASIS_MAX)
    return bounded


def ranks_by_importance(importance: NDArray[np.float64], budget: int) -> tuple[int, ...]:
    """Share out units of rank: never falling toward the output, at least one each.

    r_l proportional to the closest sequence that does not fall (least squares), then
    whole numbers that use up the budget, remainders to those nearest their next unit.

    Args:
        importance: of every layer, (L,), positive; NaN counts as the layer above.
        budget: sum of the ranks, at least L and at most L times ``MAX_RANK``.
    """
    filled = importance.copy()
    for layer in range(len(filled) - 1, -1, -1):
        if np.isnan(filled[layer]):
            filled[layer] = filled[layer + 1] if layer + 1 < len(filled) else 1.0
    rising = _not_falling(filled)
    spare = budget - len(rising)
    exact = np.minimum(1.0 + spare * rising / rising.sum(), float(MAX_RANK))
    ranks = np.floor(exact).astype(np.int64)
    # Of equal remainders the one nearest the output, so that ranks still do not fall.
    order = np.lexsort((-np.arange(len(ranks)), -(exact - ranks)))
    while ranks.sum() < budget:
        room = order[ranks[order] < MAX_RANK][: budget - int(ranks.sum())]
        ranks[room] += 1
    return tuple(np.sort(ranks).tolist())


def resized(adapter: Adapter, ranks: Sequence[int], *, seed: int) -> dict[str, NDArray[np.float32]]:
    """The same adapter with other ranks; a layer that keeps its rank keeps every bit.

    A smaller rank keeps the best product that it can hold; a larger one gets new rows of
    A at random beside zero columns of B, which change nothing yet.

    Args:
        adapter: with LoRA factors of every layer.
        ranks: at every layer, at least 1.
        seed: of the new rows.
    """
    new = {name: values.copy() for name, values in adapter.items()}
    for name, down in adapter.items():
        layer = layer_of(name)
        if layer is None or not name.endswith("lora_A") or down.shape[0] == ranks[layer]:
            continue
        module = name.removesuffix("lora_A")
        up = adapter[f"{module}lora_B"]
        new[f"{module}lora_A"], new[f"{module}lora_B"] = _of_rank(
            down, up, ranks[layer], np.random.default_rng([seed, len(new), *map(ord, name)])
        )
    return new


@dataclass
class LearnedRanks:
    """What a run has learned about its layers, and the ranks that follow.

    Attributes:
        every: rounds between two decisions.
        rho: weight of the past in the importance of a layer.
        ranks: at every layer; None before the first decision.
    """

    every: int
    rho: float
    ranks: tuple[int, ...] | None = None
    _importance: NDArray[np.float64] | None = field(default=None, init=False)
    _rounds: int = field(default=0, init=False)

    def after_round(self, adapter: Adapter, gradients: Sequence[Sequence[float]]) -> Adapter:
        """Take note of a round; every so many rounds, the adapter with other ranks."""
        now = _ranks_of(adapter)
        self._note(relative_importance(gradients, len(now)))
        self._rounds += 1
        if self._rounds % self.every or self._importance is None:
            return adapter
        self.ranks = ranks_by_importance(self._importance, sum(now))
        if list(self.ranks) == now:
            return adapter
        return resized(adapter, self.ranks, seed=self._rounds)

    def state(self) -> dict[str, NDArray[np.float32]]:
        """Everything, as tensors to be stored."""
        kept = {"ranks/rounds": np.array([self._rounds], dtype=np.float32)}
        if self._importance is not None:
            kept["ranks/importance"] = self._importance.astype(np.float32)
        if self.ranks is not None:
            kept["ranks/ranks"] = np.array(self.ranks, dtype=np.float32)
        return kept

    def restore(self, state: State) -> None:
        """Go on from what ``state`` returned; an empty one begins anew."""
        rounds, importance = state.get("ranks/rounds"), state.get("ranks/importance")
        ranks = state.get("ranks/ranks")
        self._rounds = 0 if rounds is None else int(rounds[0])
        self._importance = None if importance is None else importance.astype(np.float64)
        self.ranks = None if ranks is None else tuple(int(rank) for rank in ranks)

    def _note(self, found: NDArray[np.float64]) -> None:
        if np.isnan(found).all():
            return
        before = found if self._importance is None else self._importance
        known = np.where(np.isnan(before), found, before)
        moved = np.where(np.isnan(found), known, self.rho * known + (1.0 - self.rho) * found)
        # Only what ``state`` can say: a run that was resumed goes on to the same last bit.
        self._importance = moved.astype(np.float32).astype(np.float64)


def _not_falling(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The closest sequence that does not fall, by pooling neighbours that do."""
    pools: list[tuple[float, int]] = []
    for value in values.tolist():
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (mean, count), (before, earlier) = pools.pop(), pools.pop()
            pools.append(((mean * count + before * earlier) / (count + earlier), count + earlier))
    return np.concatenate([np.full(count, mean) for mean, count in pools])


def _of_rank(
    down: NDArray[np.float32], up: NDArray[np.float32], rank: int, generator: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    if rank < down.shape[0]:
        whole = up.astype(np.float64), down.astype(np.float64)
        new_up, new_down = best_product(*whole, down[:rank])
        return new_down, new_up
    bound = 1.0 / np.sqrt(down.shape[1])
    more = rank - down.shape[0]
    rows = generator.uniform(-bound, bound, (more, down.shape[1])).astype(np.float32)
    columns = np.zeros((up.shape[0], more), dtype=np.float32)
    return np.vstack([down, rows]), np.hstack([up, columns])


def _ranks_of(adapter: Adapter) -> list[int]:
    """Rank of every layer."""
    by_layer = {
        layer: values.shape[0]
        for name, values in adapter.items()
        if rank_axis(name) == 0 and (layer := layer_of(name)) is not None
    }
    return [by_layer[layer] for layer in sorted(by_layer)]
