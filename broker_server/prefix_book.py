"""Which prefix every device applies, and whose cache of it is how full.

With a prefix that is kept, a device loads the layers that it trains and, if there is one, the
snapshot of those below; what its cache holds is reckoned from the assignments that it did. An
estimate: a device that lost its cache is slower once than predicted. Pure values; the shell makes
the blobs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pydantic import BaseModel, ConfigDict

from broker_server.strategies.prefix import PrefixRule
from broker_server.strategies.strategy import DeviceCapacity
from wire_protocol.lora import LoraConfig
from wire_protocol.messages import Prefix, UpdateManifest
from wire_protocol.parts import BlobRef


class AdapterCut(BaseModel):
    """A global adapter parted at one depth.

    Attributes:
        top: the layers of that depth and the head.
        bottom: the layers below; None at full depth.
        narrow: by rank, ``top`` with no more than that rank in the layers of that depth.
    """

    model_config = ConfigDict(frozen=True)

    top: BlobRef
    bottom: BlobRef | None = None
    narrow: dict[int, BlobRef] = {}


class WarmPrefix(BaseModel):
    """What a device's cache is reckoned to hold of the present prefix.

    Attributes:
        depth: the deepest that it trained: its states serve this depth and less.
        examples: that it visited at that depth or deeper.
    """

    model_config = ConfigDict(frozen=True)

    depth: int
    examples: int


class PrefixCheckpoint(BaseModel):
    """The book, as it survives a restart.

    Attributes:
        cuts: of the present global adapter, depth 1 first.
        snapshot: of the adapter whose lower layers are applied; empty unless periodic.
    """

    model_config = ConfigDict(frozen=True)

    cuts: tuple[AdapterCut, ...] = ()
    snapshot: tuple[AdapterCut, ...] = ()
    warm: dict[str, WarmPrefix] = {}

    def blobs(self) -> set[str]:
        """Digests that must stay in the blob store."""
        refs = [ref for cut in self.cuts for ref in (cut.top, *cut.narrow.values())]
        refs += [cut.bottom for cut in (*self.cuts, *self.snapshot) if cut.bottom]
        return {ref.sha256 for ref in refs}


class PrefixBook:
    """The prefix of a run; does nothing while the rule is ``synced``.

    Args:
        rule: of the run.
        checkpoint: where to begin, or to go on after a restart.
    """

    def __init__(self, rule: PrefixRule, checkpoint: PrefixCheckpoint) -> None:
        self._rule = rule
        self._cuts = checkpoint.cuts
        self._snapshot = checkpoint.snapshot
        self._warm = dict(checkpoint.warm)
        self._rounds_left: int | None = None

    def begin_round(self, round_number: int) -> None:
        """Refresh a periodic prefix when it is due; doing it again changes nothing."""
        self._rounds_left = self._rule.rounds_left(round_number)
        if self._rule.refreshes(round_number) and self._snapshot != self._cuts:
            self._snapshot = self._cuts
            self._warm.clear()

    def base(self, lora: LoraConfig) -> BlobRef | None:
        """What a device with this LoRA config loads; None for the whole adapter."""
        if not self._cuts:
            return None
        cut = self._cuts[lora.depth - 1]
        wide_enough = [rank for rank in cut.narrow if rank >= max(lora.ranks)]
        return cut.narrow[min(wide_enough)] if wide_enough else cut.top

    def prefix(self, depth: int) -> Prefix | None:
        """What it applies below; None for the lower layers of what it loads."""
        if not self._rule.is_kept:
            return None
        below = self._snapshot[depth - 1].bottom if self._snapshot else None
        return Prefix(adapter=below, rounds_left=self._rounds_left)

    @property
    def version(self) -> str:
        """Names what is applied; equal versions give equal hidden states."""
        bottom = self._snapshot[0].bottom if self._snapshot else None
        return bottom.sha256 if bottom else self._rule.mode

    def known(self, capacity: DeviceCapacity) -> DeviceCapacity:
        """The capacity, and what the cache holds."""
        warm = self._warm.get(capacity.device_id)
        if warm is None:
            return capacity
        return replace(capacity, warm_depth=warm.depth, warm_examples=warm.examples)

    def learn(self, updates: Mapping[str, UpdateManifest], cuts: tuple[AdapterCut, ...]) -> None:
        """Note the accepted updates of a round, by device, and the adapter that came of them."""
        self._cuts = cuts
        if self._rule.is_kept:
            for device_id, manifest in updates.items():
                self._learn(device_id, manifest)

    def _learn(self, device_id: str, manifest: UpdateManifest) -> None:
        examples, report = manifest.examples, manifest.report
        depth = sum(rank > 0 for rank in manifest.ranks)
        visited = min(examples, report.steps_done * report.batch_size)
        before = self._warm.get(device_id)
        if before is not None and before.depth >= depth:
            # States at a lower boundary serve; which of the examples are new is not known.
            share = 1.0 - before.examples / examples if before.examples < examples else 0.0
            held = min(examples, before.examples + round(visited * share))
            self._warm[device_id] = WarmPrefix(depth=before.depth, examples=held)
        else:
            self._warm[device_id] = WarmPrefix(depth=depth, examples=visited)

    def checkpoint(self) -> PrefixCheckpoint:
        """What to save."""
        return PrefixCheckpoint(cuts=self._cuts, snapshot=self._snapshot, warm=self._warm)
