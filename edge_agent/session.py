"""What an agent does next: events in, actions out.

Every decision about commands, duplicates and the order of work is here; no I/O,
no clock. An agent does one thing at a time: nothing, a benchmark, or one
assignment. What it owes the server lies in the outbox until acknowledged.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from typing_extensions import assert_never

from wire_protocol.errors import FailureCode
from wire_protocol.messages import (
    Ack,
    Benchmark,
    Command,
    Failure,
    Rebirth,
    RoundCancel,
    RoundStart,
    Unmeasured,
    UpdateManifest,
)
from wire_protocol.parts import CapabilityProfile

HEARTBEAT_JITTER = 0.2
REMEMBERED_ASSIGNMENTS = 64
"""A command can come again long after it was done; these many are recognised."""


@dataclass(frozen=True)
class Connected:
    """The broker took us in, under this session number."""

    sid: int


@dataclass(frozen=True)
class Disconnected:
    """The connection is gone; the link tries again by itself."""


@dataclass(frozen=True)
class CommandArrived:
    """The server wants something; ``message_id`` waits for an ack."""

    message_id: str
    command: Command


@dataclass(frozen=True)
class AckArrived:
    """The server answered one of our messages."""

    ack: Ack


@dataclass(frozen=True)
class WorkFinished:
    """The update is in the server's blob store; the manifest says so."""

    manifest: UpdateManifest


@dataclass(frozen=True)
class WorkFailed:
    """The assignment ended without an update."""

    assignment_id: str
    code: FailureCode
    detail: str


@dataclass(frozen=True)
class BenchmarkFinished:
    """This device measured itself anew."""

    capability: CapabilityProfile


@dataclass(frozen=True)
class BenchmarkFailed:
    """It could not, and why."""

    detail: str


@dataclass(frozen=True)
class Tick:
    """Nothing happened, but time passed."""


Event = (
    Connected
    | Disconnected
    | CommandArrived
    | AckArrived
    | WorkFinished
    | WorkFailed
    | BenchmarkFinished
    | BenchmarkFailed
    | Tick
)


@dataclass(frozen=True)
class PublishBirth:
    """Say who we are."""


@dataclass(frozen=True)
class PublishHeartbeat:
    """Say that we are still here."""

    sequence: int
    busy_with: str | None


@dataclass(frozen=True)
class AnswerCommand:
    """Acknowledge a command."""

    message_id: str
    status: str
    code: str = ""
    detail: str = ""


@dataclass(frozen=True)
class StartWork:
    """Fetch, train, upload; answer ``WorkFinished`` or ``WorkFailed``."""

    start: RoundStart


@dataclass(frozen=True)
class StopWork:
    """End the running assignment; it will answer ``WorkFailed``."""


@dataclass(frozen=True)
class StartBenchmark:
    """Measure this device with a base model."""

    model_digest: str


@dataclass(frozen=True)
class PostUpdate:
    """Put the manifest into the outbox, then publish it until acknowledged."""

    manifest: UpdateManifest


@dataclass(frozen=True)
class PostFailure:
    """Put the failure into the outbox, then publish it until acknowledged."""

    failure: Failure


@dataclass(frozen=True)
class PostCapability:
    """Publish a new capability profile."""

    capability: CapabilityProfile


@dataclass(frozen=True)
class PostUnmeasured:
    """Tell the server why there is no capability profile."""

    unmeasured: Unmeasured


@dataclass(frozen=True)
class PostponeOutbox:
    """The server is busy: send this message again, but not before that."""

    message_id: str
    retry_after_s: float


@dataclass(frozen=True)
class ClearOutbox:
    """The server has it: delete the message, and its round when it was an update."""

    message_id: str
    rejected: str = ""


@dataclass(frozen=True)
class ResendOutbox:
    """Publish everything in the outbox now: the connection is new."""


Action = (
    PublishBirth
    | PublishHeartbeat
    | AnswerCommand
    | StartWork
    | StopWork
    | StartBenchmark
    | PostUpdate
    | PostFailure
    | PostCapability
    | PostUnmeasured
    | PostponeOutbox
    | ClearOutbox
    | ResendOutbox
)


class Session:
    """The agent's mind.

    Args:
        heartbeat_s: mean seconds between heartbeats.
        rng: for jitter.
        updated: assignments whose update was still in the outbox at the start.
        given_up: the same for failures.
    """

    def __init__(
        self,
        heartbeat_s: float,
        rng: random.Random,
        *,
        updated: Iterable[str] = (),
        given_up: Iterable[str] = (),
    ) -> None:
        self.heartbeat_s = heartbeat_s
        self.sid = 0
        self.connected = False
        self.working_on: RoundStart | None = None
        self.benchmarking: str | None = None
        self._next_start: RoundStart | None = None
        self._next_benchmark: str | None = None
        self._cancelled = False
        self._updated = deque(updated, maxlen=REMEMBERED_ASSIGNMENTS)
        self._given_up = deque(given_up, maxlen=REMEMBERED_ASSIGNMENTS)
        self._rng = rng
        self._sequence = 0
        self._heartbeat_at = math.inf
        self._birth_at = math.inf

    @property
    def busy_with(self) -> str | None:
        """The assignment in progress."""
        return self.working_on.assignment_id if self.working_on else None

    def handle(self, event: Event, now: float) -> list[Action]:
        """Apply one event and say what must be done about it.

        Args:
            event: what happened; the same command twice is harmless.
            now: seconds on the caller's monotonic clock; never goes backwards.
        """
        match event:
            case Connected():
                return self._connected(event, now)
            case Disconnected():
                self.connected = False
                self._heartbeat_at = self._birth_at = math.inf
                return []
            case CommandArrived():
                return self._command(event, now)
            case AckArrived():
                if event.ack.status == "busy":
                    return [PostponeOutbox(event.ack.re, event.ack.retry_after_s)]
                rejected = event.ack.detail or event.ack.code
                return [
                    ClearOutbox(event.ack.re, rejected if event.ack.status == "rejected" else "")
                ]
            case WorkFinished():
                self.working_on = None
                self._updated.append(event.manifest.assignment_id)
                return [PostUpdate(event.manifest), *self._next_work()]
            case WorkFailed():
                return self._work_failed(event)
            case BenchmarkFinished():
                self.benchmarking = None
                return [PostCapability(event.capability), *self._next_work()]
            case BenchmarkFailed():
                return self._benchmark_failed(event)
            case Tick():
                return self._tick(now)
            case _:
                assert_never(event)

    def next_deadline(self) -> float | None:
        """When to call ``handle(Tick(), now)`` if nothing else happens first."""
        due = min(self._heartbeat_at, self._birth_at)
        return None if math.isinf(due) else due

    def _connected(self, event: Connected, now: float) -> list[Action]:
        self.sid = event.sid
        self.connected = True
        self._plan_heartbeat(now)
        return [PublishBirth(), ResendOutbox()]

    def _plan_heartbeat(self, now: float) -> None:
        factor = self._rng.uniform(1 - HEARTBEAT_JITTER, 1 + HEARTBEAT_JITTER)
        self._heartbeat_at = now + self.heartbeat_s * factor

    def _tick(self, now: float) -> list[Action]:
        actions: list[Action] = []
        if now >= self._birth_at:
            self._birth_at = math.inf
            actions.append(PublishBirth())
        if now >= self._heartbeat_at:
            self._plan_heartbeat(now)
            self._sequence += 1
            actions.append(PublishHeartbeat(self._sequence, self.busy_with))
        return actions

    def _command(self, event: CommandArrived, now: float) -> list[Action]:
        command = event.command.command
        answer = AnswerCommand(event.message_id, "ok")
        match command:
            case RoundStart():
                return self._round_start(event.message_id, command)
            case RoundCancel():
                return [answer, *self._round_cancel(command)]
            case Rebirth():
                self._birth_at = now + self._rng.uniform(0, command.jitter_s)
                return [answer]
            case Benchmark():
                return [answer, *self._benchmark(command.model_digest)]
            case _:
                assert_never(command)

    def _round_start(self, message_id: str, start: RoundStart) -> list[Action]:
        if start.assignment_id in self._updated:
            return [AnswerCommand(message_id, "ok", "done"), ResendOutbox()]
        if start.assignment_id in self._given_up:
            detail = "this assignment already ended here without an update"
            return [AnswerCommand(message_id, "rejected", "given_up", detail)]
        answer = AnswerCommand(message_id, "ok")
        if self.busy_with == start.assignment_id and not self._cancelled:
            return [answer]
        self._next_start = start
        if self.working_on is not None:
            # The server moved on: what we do now belongs to a round that is over.
            self._cancelled = True
            return [answer, StopWork()]
        return [answer, *self._next_work()]

    def _round_cancel(self, cancel: RoundCancel) -> list[Action]:
        if self._next_start and self._next_start.assignment_id == cancel.assignment_id:
            self._next_start = None
        if cancel.assignment_id not in self._updated:
            self._given_up.append(cancel.assignment_id)
        if self.busy_with != cancel.assignment_id or self._cancelled:
            return []
        self._cancelled = True
        return [StopWork()]

    def _benchmark(self, model_digest: str) -> list[Action]:
        if self.benchmarking != model_digest:
            self._next_benchmark = model_digest
        return self._next_work()

    def _next_work(self) -> list[Action]:
        """Begin what waits, if nothing is going on. Assignments come first."""
        if self.working_on is not None or self.benchmarking is not None:
            return []
        if self._next_start is not None:
            self.working_on, self._next_start = self._next_start, None
            self._cancelled = False
            return [StartWork(self.working_on)]
        if self._next_benchmark is not None:
            self.benchmarking, self._next_benchmark = self._next_benchmark, None
            return [StartBenchmark(self.benchmarking)]
        return []

    def _benchmark_failed(self, event: BenchmarkFailed) -> list[Action]:
        digest, self.benchmarking = self.benchmarking, None
        if digest is None:
            return self._next_work()
        unmeasured = Unmeasured(model_digest=digest, detail=event.detail[:500])
        return [PostUnmeasured(unmeasured), *self._next_work()]

    def _work_failed(self, event: WorkFailed) -> list[Action]:
        wanted, self.working_on = not self._cancelled, None
        self._given_up.append(event.assignment_id)
        following = self._next_work()
        if not wanted:
            return following  # the server gave it up itself and expects no answer
        why = event.detail[:500]
        failure = Failure(assignment_id=event.assignment_id, code=event.code, detail=why)
        # Less is free than the server thinks: it must know before it assigns again.
        births = event.code is FailureCode.OUT_OF_MEMORY and self.connected
        return [*([PublishBirth()] if births else []), PostFailure(failure), *following]
