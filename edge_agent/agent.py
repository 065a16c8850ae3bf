"""The agent's one loop: feeds the ``Session`` and carries out what it decides.

The only place with a clock. Bytes from the broker become events in one function.
"""

from __future__ import annotations

import os
import random
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version

import anyio
import structlog
from anyio.abc import TaskGroup
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from edge_agent import session
from edge_agent.benchmark import benchmark_device
from edge_agent.capability import describe_datasets, resident_bytes
from edge_agent.command_guard import CommandGuard
from edge_agent.incoming import NewCertificate, event_from
from edge_agent.introduction import introduction
from edge_agent.metrics import AgentCounters
from edge_agent.mqtt import Connected, CredentialsRefused, DeviceLink, Disconnected, Received
from edge_agent.notify import Notifier
from edge_agent.outbox import Outbox, OutgoingMessage
from edge_agent.outcome import outcome_of
from edge_agent.round_work import Workshop, do_round
from edge_agent.status_file import StatusFile
from wire_protocol.errors import DeviceError, FailureCode, LegendError, ProtocolError, Refused
from wire_protocol.heap import give_back
from wire_protocol.messages import (
    Ack,
    Birth,
    Capability,
    Event,
    Heartbeat,
    Progress,
    UpdateManifest,
    encode_message,
)
from wire_protocol.topics import Channel, DeviceTopic

log = structlog.get_logger()
LOSSES_BEFORE_ASKING = 5
"""Connections lost or refused in a row before the broker is looked up again."""

UPDATE_PREFIX = "update-"
FAILURE_PREFIX = "failure-"
STOP_PATIENCE_S = 5.0
"""How long the trainer may take to end its step; killed, it would lose its warm model."""

CACHED_ADAPTER_BYTES = 256 * 2**20
PROGRESS_INTERVAL_S = 1.0
"""Progress is for people: more often than this says nothing new and costs traffic."""


class Agent:
    """Carries out what the session decides.

    Args:
        workshop: what assignments are worked on with.
        link: the connection to the broker.
        on_hopeless: called when this broker does not take us in any more; with the reason when the
            server will never do so.
        status: what ``edge-agent status`` shows.
        notifier: systemd.
        rng: for jitter.
        guard: knows whether a message really is the server's.
        sign: signs what the server must be able to trust; without an identity it changes nothing.
        on_certificate: takes in the renewed certificate that the server sent, for an identity.
    """

    def __init__(
        self,
        workshop: Workshop,
        link: DeviceLink,
        *,
        on_hopeless: Callable[[Refused | None], None],
        status: StatusFile,
        notifier: Notifier,
        rng: random.Random,
        guard: CommandGuard,
        sign: Callable[[bytes], bytes] = bytes,
        on_certificate: Callable[[str], None] | None = None,
        counters: AgentCounters | None = None,
    ) -> None:
        self.workshop = workshop
        self._guard = guard
        self._sign = sign
        self._on_certificate = on_certificate
        self.settings = workshop.device.settings
        self.link = link
        self.status = status
        self.notifier = notifier
        self.outbox = Outbox(workshop.state.outbox, rng=rng, now=time.monotonic())
        self.session = session.Session(
            self.settings.heartbeat_s,
            rng,
            updated=self._owed(UPDATE_PREFIX),
            given_up=self._owed(FAILURE_PREFIX),
        )
        self.boot_id = uuid.uuid4().hex
        self.datasets = describe_datasets(self.settings)
        self.counters = counters or AgentCounters()
        self._version = version("legend-edge")
        self._progress_at = 0.0
        self._on_hopeless = on_hopeless
        self._losses = 0
        self._work_scope: anyio.CancelScope | None = None
        self._work_ended = anyio.Event()
        self._send: MemoryObjectSendStream[session.Event]
        self._receive: MemoryObjectReceiveStream[session.Event]
        self._send, self._receive = anyio.create_memory_object_stream[session.Event](64)

    async def run(self, tasks: TaskGroup) -> None:
        """Serve until cancelled."""
        tasks.start_soon(self._pump, name="broker")
        tasks.start_soon(self._read_sensors, name="sensors")
        self.notifier.status("connecting to the broker")
        while True:
            event = await self._next_event()
            # Fed by the loop that does the work: a stuck loop must be restarted.
            self.notifier.watchdog()
            for action in self.session.handle(event, time.monotonic()):
                self._carry_out(action, tasks)
            self._publish_outbox()
            self.counters.status = self._status()
            self.status.write(self.counters.status)

    async def _next_event(self) -> session.Event:
        with suppress(anyio.WouldBlock):
            return self._receive.receive_nowait()
        with anyio.move_on_after(self._patience_s()):
            return await self._receive.receive()
        return session.Tick()

    async def _read_sensors(self) -> None:
        """Beside the loop: some boards take a second to answer."""
        while True:
            await anyio.to_thread.run_sync(self.workshop.watch.look, self.workshop.trainer.pid)
            await anyio.sleep(self.settings.heartbeat_s)

    def _patience_s(self) -> float:
        now = time.monotonic()
        times = [now + 60.0]
        if (deadline := self.session.next_deadline()) is not None:
            times.append(deadline)
        if self.link.connected and (due := self.outbox.next_deadline()) is not None:
            times.append(due)
        if interval_s := self.notifier.watchdog_interval_s:
            times.append(now + interval_s)
        return max(0.0, min(times) - now)

    async def _pump(self) -> None:
        """Bytes from the broker become events here, and only here."""
        async for item in self.link.incoming():
            match item:
                case Connected():
                    log.info("broker_connected", sid=item.sid)
                    self.notifier.status("connected to the broker")
                    self._losses = 0
                    await self._send.send(session.Connected(item.sid))
                case Disconnected():
                    log.warning("broker_lost", reason=item.reason, retry_in_s=item.retry_in_s)
                    self.notifier.status(f"no broker: {item.reason}")
                    await self._send.send(session.Disconnected())
                    self._losses += 1
                    if self._losses >= LOSSES_BEFORE_ASKING:
                        self._look_for_the_broker()
                case CredentialsRefused():
                    log.error("broker_refused_password", times=item.times, reason=item.reason)
                    await self._send.send(session.Disconnected())
                    self._look_for_the_broker()
                case Received():
                    await self._understand(item)

    async def _understand(self, item: Received) -> None:
        now = time.monotonic()
        try:
            event = event_from(item.topic, item.payload, self._guard, sid=self.link.sid, now=now)
            if isinstance(event, NewCertificate):
                if self._on_certificate is not None:
                    self._on_certificate(event.pem)
                return
        except ProtocolError as error:
            reason = self.counters.drop(error)
            log.warning("message_dropped", topic=item.topic, reason=reason, error=str(error))
            return
        except Refused as error:
            self._on_hopeless(error)
            return
        if event is not None:
            await self._send.send(event)

    def _look_for_the_broker(self) -> None:
        """Ask the server where the broker is now; never at the price of work in progress."""
        if self.session.busy_with is None:
            self._on_hopeless(None)

    def _carry_out(self, action: session.Action, tasks: TaskGroup) -> None:
        match action:
            case session.PublishBirth():
                birth = introduction(self.workshop, self.boot_id, self.datasets)
                self._publish(Channel.BIRTH, birth)
            case session.PublishHeartbeat():
                self._publish(Channel.HEARTBEAT, self._heartbeat(action), qos=0)
            case session.AnswerCommand():
                ack = Ack(
                    re=action.message_id,
                    status="ok" if action.status == "ok" else "rejected",
                    code=action.code,
                    detail=action.detail,
                )
                self._publish(Channel.DEVICE_ACK, ack)
            case session.StartWork():
                tasks.start_soon(self._work, action, name="work")
            case session.StopWork():
                tasks.start_soon(self._stop_work, name="stop work")
            case session.StartBenchmark():
                tasks.start_soon(self._benchmark, action, name="benchmark")
            case session.PostUpdate():
                message_id = UPDATE_PREFIX + action.manifest.assignment_id
                self._post(Channel.UPDATE, action.manifest, message_id)
            case session.PostFailure():
                log.warning(
                    "assignment_failed",
                    assignment_id=action.failure.assignment_id,
                    code=action.failure.code.value,
                    detail=action.failure.detail,
                )
                message_id = FAILURE_PREFIX + action.failure.assignment_id
                self._post(Channel.EVENT, Event(event=action.failure), message_id)
            case session.PostCapability():
                measured = Capability(capability=action.capability)
                self._publish(Channel.EVENT, Event(event=measured))
            case session.PostUnmeasured():
                self._publish(Channel.EVENT, Event(event=action.unmeasured))
            case session.PostponeOutbox():
                self.outbox.postpone(
                    action.message_id, now=time.monotonic(), at_least_s=action.retry_after_s
                )
            case session.ClearOutbox():
                self._clear(action)
            case session.ResendOutbox():
                self.outbox.reconnected(time.monotonic())

    # Messages

    def _topic(self, channel: Channel) -> str:
        return str(DeviceTopic(self.settings.fleet, self.settings.device_id, channel))

    def _heartbeat(self, due: session.PublishHeartbeat) -> Heartbeat:
        return Heartbeat(
            sequence=due.sequence,
            busy_with=due.busy_with,
            rss_bytes=resident_bytes(os.getpid()),
            temperature_c=self.workshop.watch.reading.temperature_c,
            not_training=self.workshop.watch.reason[:500],
            dropped_messages=self.counters.dropped.total(),
        )

    def _publish(
        self, channel: Channel, body: Birth | Heartbeat | Ack | Event, *, qos: int = 1
    ) -> None:
        """Send now what no outbox keeps."""
        payload = encode_message(body, message_id=uuid.uuid4().hex, sid=self.link.sid)
        if channel is not Channel.HEARTBEAT:
            payload = self._sign(payload)
        self.link.publish(self._topic(channel), payload, qos=qos)

    def _post(self, channel: Channel, body: UpdateManifest | Event, message_id: str) -> None:
        payload = encode_message(body, message_id=message_id, sid=self.link.sid)
        try:
            message = OutgoingMessage(message_id, self._topic(channel), payload)
            self.outbox.add(message, now=time.monotonic())
        except DeviceError as error:
            # It is sent all the same; after a kill the round directory says it again.
            log.error("outbox_not_written", message_id=message_id, error=str(error))

    def _publish_outbox(self) -> None:
        if self.link.connected:
            for message in self.outbox.due(time.monotonic()):
                self.counters.handed_out(message.message_id)
                # Signed now: a certificate of before may have ended, or been replaced, meanwhile.
                self.link.publish(message.topic, self._sign(message.payload))

    def _clear(self, action: session.ClearOutbox) -> None:
        if not self.outbox.acknowledged(action.message_id):
            return
        self.counters.answered(action.message_id, rejected=bool(action.rejected))
        if action.rejected:
            log.warning("update_rejected", message_id=action.message_id, why=action.rejected)
        for prefix in (UPDATE_PREFIX, FAILURE_PREFIX):
            assignment_id = action.message_id.removeprefix(prefix)
            if assignment_id not in (action.message_id, self.session.busy_with):
                self.workshop.state.forget_round(assignment_id)

    def _owed(self, prefix: str) -> list[str]:
        """Assignments whose answer of this kind is still in the outbox."""
        return [
            message_id.removeprefix(prefix)
            for message_id in self.outbox.message_ids
            if message_id.startswith(prefix)
        ]

    # Work

    async def _work(self, action: session.StartWork) -> None:
        start = action.start
        log.info("assignment_started", assignment_id=start.assignment_id, depth=start.lora.depth)
        self.workshop.state.keep_rounds({start.assignment_id, *self._owed(UPDATE_PREFIX)})
        outcome: session.Event
        self._work_ended = anyio.Event()
        with anyio.CancelScope() as scope:
            self._work_scope = scope
            outcome = await outcome_of(
                start.assignment_id, lambda: do_round(self.workshop, start, self._progress)
            )
        if scope.cancelled_caught:
            outcome = session.WorkFailed(
                start.assignment_id, FailureCode.CANCELLED, "the server cancelled it"
            )
        self._work_scope = None
        self._work_ended.set()
        if isinstance(outcome, session.WorkFailed):
            self.workshop.state.forget_round(start.assignment_id)
        self.workshop.state.trim_blobs(CACHED_ADAPTER_BYTES)
        await self._send.send(outcome)
        give_back()

    async def _stop_work(self) -> None:
        scope = self._work_scope
        if scope is None:
            return
        ended = self._work_ended
        await self.workshop.trainer.cancel()
        with anyio.move_on_after(STOP_PATIENCE_S):
            await ended.wait()
            return
        scope.cancel()

    async def _benchmark(self, action: session.StartBenchmark) -> None:
        shop = self.workshop
        log.info("benchmark_started", model=action.model_digest[:12])
        outcome: session.Event
        try:
            capability = await benchmark_device(
                shop.device,
                shop.state,
                blobs=shop.blobs,
                provisioning=shop.provisioning,
                trainer=shop.trainer,
                model_digest=action.model_digest,
                on_step=lambda *_: None,
            )
            log.info("benchmark_finished")
            outcome = session.BenchmarkFinished(capability)
        except LegendError as error:
            log.error("benchmark_failed", error=str(error))
            outcome = session.BenchmarkFailed(str(error))
        except Exception as error:
            log.exception("benchmark_crashed")
            outcome = session.BenchmarkFailed(f"{type(error).__name__}: {error}")
        await self._send.send(outcome)
        give_back()

    def _progress(self, progress: Progress) -> None:
        now = time.monotonic()
        if progress.phase == "training" and now - self._progress_at < PROGRESS_INTERVAL_S:
            return
        self._progress_at = now
        self._publish(Channel.EVENT, Event(event=progress), qos=0)

    def _status(self) -> dict[str, object]:
        return {
            "device_id": self.settings.device_id,
            "version": self._version,
            "fleet": self.settings.fleet,
            "server": self.settings.server,
            "connected": self.session.connected,
            "sid": self.link.sid,
            "busy_with": self.session.busy_with,
            "not_training": self.workshop.watch.reason,
            "benchmarking": self.session.benchmarking is not None,
            "outbox": len(self.outbox),
            "trainer_starts": self.workshop.trainer.starts,
            "dropped_messages": self.counters.dropped.total(),
            **self.workshop.traffic,
            "rss_bytes": resident_bytes(os.getpid()),
        }
