"""Follows what the server tells its devices, and keeps their rights and uploads in step with it.

The glue between messages, models and the blob store; who may do what is decided in ``grants``.
"""

from __future__ import annotations

import json

import structlog
from pydantic import ValidationError

from broker_server.access import Refusal
from broker_server.blobs import BlobStore
from broker_server.device_uploads import DeviceUploads
from broker_server.grants import Assignment, Grants, blobs_in, largest_update_bytes
from broker_server.model_registry import ModelRegistry, shape_of
from broker_server.run_spec import RunSpec
from broker_server.run_state import RunCheckpoint, RunStatus
from broker_server.store import RunRecord, Store
from wire_protocol.errors import ConfigError
from wire_protocol.messages import Benchmark, Command, RoundCancel, RoundStart, UpdateManifest
from wire_protocol.model_family import ModelShape

log = structlog.get_logger()


class BlobRights:
    """What devices may fetch and send.

    Args:
        models: names the blobs of a base model.
        blobs: the server's.
        store: remembers the runs, and the updates that were counted.
        uploads: of devices; those of a closed assignment are dropped.
        divided: devices show certificates; else nobody asks for their rights, and none are kept.
    """

    def __init__(
        self,
        models: ModelRegistry,
        blobs: BlobStore,
        store: Store,
        uploads: DeviceUploads,
        *,
        divided: bool,
    ) -> None:
        self._models = models
        self._store = store
        self._blobs = blobs
        self.uploads = uploads
        self.divided = divided
        self.grants = Grants()
        self._shapes: dict[str, ModelShape] = {}

    def restore(self) -> None:
        """Give back what was given before a restart: devices go on before they are told again."""
        if not self.divided:
            return
        self.model_registered()
        for record in self._store.runs():
            if record.status == RunStatus.RUNNING.value:
                try:
                    self._restore_run(record)
                except (ConfigError, ValidationError) as error:
                    log.warning("rights_not_restored", run_id=record.run_id, error=str(error))
        self.uploads.keep_only(self.grants.devices())

    def model_registered(self) -> None:
        """Let every device read the base model that idle devices measure themselves with."""
        if self.divided and (rows := self._models.rows()):
            self._know(rows[-1].digest)
            self.grants.allow_model(rows[-1].digest)

    def sent(self, device_id: str, command: Command) -> None:
        """Call before a command goes out: the device may ask at once."""
        if not self.divided:
            return
        match command.command:
            case RoundStart() as start:
                shape = self._know(start.model_digest)
                self.grants.allow_model(start.model_digest, device_id)
                largest = largest_update_bytes(
                    shape, start.ranks, len(start.recipe.labels), factors=start.factors
                )
                self._open(
                    device_id,
                    Assignment(start.assignment_id, blobs_in(start), largest),
                )
            case RoundCancel() as cancel:
                if self.grants.forget(device_id, cancel.assignment_id):
                    self.uploads.drop(device_id)
            case Benchmark() as benchmark:
                self._know(benchmark.model_digest)
                self.grants.allow_model(benchmark.model_digest, device_id)
            case _:
                pass

    def reported(self, device_id: str, message_id: str, assignment_id: str) -> None:
        """A device says how its assignment ended."""
        self.grants.reported(device_id, message_id, assignment_id)

    def answered(self, device_id: str, message_id: str) -> None:
        """The server answered for good; what is not in the store now is not needed."""
        if self.grants.answered(device_id, message_id):
            self.uploads.drop(device_id)

    def has_update(self, device_id: str, manifest: UpdateManifest) -> bool:
        """Whether the update is here, and was sent by this device for this assignment."""
        sha256 = manifest.update.sha256
        if not self.divided:
            return self._blobs.has(sha256)
        if self.grants.works_on(device_id, manifest.assignment_id):
            return self.uploads.adopt(device_id, sha256)
        # Its answer may have been lost.
        text = self._store.updates(manifest.run_id, manifest.round_number).get(device_id)
        return text is not None and UpdateManifest.model_validate_json(text) == manifest

    def may_send(self, device_id: str, size_bytes: int = 0) -> Refusal | None:
        """Whether the device may send an update of this size; None: yes."""
        return self.grants.may_write(device_id, size_bytes)

    def _open(self, device_id: str, assignment: Assignment) -> None:
        if self.grants.record(device_id, assignment):
            self.uploads.drop(device_id)

    def _know(self, digest: str) -> ModelShape:
        """Read a base model from the database, once: it never changes."""
        if digest not in self._shapes:
            row = self._models.find(digest)
            self.grants.know_model(digest, (file["sha256"] for file in json.loads(row.files)))
            self._shapes[digest] = shape_of(row)
        return self._shapes[digest]

    def _restore_run(self, record: RunRecord) -> None:
        spec = RunSpec.model_validate_json(record.spec)
        shape = self._know(spec.model)
        self.grants.allow_model(spec.model)
        if record.checkpoint is None:
            return
        checkpoint = RunCheckpoint.model_validate_json(record.checkpoint)
        labels = len(spec.labels) if spec.task == "classification" else 0
        done = self._store.updates(record.run_id, checkpoint.round_number)
        for device_id, member in checkpoint.members.items():
            if device_id not in done:
                largest = largest_update_bytes(shape, member.ranks, labels, factors=member.factors)
                whole = frozenset() if member.base else {checkpoint.adapter.sha256}
                given = Assignment(member.assignment_id, blobs_in(member) | whole, largest)
                self.grants.record(device_id, given)
