"""What follows a round's aggregation: its adapter as a folder, its results, its spent blobs.

Everything here may be repeated: a server that is killed in the middle does it again.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import anyio

from broker_server.blobs import BlobStore
from broker_server.export import AdapterCard, export_adapter
from broker_server.run_folder import ADAPTER_FOLDER, remove_leftovers
from broker_server.run_spec import PrivacySettings
from broker_server.run_state import RoundResult, RunCheckpoint
from broker_server.store import Store
from wire_protocol.heap import give_back
from wire_protocol.messages import UpdateManifest
from wire_protocol.model_family import ModelShape
from wire_protocol.parts import BlobRef
from wire_protocol.tensors import decode

CANDIDATE_FOLDER = ".candidate"


@dataclass(frozen=True)
class RunContext:
    """What stays the same during a run, besides the plan."""

    run_id: str
    name: str
    model_dir: Path
    model_name: str
    model_shape: ModelShape
    labels: tuple[str, ...]
    evaluation_sha256: str
    privacy: PrivacySettings | None = None


@dataclass
class Delivery:
    """Puts what a run has come to where people find it.

    Args:
        context: names and shapes of the run.
        folder: where the results go.
        on_commit: told about every committed round.
    """

    context: RunContext
    store: Store
    blobs: BlobStore
    folder: Path
    on_commit: Callable[[str], Awaitable[object]]
    spent: set[str] = field(default_factory=set)
    """Digests that nobody asks for once the round that is open now is committed."""

    def export(
        self, adapter: BlobRef, metrics: Mapping[str, float | int | str | None], name: str
    ) -> Path:
        """Write the adapter as a PEFT folder: what is evaluated is what is delivered."""
        card = AdapterCard(
            title=f"{self.context.name}, round {metrics['round']}",
            base_model=self.context.model_name,
            labels=self.context.labels,
            metrics=metrics,
        )
        tensors = decode(self.blobs.read(adapter.sha256))
        folder = self.folder / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        # A candidate is scored and thrown away; what is delivered stays.
        flush = name != CANDIDATE_FOLDER
        export_adapter(tensors, self.context.model_dir, folder, card=card, flush=flush)
        return folder

    async def after_commit(self, done: RoundResult, checkpoint: RunCheckpoint) -> None:
        """Deliver a committed round and drop what it was made of; may be repeated."""
        metrics = {"round": done.round, "accuracy": done.accuracy, "loss": done.loss}
        export = functools.partial(self.export, checkpoint.adapter, metrics, ADAPTER_FOLDER)
        await anyio.to_thread.run_sync(export)
        await self.on_commit(self.context.run_id)
        # Committed: nobody will ask again for what this round was made of.
        kept = {checkpoint.adapter.sha256, self.context.evaluation_sha256}
        for sha256 in self.spent - kept - checkpoint.prefix.blobs():
            self.blobs.remove(sha256)
        self.spent = set()
        await anyio.to_thread.run_sync(give_back)

    async def finish_last_commit(self) -> None:
        """Do what a server that was killed right after a commit had still to do."""
        run_id = self.context.run_id
        record, last = self.store.run(run_id), self.store.last_round(run_id)
        if record is None or record.checkpoint is None or last is None:
            return
        await anyio.to_thread.run_sync(remove_leftovers, self.folder)
        checkpoint = RunCheckpoint.model_validate_json(record.checkpoint)
        if checkpoint.members:
            # The next round is open, so that was done; and this one may hold the same bytes.
            return
        done = RoundResult.model_validate_json(last)
        for text in self.store.updates(run_id, done.round).values():
            manifest = UpdateManifest.model_validate_json(text)
            self.spent |= {manifest.base_sha256, manifest.update.sha256}
        await self.after_commit(done, checkpoint)
