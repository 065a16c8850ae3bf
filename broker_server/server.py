"""What devices say, and who hears it: the fleet, the store, the run that is active.

Bytes from the broker become values in ``_handle``, and only there.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import anyio
import structlog
from pydantic import ValidationError

from broker_server import fleet as registry
from broker_server import run_events as events
from broker_server.blob_rights import BlobRights
from broker_server.blobs import BlobStore
from broker_server.broker_address import BrokerAddress
from broker_server.counters import ServerCounters
from broker_server.device_uploads import DeviceUploads
from broker_server.disk_space import DatabaseUnavailable
from broker_server.grants import UPLOADS_PER_ASSIGNMENT
from broker_server.model_registry import ModelRegistry
from broker_server.mqtt import BrokerConnected, BrokerLost, Incoming, ServerLink
from broker_server.run_loop import new_message_id
from broker_server.run_queue import RunQueue
from broker_server.run_state import RunStatus
from broker_server.server_state import ServerState
from broker_server.settings import ServerSettings
from broker_server.store import Store
from broker_server.voice import DeviceVoices, ServerVoice
from wire_protocol.errors import (
    ConfigError,
    ProtocolError,
    Refused,
    ServerUnavailable,
    one_line,
)
from wire_protocol.messages import (
    Ack,
    Benchmark,
    Birth,
    Capability,
    CertificateIssued,
    CertificateRequest,
    Command,
    Envelope,
    Event,
    Failure,
    Heartbeat,
    Progress,
    Rebirth,
    State,
    Unmeasured,
    UpdateManifest,
    decode_message,
)
from wire_protocol.topics import Broadcast, Channel, DeviceTopic, FleetTopic, parse_topic
from wire_protocol.versions import WRONG_PROTOCOL, protocol_problem

if TYPE_CHECKING:
    from broker_server.enrollment_desk import EnrolmentDesk
    from broker_server.pki import FleetPki

log = structlog.get_logger()

REBIRTH_JITTER_S = 2.0
RETRY_AFTER_S = 2.0
REBIRTH_INTERVAL_S = 5.0
"""A device that needs a rebirth is asked at most this often."""
MOST_ASKED = 20_000
LEASE_CHECK_S = 0.5


@dataclass
class Server:
    """Everything that serves devices and runs."""

    settings: ServerSettings
    state: ServerState
    store: Store
    blobs: BlobStore
    broker: BrokerAddress
    link: ServerLink
    voice: ServerVoice
    operator_key: str
    device_voices: DeviceVoices = field(default_factory=DeviceVoices)
    fleet: registry.Fleet = field(default_factory=registry.Fleet)
    counters: ServerCounters = field(default_factory=ServerCounters)
    refused: Counter[str] = field(default_factory=Counter)
    """HTTP requests that were refused, by reason."""
    pki: FleetPki | None = None
    enrolment: EnrolmentDesk | None = None

    def __post_init__(self) -> None:
        self.models = ModelRegistry(self.store, self.blobs, self.state.models)
        uploads = DeviceUploads(self.state.uploads, self.blobs, most=UPLOADS_PER_ASSIGNMENT)
        self.rights = BlobRights(
            self.models, self.blobs, self.store, uploads, divided=self.pki is not None
        )
        self.rights.restore()
        self.runs = RunQueue(self.settings, self.state, self.store, self.models, self.fleet, self)
        self._asked_rebirth: dict[str, float] = {}
        self._unsaved: set[str] = set()
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
        message_id = new_message_id()
        self.counters.command(device_id, command)
        self.rights.sent(device_id, command)
        self._say(device_id, Channel.COMMAND, command, message_id)
        return message_id

    def ack(self, device_id: str, ack: Ack) -> None:
        """Answer a device's message."""
        self.counters.ack(ack)
        if ack.status != "busy":
            self.rights.answered(device_id, ack.re)
        self._say(device_id, Channel.SERVER_ACK, ack, new_message_id())

    def _say(
        self,
        device_id: str,
        channel: Channel,
        body: Command | Ack | CertificateIssued,
        message_id: str,
        sid: int | None = None,
    ) -> None:
        if sid is None:
            known = self.fleet.devices.get(device_id)
            sid = known.sid if known else 0
        payload = self.voice.say(
            body,
            message_id=message_id,
            now=time.monotonic(),
            to=device_id,
            sid=sid,
        )
        self.link.publish(str(DeviceTopic(self.settings.fleet, device_id, channel)), payload)

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
                        reason = self.counters.drop(_kind_of(item.topic), error)
                        topic = one_line(item.topic, longest=120)
                        log.warning("message_dropped", topic=topic, reason=reason, error=str(error))
                    except ServerUnavailable as error:
                        # A full disk. Nobody was answered, so that it is sent again.
                        topic = one_line(item.topic, longest=120)
                        log.error("message_not_taken", topic=topic, error=str(error))
                    item.acknowledge()

    def _ask_everybody_for_birth(self) -> None:
        payload = self.voice.say(
            Command(command=Rebirth(jitter_s=REBIRTH_JITTER_S)),
            message_id=new_message_id(),
            now=time.monotonic(),
        )
        self.link.publish(str(FleetTopic(self.settings.fleet, Broadcast.COMMAND)), payload)

    def _handle(self, item: Incoming) -> None:
        topic = parse_topic(item.topic)
        if not isinstance(topic, DeviceTopic):
            raise ProtocolError("not a topic of a device")
        device_id, now = topic.device_id, time.monotonic()
        payload = self.device_voices.open(device_id, topic.channel, item.payload)
        match topic.channel:
            case Channel.STATE:
                envelope, state = decode_message(State, payload)
                if not state.online:
                    self._apply(self.fleet.said_offline(device_id, envelope.sid))
            case Channel.BIRTH:
                envelope, birth = decode_message(Birth, payload)
                self._remember(device_id, envelope.sid, birth)
                self._apply(self.fleet.born(device_id, envelope.sid, birth, now))
                self._refuse_another_protocol(device_id, envelope, birth)
            case Channel.HEARTBEAT:
                envelope, heartbeat = decode_message(Heartbeat, payload)
                changes = self.fleet.heartbeat(device_id, envelope.sid, heartbeat, now)
                self._apply(changes, sid=envelope.sid)
            case Channel.EVENT:
                envelope, event = decode_message(Event, payload)
                self._device_event(device_id, envelope, event)
            case Channel.UPDATE:
                envelope, manifest = decode_message(UpdateManifest, payload)
                self._update(device_id, envelope.id, manifest)
            case Channel.DEVICE_ACK:
                _, ack = decode_message(Ack, payload)
                if self.runs.active:
                    self.runs.active.command_answered(ack)
            case Channel.CERTIFICATE_REQUEST:
                envelope, request = decode_message(CertificateRequest, payload)
                self._renew(device_id, envelope.sid, request.csr_pem)
            case _:
                raise ProtocolError(f"{topic.channel.value} is not for the server")

    def _renew(self, device_id: str, sid: int, csr_pem: str) -> None:
        """Send a device its next certificate; one that hears nothing asks again."""
        if self.enrolment is None:
            raise ProtocolError("this fleet has no certificates")
        try:
            renewed = self.enrolment.renew(device_id, csr_pem, time.time())
        except (ConfigError, Refused) as error:
            log.error("certificate_not_renewed", device_id=device_id, error=str(error))
            return
        issued = CertificateIssued(certificate_pem=renewed)
        self._say(device_id, Channel.CERTIFICATE, issued, new_message_id(), sid)

    def _refuse_another_protocol(self, device_id: str, envelope: Envelope, birth: Birth) -> None:
        """Tell the device too: whoever looks after it may never look at this server."""
        if problem := protocol_problem(birth.protocol):
            log.warning("device_refused", device_id=device_id, reason=problem)
            detail = f"this device {problem}"
            ack = Ack(re=envelope.id, status="rejected", code=WRONG_PROTOCOL, detail=detail)
            self._say(device_id, Channel.SERVER_ACK, ack, new_message_id(), envelope.sid)

    def _remember(self, device_id: str, sid: int, birth: Birth) -> None:
        """Save a birth; without space the device takes part all the same, and says it again."""
        known = self.fleet.devices.get(device_id)
        if known and (known.sid, known.birth) == (sid, birth) and device_id not in self._unsaved:
            return  # a whole fleet says its births again when the broker was away
        try:
            self.store.save_device(device_id, sid, birth.model_dump_json())
            self._unsaved.discard(device_id)
        except DatabaseUnavailable as error:
            self.counters.unsaved += 1
            self._unsaved.add(device_id)
            log.error("device_not_saved", device_id=device_id, error=str(error))

    def _device_event(self, device_id: str, envelope: Envelope, event: Event) -> None:
        message_id = envelope.id
        match event.event:
            case Progress():
                if self.runs.active:
                    self.runs.active.progress(device_id, event.event)
            case Unmeasured():
                unmeasured = event.event
                log.warning("device_not_measured", device_id=device_id, detail=unmeasured.detail)
                self._apply(
                    self.fleet.could_not_measure(
                        device_id, unmeasured.model_digest, unmeasured.detail
                    ),
                    sid=envelope.sid,
                )
            case Capability():
                self._apply(
                    self.fleet.measured(device_id, event.event.capability), sid=envelope.sid
                )
                if known := self.fleet.devices.get(device_id):
                    birth = known.birth.model_copy(update={"capability": known.capability})
                    self._remember(device_id, known.sid, birth)
            case Failure():
                failure = event.event
                self.rights.reported(device_id, message_id, failure.assignment_id)
                log.warning(
                    "device_failed",
                    device_id=device_id,
                    code=failure.code.value,
                    detail=failure.detail,
                )
                if self.runs.active is None:
                    self.ack(device_id, Ack(re=message_id, status="ok"))
                    return
                self.runs.active.feed(
                    events.AssignmentFailed(
                        device_id,
                        failure.assignment_id,
                        failure.code.value,
                        failure.detail,
                        message_id,
                    )
                )

    def _update(self, device_id: str, message_id: str, manifest: UpdateManifest) -> None:
        active = self.runs.active
        if active is None or not active.begun or active.context.run_id != manifest.run_id:
            self._answer_early_or_late(device_id, message_id, manifest.run_id)
        elif self._counted_before(device_id, manifest):
            self.ack(device_id, Ack(re=message_id, status="ok", code="duplicate"))
        elif not self.rights.has_update(device_id, manifest):
            self.ack(device_id, Ack(re=message_id, status="rejected", code="missing_blob"))
        else:
            self.rights.reported(device_id, message_id, manifest.assignment_id)
            active.feed(events.UpdateArrived(device_id, message_id, manifest))

    def _counted_before(self, device_id: str, manifest: UpdateManifest) -> bool:
        """An update whose ack was lost, in a round that has been committed since."""
        active = self.runs.active
        if active and manifest.round_number >= active.coordinator.round_number:
            return False
        text = self.store.updates(manifest.run_id, manifest.round_number).get(device_id)
        return text is not None and UpdateManifest.model_validate_json(text) == manifest

    def _answer_early_or_late(self, device_id: str, message_id: str, run_id: str) -> None:
        """An update of a run that does not run now: over, or about to go on after a restart."""
        record = self.store.run(run_id)
        if record is not None and record.status == RunStatus.RUNNING.value:
            ack = Ack(re=message_id, status="busy", code="starting", retry_after_s=RETRY_AFTER_S)
        else:
            ack = Ack(re=message_id, status="rejected", code="stale")
        self.ack(device_id, ack)

    def _apply(self, changes: list[registry.Change], sid: int = 0) -> None:
        for change in changes:
            match change:
                case registry.Joined():
                    log.info("device_online", device_id=change.device_id)
                    self._device_is_there(change.device_id)
                case registry.Left():
                    log.warning("device_lost", device_id=change.device_id, reason=change.reason)
                    if self.runs.active:
                        self.runs.active.feed(events.DeviceLost(change.device_id))
                case registry.NeedsRebirth():
                    self._ask_for_birth(change.device_id, sid)
                case registry.UsedTwice():
                    log.error(
                        "device_id_used_twice",
                        device_id=change.device_id,
                        detail=registry.USED_TWICE,
                    )
        self._lease_changed.set()

    def _ask_for_birth(self, device_id: str, sid: int) -> None:
        now = time.monotonic()
        if now - self._asked_rebirth.get(device_id, -REBIRTH_INTERVAL_S) >= REBIRTH_INTERVAL_S:
            if len(self._asked_rebirth) >= MOST_ASKED:
                # Somebody invents devices: ask some of them once more instead of remembering all.
                self._asked_rebirth.clear()
            self._asked_rebirth[device_id] = now
            rebirth = Command(command=Rebirth())
            # To the session that spoke: it is not the one we know.
            self._say(device_id, Channel.COMMAND, rebirth, new_message_id(), sid)

    def _device_is_there(self, device_id: str) -> None:
        if self.runs.active:
            self.runs.report(device_id)
            return
        models = self.models.rows()
        known = self.fleet.devices[device_id]
        if protocol_problem(known.birth.protocol):
            return
        compute = known.capability.compute
        if models and models[-1].digest in known.unmeasurable:
            return
        if models and (compute is None or compute.model_digest not in {m.digest for m in models}):
            self.measure([device_id], models[-1].digest)

    def measure(self, device_ids: list[str], digest: str) -> None:
        """Ask devices to benchmark themselves with a base model."""
        for device_id in device_ids:
            self.command(device_id, Command(command=Benchmark(model_digest=digest)))

    async def watch_leases(self) -> None:
        """Notice devices that fell silent."""
        while True:
            self._lease_changed = anyio.Event()
            deadline = self.fleet.next_deadline()
            patience_s = 60.0 if deadline is None else max(0.0, deadline - time.monotonic())
            with anyio.move_on_after(patience_s):
                await self._lease_changed.wait()
            # Every device is looked at: for thousands of heartbeats once, and not once for each.
            await anyio.sleep(LEASE_CHECK_S)
            self._apply(self.fleet.expire(time.monotonic()))


def _kind_of(topic: str) -> str:
    """Where a dropped message is counted; invented topics must not become counters."""
    try:
        return str(parse_topic(topic).channel.value).rpartition("/")[2]
    except ProtocolError:
        return "unknown"
