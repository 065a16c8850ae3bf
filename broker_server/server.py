"""The server's mind beside the runs: devices in, runs one after another out.

Knows the fleet, the store and the queue of runs. Bytes from the broker become
values in ``_handle``, and only there.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

import anyio
import structlog
from pydantic import ValidationError

from broker_server import fleet as registry
from broker_server import run_events as events
from broker_server.blobs import BlobStore
from broker_server.broker_address import BrokerAddress
from broker_server.coordinator import Coordinator
from broker_server.evaluator import EvaluationSetup, Evaluator
from broker_server.model_registry import ModelRegistry, shape_of
from broker_server.mqtt import BrokerConnected, BrokerLost, Incoming, ServerLink
from broker_server.plots import write_plots
from broker_server.run_folder import rewrite
from broker_server.run_loop import RunContext, RunLoop, new_message_id
from broker_server.run_setup import check_run, prepare_run
from broker_server.run_spec import RunSpec
from broker_server.run_state import RoundResult, RunStatus
from broker_server.run_views import run_report
from broker_server.server_state import ServerState
from broker_server.settings import ServerSettings
from broker_server.store import RunRecord, Store
from wire_protocol.errors import ConfigError, LegendError, ProtocolError
from wire_protocol.messages import (
    Ack,
    Benchmark,
    Birth,
    Capability,
    Command,
    Event,
    Failure,
    Heartbeat,
    Progress,
    Rebirth,
    State,
    UpdateManifest,
    decode_message,
    encode_message,
)
from wire_protocol.topics import Broadcast, Channel, DeviceTopic, FleetTopic, parse_topic

log = structlog.get_logger()

REBIRTH_JITTER_S = 2.0
RETRY_AFTER_S = 2.0
REBIRTH_INTERVAL_S = 5.0
"""A device that needs a rebirth is asked at most this often."""


@dataclass
class Server:
    """Everything that serves devices and runs."""

    settings: ServerSettings
    state: ServerState
    store: Store
    blobs: BlobStore
    broker: BrokerAddress
    link: ServerLink
    fleet: registry.Fleet = field(default_factory=registry.Fleet)
    evaluator: Evaluator = field(default_factory=Evaluator)
    dropped: Counter[str] = field(default_factory=Counter)
    active: RunLoop | None = None
    active_spec: RunSpec | None = None

    def __post_init__(self) -> None:
        self.models = ModelRegistry(self.store, self.blobs, self.state.models)
        self._queue, self._queued = anyio.create_memory_object_stream[str](1024)
        self._asked_rebirth: dict[str, float] = {}
        self._lease_changed = anyio.Event()
        now = time.monotonic()
        for device_id, sid, birth in self.store.devices():
            try:
                self.fleet.restore(device_id, sid, Birth.model_validate_json(birth), now)
            except ValidationError:
                log.warning("stored_birth_ignored", device_id=device_id)

    # Sending; ``Post`` for the runs

    def command(self, device_id: str, command: Command) -> str:
        """Send a command to one device."""
        known = self.fleet.devices.get(device_id)
        message_id = new_message_id()
        payload = encode_message(command, message_id=message_id, sid=known.sid if known else 0)
        self.link.publish(self._topic(device_id, Channel.COMMAND), payload)
        return message_id

    def ack(self, device_id: str, ack: Ack) -> None:
        """Answer a device's message."""
        payload = encode_message(ack, message_id=new_message_id(), sid=0)
        self.link.publish(self._topic(device_id, Channel.SERVER_ACK), payload)

    def _topic(self, device_id: str, channel: Channel) -> str:
        return str(DeviceTopic(self.settings.fleet, device_id, channel))

    # Receiving

    async def pump(self) -> None:
        """Feed everything that the broker brings."""
        async for item in self.link.incoming():
            match item:
                case BrokerConnected():
                    log.info("broker_connected")
                    self._ask_everybody_for_birth()
                case BrokerLost():
                    log.warning("broker_lost", reason=item.reason, retry_in_s=item.retry_in_s)
                case Incoming():
                    try:
                        self._handle(item)
                    except ProtocolError as error:
                        self.dropped[str(item.topic).rpartition("/")[2]] += 1
                        log.warning("message_dropped", topic=item.topic, error=str(error))
                    item.acknowledge()

    def _ask_everybody_for_birth(self) -> None:
        payload = encode_message(
            Command(command=Rebirth(jitter_s=REBIRTH_JITTER_S)),
            message_id=new_message_id(),
            sid=0,
        )
        self.link.publish(str(FleetTopic(self.settings.fleet, Broadcast.COMMAND)), payload)

    def _handle(self, item: Incoming) -> None:
        topic = parse_topic(item.topic)
        if not isinstance(topic, DeviceTopic):
            raise ProtocolError("not a topic of a device")
        device_id, now = topic.device_id, time.monotonic()
        match topic.channel:
            case Channel.STATE:
                envelope, state = decode_message(State, item.payload)
                if not state.online:
                    self._apply(self.fleet.said_offline(device_id, envelope.sid))
            case Channel.BIRTH:
                envelope, birth = decode_message(Birth, item.payload)
                self.store.save_device(device_id, envelope.sid, birth.model_dump_json())
                self._apply(self.fleet.born(device_id, envelope.sid, birth, now))
            case Channel.HEARTBEAT:
                envelope, heartbeat = decode_message(Heartbeat, item.payload)
                self._apply(self.fleet.heartbeat(device_id, envelope.sid, heartbeat, now))
            case Channel.EVENT:
                envelope, event = decode_message(Event, item.payload)
                self._device_event(device_id, envelope.id, event)
            case Channel.UPDATE:
                envelope, manifest = decode_message(UpdateManifest, item.payload)
                self._update(device_id, envelope.id, manifest)
            case Channel.DEVICE_ACK:
                _, ack = decode_message(Ack, item.payload)
                if self.active:
                    self.active.command_answered(ack)
            case _:
                raise ProtocolError(f"{topic.channel.value} is not for the server")

    def _device_event(self, device_id: str, message_id: str, event: Event) -> None:
        match event.event:
            case Progress():
                if self.active:
                    self.active.progress(device_id, event.event)
            case Capability():
                self._apply(self.fleet.measured(device_id, event.event.capability))
                if known := self.fleet.devices.get(device_id):
                    birth = known.birth.model_copy(update={"capability": known.capability})
                    self.store.save_device(device_id, known.sid, birth.model_dump_json())
            case Failure():
                failure = event.event
                log.warning(
                    "device_failed",
                    device_id=device_id,
                    code=failure.code.value,
                    detail=failure.detail,
                )
                if self.active is None:
                    self.ack(device_id, Ack(re=message_id, status="ok"))
                    return
                self.active.feed(
                    events.AssignmentFailed(
                        device_id,
                        failure.assignment_id,
                        failure.code.value,
                        failure.detail,
                        message_id,
                    )
                )

    def _update(self, device_id: str, message_id: str, manifest: UpdateManifest) -> None:
        if self.active is None or self.active.context.run_id != manifest.run_id:
            self._answer_early_or_late(device_id, message_id, manifest.run_id)
        elif not self.blobs.has(manifest.update.sha256):
            self.ack(device_id, Ack(re=message_id, status="rejected", code="missing_blob"))
        else:
            self.active.feed(events.UpdateArrived(device_id, message_id, manifest))

    def _answer_early_or_late(self, device_id: str, message_id: str, run_id: str) -> None:
        """An update of a run that does not run now: over, or about to go on after a restart."""
        record = self.store.run(run_id)
        if record is not None and record.status == RunStatus.RUNNING.value:
            ack = Ack(re=message_id, status="busy", code="starting", retry_after_s=RETRY_AFTER_S)
        else:
            ack = Ack(re=message_id, status="rejected", code="stale")
        self.ack(device_id, ack)

    def _apply(self, changes: list[registry.Change]) -> None:
        for change in changes:
            match change:
                case registry.Joined():
                    log.info("device_online", device_id=change.device_id)
                    self._device_is_there(change.device_id)
                case registry.Left():
                    log.warning("device_lost", device_id=change.device_id, reason=change.reason)
                    if self.active:
                        self.active.feed(events.DeviceLost(change.device_id))
                case registry.NeedsRebirth():
                    self._ask_for_birth(change.device_id)
        self._lease_changed.set()

    def _ask_for_birth(self, device_id: str) -> None:
        now = time.monotonic()
        if now - self._asked_rebirth.get(device_id, -REBIRTH_INTERVAL_S) >= REBIRTH_INTERVAL_S:
            self._asked_rebirth[device_id] = now
            self.command(device_id, Command(command=Rebirth()))

    def _device_is_there(self, device_id: str) -> None:
        if self.active and self.active_spec:
            self._report(self.active, self.active_spec, device_id)
            return
        models = self.models.rows()
        known = self.fleet.devices[device_id]
        compute = known.capability.compute
        if models and (compute is None or compute.model_digest not in {m.digest for m in models}):
            self.measure([device_id], models[-1].digest)

    def measure(self, device_ids: list[str], digest: str) -> None:
        """Ask devices to benchmark themselves with a base model."""
        for device_id in device_ids:
            self.command(device_id, Command(command=Benchmark(model_digest=digest)))

    def _report(self, loop: RunLoop, spec: RunSpec, device_id: str) -> None:
        capacity, note = self.fleet.capacity(
            device_id,
            model_digest=loop.coordinator.plan.model_digest,
            dataset=spec.dataset,
            labels=spec.labels if spec.task == "classification" else (),
        )
        self.fleet.devices[device_id].note = note
        loop.feed(events.DeviceReported(device_id, capacity, note))

    async def watch_leases(self) -> None:
        """Notice devices that fell silent."""
        while True:
            self._lease_changed = anyio.Event()
            deadline = self.fleet.next_deadline()
            patience_s = 60.0 if deadline is None else max(0.0, deadline - time.monotonic())
            with anyio.move_on_after(patience_s):
                await self._lease_changed.wait()
            self._apply(self.fleet.expire(time.monotonic()))

    # Runs

    def launch(self, spec: RunSpec) -> str:
        """Check a run and put it into the queue.

        Raises:
            ConfigError: something in it cannot work.
        """
        row = self.models.find(spec.model)
        check_run(spec, shape_of(row))
        if not self.blobs.has(spec.evaluation.sha256):
            raise ConfigError("the held-out file is not uploaded; send its blob first")
        name = "".join(c if c.isalnum() else "-" for c in spec.name.lower()).strip("-") or "run"
        run_id = f"{name[:24]}-{new_message_id()[:6]}"
        # By digest: a name may come to mean another model while the run waits.
        pinned = spec.model_copy(update={"model": row.digest})
        self.store.create_run(run_id, pinned.model_dump_json())
        self._queue.send_nowait(run_id)
        return run_id

    def cancel(self, run_id: str) -> None:
        """Stop a run, queued or running.

        Raises:
            ConfigError: no such run, or it has ended.
        """
        record = self.store.run(run_id)
        if record is None:
            raise ConfigError(f"no run {run_id!r}; list them: legend runs")
        if self.active and self.active.context.run_id == run_id:
            self.active.feed(events.CancelRequested("cancelled by the operator"))
        elif record.status == RunStatus.QUEUED.value:
            self.store.set_status(run_id, RunStatus.CANCELLED.value, "cancelled by the operator")
        else:
            raise ConfigError(f"run {run_id} is {record.status} already")

    async def work_through_runs(self) -> None:
        """Run what was running before a restart, then what waits, one at a time."""
        for record in self.store.runs():
            if record.status in (RunStatus.RUNNING.value, RunStatus.QUEUED.value):
                self._queue.send_nowait(record.run_id)
        async for run_id in self._queued:
            found = self.store.run(run_id)
            if found and found.status in (RunStatus.RUNNING.value, RunStatus.QUEUED.value):
                await self._run(found)

    async def _run(self, record: RunRecord) -> None:
        structlog.contextvars.bind_contextvars(run_id=record.run_id)
        try:
            loop = await self._prepare(record)
            self.store.set_status(record.run_id, RunStatus.RUNNING.value)
            for device_id, known in self.fleet.devices.items():
                if known.online and self.active_spec:
                    self._report(loop, self.active_spec, device_id)
            status, reason = await loop.run()
        except LegendError as error:
            status, reason = RunStatus.FAILED, str(error)
        finally:
            self.active = self.active_spec = None
        log.info("run_ended", status=status.value, reason=reason)
        self.store.set_status(record.run_id, status.value, reason)
        await self._write_results(record.run_id)
        structlog.contextvars.unbind_contextvars("run_id")

    async def _prepare(self, record: RunRecord) -> RunLoop:
        spec = RunSpec.model_validate_json(record.spec)
        row = self.models.find(spec.model)
        shape = shape_of(row)
        prepared = prepare_run(
            record.run_id,
            spec,
            shape=shape,
            digest=row.digest,
            blobs=self.blobs,
            checkpoint=record.checkpoint,
        )
        labels = spec.labels if spec.task == "classification" else ()
        setup = EvaluationSetup(
            model_dir=self.models.folder(row.digest),
            task=spec.task,
            file=self.blobs.path(spec.evaluation.sha256),
            labels=labels,
            max_tokens=spec.max_tokens,
            threads=self.settings.evaluation_threads,
        )
        await self.evaluator.prepare(setup)
        recorded = {
            device_id: UpdateManifest.model_validate_json(text)
            for device_id, text in self.store.updates(
                record.run_id, prepared.checkpoint.round_number
            ).items()
            if device_id in prepared.checkpoint.members
        }
        context = RunContext(
            record.run_id, spec.name, setup.model_dir, row.name, shape, tuple(labels)
        )
        rho = prepared.strategy.rho
        self.active_spec = spec
        self.active = RunLoop(
            context,
            Coordinator(prepared.plan, prepared.strategy, prepared.checkpoint, recorded),
            self.store,
            self.blobs,
            self.evaluator,
            folder=self.state.runs / record.run_id,
            post=self,
            on_report=lambda device_id, manifest: self._learn(device_id, manifest, rho),
            on_commit=self._write_results,
        )
        return self.active

    def _learn(self, device_id: str, manifest: UpdateManifest, rho: float) -> None:
        self.fleet.learn(device_id, manifest, rho=rho)
        if self.active and self.active_spec and self.fleet.devices[device_id].online:
            self._report(self.active, self.active_spec, device_id)

    async def _write_results(self, run_id: str) -> None:
        """Bring the result folder up to date with the store."""
        record = self.store.run(run_id)
        if record is None:
            return
        rounds = [RoundResult.model_validate_json(text) for text in self.store.rounds(run_id)]
        report = run_report(record, rounds)
        folder = self.state.runs / run_id
        await anyio.to_thread.run_sync(rewrite, folder, report)
        if record.status not in (RunStatus.RUNNING.value, RunStatus.QUEUED.value):
            await anyio.to_thread.run_sync(write_plots, folder, report)
