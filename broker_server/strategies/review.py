"""One round under review: look at every update, then judge each against the others.

The rules are in ``defence``; here they meet the updates of one round.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from broker_server.strategies.defence import Defence, Finding, Verdict
from broker_server.strategies.strategy import Adapter
from broker_server.strategies.update_sizes import PRODUCT, Ruler, UpdateSizes, block_of
from broker_server.strategies.updates import UpdateCheck, held_rank, rank_axis
from wire_protocol.errors import ProtocolError

LEAST_SAMPLE = 3
"""Fewer holders have no median worth the name; the block's kind stands in then."""

SPREAD = 4.0
"""Blocks of one kind differ by less: few holders cannot make their own block's norm."""


class Review:
    """One round's updates: first look at all of them, then judge each.

    Holds a few figures per update, never the update.

    Args:
        defence: what is usual; ``settled`` adds this round to it.
        global_adapter: what the updates are deltas against.
    """

    def __init__(self, defence: Defence, global_adapter: Adapter) -> None:
        self._defence = defence
        self._rule = defence.rule
        self._old = global_adapter
        self._check = UpdateCheck(global_adapter)
        self._ruler = Ruler(global_adapter)
        self._sizes: dict[str, UpdateSizes] = {}
        self._weights: dict[str, float] = {}
        self._malformed: dict[str, str] = {}
        self._usual: dict[str, float] | None = None
        self._holders = {
            name: np.zeros(held_rank(name, old.shape)) for name, old in global_adapter.items()
        }
        self._counted = 0

    def look(self, device_id: str, update: Adapter, *, weight: float, steps: int) -> None:
        """Measure one update of the round; what does not fit will be refused."""
        try:
            self._check.admit(device_id, update, weight=weight, steps=steps)
        except ProtocolError as error:
            self._malformed[device_id] = str(error)
            return
        self._sizes[device_id] = self._ruler.measure(update, steps=steps)
        self._weights[device_id] = weight

    def judge(self, device_id: str) -> Verdict:
        """How an update counts; all must have been looked at before."""
        if device_id in self._malformed:
            return _refusal(device_id, self._malformed[device_id])
        sizes, usual = self._sizes[device_id], self._usual_sizes()
        ratios = {
            block: size / usual[block] for block, size in sizes.blocks.items() if usual.get(block)
        }
        worst = max(ratios, key=lambda block: (ratios[block], block), default=None)
        limit = self._rule.refuse_limit
        if worst is not None and limit is not None and ratios[worst] > limit:
            reason = f"{worst} is {ratios[worst]:.1f} times its usual size (limit {limit:g})"
            return _refusal(device_id, reason)
        scales, findings = self._clip(device_id, sizes, ratios)
        weight, more = self._weight(device_id)
        return Verdict(scales, weight, (*findings, *more))

    def count(self, update: Adapter) -> None:
        """Note which rows a counted update holds."""
        self._counted += 1
        for name, delta in update.items():
            self._holders[name][: held_rank(name, delta.shape)] += 1

    def settled(self, new: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        """Pull rows with few holders toward their old value, and remember the round."""
        for block, size in self._round_medians().items():
            usual = self._usual_sizes().get(block) or size
            self._defence.remember(block, min(size, self._rule.clip_limit * usual))
        # A fleet smaller than ``few_holders`` must not be slowed down for its size.
        few = min(self._rule.few_holders, self._counted)
        return {name: self._shrunk(name, values, few) for name, values in new.items()}

    def _usual_sizes(self) -> dict[str, float]:
        if self._usual is None:
            medians = self._round_medians()
            kinds = self._kind_medians()
            usual: dict[str, float] = {}
            for block in sorted({block for block, _ in self._all_sizes()}):
                size, pooled = self._defence.usual(block, medians.get(block)), kinds[_kind(block)]
                if size is None:
                    size = pooled
                elif pooled is not None and _kind(block) != PRODUCT:
                    size = min(size, SPREAD * pooled)
                if size is not None:
                    usual[block] = size
            self._usual = usual
        return self._usual

    def _all_sizes(self) -> Iterable[tuple[str, float]]:
        for sizes in self._sizes.values():
            yield from sizes.blocks.items()
            for module in sizes.products:
                yield f"{module}.{PRODUCT}", sizes.product_size(module)

    def _round_medians(self) -> dict[str, float]:
        """Median over holders by block, where enough hold it; updates of zeros say nothing."""
        samples: dict[str, list[float]] = {}
        for block, size in self._all_sizes():
            samples.setdefault(block, []).extend([size] if size > 0 else [])
        enough = {block: s for block, s in samples.items() if len(s) >= LEAST_SAMPLE}
        return {block: float(np.median(sample)) for block, sample in enough.items()}

    def _kind_medians(self) -> dict[str, float | None]:
        """Median over all holders and layers, by kind of block."""
        samples: dict[str, list[float]] = {}
        for block, size in self._all_sizes():
            samples.setdefault(_kind(block), []).extend([size] if size > 0 else [])
        return {
            kind: float(np.median(sample)) if len(sample) >= LEAST_SAMPLE else None
            for kind, sample in samples.items()
        }

    def _clip(
        self, device_id: str, sizes: UpdateSizes, ratios: Mapping[str, float]
    ) -> tuple[dict[str, float], tuple[Finding, ...]]:
        limit, usual = self._rule.clip_limit, self._usual_sizes()
        by_block = {block: limit / ratio for block, ratio in ratios.items() if ratio > limit}
        excess = {block: ratio for block, ratio in ratios.items() if ratio > limit}
        for module, parts in sizes.products.items():
            block = f"{module}.{PRODUCT}"
            if not usual.get(block):
                continue
            of_a, of_b = f"{module}.lora_A", f"{module}.lora_B"
            scale_a, scale_b = by_block.get(of_a, 1.0), by_block.get(of_b, 1.0)
            most = limit * usual[block] * sizes.pace * math.sqrt(parts.values)
            scale = parts.scale_within(most, scale_a, scale_b)
            if scale < 1.0:
                by_block.update({of_a: scale_a * scale, of_b: scale_b * scale})
                excess[block] = sizes.product_size(module) / usual[block]
        scales = {
            name: _below(by_block[block_of(name)])
            for name in self._old
            if block_of(name) in by_block
        }
        if not excess:
            return {}, ()
        worst = max(excess, key=lambda block: (excess[block], block))
        more = f", and {len(excess) - 1} more" if len(excess) > 1 else ""
        reason = f"{worst} is {excess[worst]:.1f} times its usual size (limit {limit:g}){more}"
        return scales, (Finding(device_id, "clipped", reason),)

    def _weight(self, device_id: str) -> tuple[float, tuple[Finding, ...]]:
        weight, limit = self._weights[device_id], self._rule.weight_limit
        if limit is None or len(self._weights) < LEAST_SAMPLE:
            return weight, ()
        most = limit * float(np.median(list(self._weights.values())))
        if weight <= most:
            return weight, ()
        reason = f"it claims {weight:.0f} examples; counted as {most:.0f}, {limit:g} times the"
        return most, (Finding(device_id, "weight", f"{reason} usual number"),)

    def _shrunk(self, name: str, values: NDArray[np.float32], few: int) -> NDArray[np.float32]:
        holders = self._holders[name]
        weak = (holders > 0) & (holders < few)
        if not weak.any():
            return values
        trust = np.where(weak, holders / few, 1.0)
        if rank_axis(name) == 0:
            trust, weak = trust[:, np.newaxis], weak[:, np.newaxis]
        old = self._old[name].astype(np.float64)
        # Only the weak rows: arithmetic would change the last bit of the others.
        return np.where(weak, old + trust * (values - old), values).astype(np.float32)


def _refusal(device_id: str, reason: str) -> Verdict:
    return Verdict({}, 0.0, (Finding(device_id, "refused", reason),))


def _below(scale: float) -> float:
    """The float32 not above a scale, so that rounding never lets a norm pass its limit."""
    nearest = np.float32(scale)
    return float(nearest if nearest <= scale else np.nextafter(nearest, np.float32(0)))


def _kind(block: str) -> str:
    return block.rpartition(".")[2]
