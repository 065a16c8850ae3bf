"""Carries out what a run's coordinator decides: the shell around one run.

One loop with a clock. Slow work (checking, aggregating, evaluating) runs beside
it and comes back as an event. ``SaveCheckpoint`` and ``RecordUpdate`` are done
where they stand in the list of actions, so what follows them is true.
"""

from __future__ import annotations

import functools
import json
import math
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import anyio
import anyio.lowlevel
import structlog
from anyio.abc import TaskGroup

from broker_server import run_events as events
from broker_server.adapter_cuts import stored_cuts
from broker_server.blobs import BlobStore
from broker_server.board_bounds import cross_checked
from broker_server.coordinator import Coordinator, Phase
from broker_server.delivery import CANDIDATE_FOLDER, Delivery, RunContext
from broker_server.disk_space import until_stored
from broker_server.evaluator import Evaluator
from broker_server.privacy import epsilon_after
from broker_server.run_state import RunStatus
from broker_server.store import Store
from broker_server.strategies.learning import restore_state, saved_state
from broker_server.update_bytes import new_adapter, problem_with
from wire_protocol.errors import LegendError, ProtocolError
from wire_protocol.lora import Codec
from wire_protocol.messages import (
    Ack,
    Benchmark,
    Command,
    Progress,
    RoundCancel,
    UpdateManifest,
)
from wire_protocol.parts import BlobRef
from wire_protocol.tensors import MAX_ADAPTER_BYTES, encode

log = structlog.get_logger()


class Post(Protocol):
    """Sends messages to one device."""

    def command(self, device_id: str, command: Command) -> str:
        """Send a command; returns its message id."""

    def ack(self, device_id: str, ack: Ack) -> None:
        """Answer a message."""


@dataclass
class LiveMember:
    """What a device last said about its assignment, for people."""

    phase: str = "assigned"
    step: int = 0
    steps: int = 0
    loss: float | None = None


@dataclass
class RunLoop:
    """One run while it runs.

    Args:
        context: names and shapes.
        coordinator: decides.
        folder: where the results go.
        on_report: told about every accepted update, to learn capacities from.
        on_commit: told about every committed round.
    """

    context: RunContext
    coordinator: Coordinator
    store: Store
    blobs: BlobStore
    evaluator: Evaluator
    folder: Path
    post: Post
    on_report: Callable[[str, UpdateManifest], None]
    on_commit: Callable[[str], Awaitable[object]]
    commands: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Message id of every open command -> (device, assignment)."""
    live: dict[str, LiveMember] = field(default_factory=dict)
    ended: tuple[RunStatus, str] | None = None

    def __post_init__(self) -> None:
        self._delivery = Delivery(self.context, self.store, self.blobs, self.folder, self.on_commit)
        self._strategy_states: set[str] = set()
        self._send, self._receive = anyio.create_memory_object_stream[events.Event](math.inf)

    @property
    def begun(self) -> bool:
        """Whether the round of before a restart is open again; until then updates must wait."""
        return self.coordinator.phase is not Phase.STARTING

    def feed(self, event: events.Event) -> None:
        """Queue an event for the loop; called from the event loop only.

        The queue has no bound: events are small, and devices resend what matters
        no faster than once a second.
        """
        self._send.send_nowait(event)

    def progress(self, device_id: str, progress: Progress) -> None:
        """Show what a member does with its assignment; no decision depends on it."""
        open_round = self.coordinator.round
        member = open_round.members.get(device_id) if open_round else None
        if member is None or member.checkpoint.assignment_id != progress.assignment_id:
            return
        self.live[device_id] = LiveMember(
            progress.phase, progress.step, progress.steps, progress.loss
        )

    async def run(self) -> tuple[RunStatus, str]:
        """Drive the run to its end."""
        await until_stored(self._delivery.finish_last_commit, what="the last round")
        self.feed(events.RunStarted())
        ended: tuple[RunStatus, str] | None = None
        async with anyio.create_task_group() as tasks:
            while ended is None:
                event = await self._next_event()
                for action in self.coordinator.handle(event, time.monotonic()):
                    work = functools.partial(self._carry_out, action, tasks)
                    await until_stored(work, what=type(action).__name__)
                ended = self.ended
            tasks.cancel_scope.cancel()
        return ended or (RunStatus.FAILED, "the run's loop ended without a decision")

    async def _next_event(self) -> events.Event:
        """What is queued comes first: a wake-up time that has passed must not hide it."""
        # The events of two hundred updates at once must not keep everybody else waiting.
        await anyio.lowlevel.checkpoint()
        try:
            return self._receive.receive_nowait()
        except anyio.WouldBlock:
            pass
        deadline = self.coordinator.next_deadline()
        patience_s = None if deadline is None else max(0.0, deadline - time.monotonic())
        with anyio.move_on_after(patience_s):
            return await self._receive.receive()
        return events.Tick()

    async def _carry_out(self, action: events.Action, tasks: TaskGroup) -> None:
        match action:
            case events.MeasureDevice():
                digest = self.coordinator.plan.model_digest
                self.post.command(action.device_id, Command(command=Benchmark(model_digest=digest)))
            case events.SendAssignment():
                start = action.start
                message_id = self.post.command(action.device_id, Command(command=start))
                self.commands[message_id] = (action.device_id, start.assignment_id)
                self.live.setdefault(action.device_id, LiveMember())
            case events.CancelAssignment():
                cancel = RoundCancel(assignment_id=action.assignment_id, reason=action.reason[:500])
                self.post.command(action.device_id, Command(command=cancel))
            case events.CheckUpdate():
                tasks.start_soon(self._check, action, name="check update")
            case events.RecordUpdate():
                await self._record(action)
            case events.Acknowledge():
                self._acknowledge(action)
            case events.AggregateRound():
                tasks.start_soon(self._aggregate, action, name="aggregate")
            case events.EvaluateAdapter():
                tasks.start_soon(self._evaluate, action, name="evaluate")
            case events.SaveCheckpoint():
                await self._save(action)
            case events.FinishRun():
                self.ended = (action.status, action.reason)

    def command_answered(self, ack: Ack) -> None:
        """A device answered one of our commands."""
        device_id, assignment_id = self.commands.pop(ack.re, ("", ""))
        if not device_id:
            return
        if ack.status == "ok":
            self.feed(events.AssignmentAccepted(device_id, assignment_id))
        elif ack.status == "rejected":
            self.feed(events.AssignmentFailed(device_id, assignment_id, ack.code, ack.detail))

    def _acknowledge(self, action: events.Acknowledge) -> None:
        if action.status == "rejected":
            log.warning(
                "update_rejected",
                device_id=action.device_id,
                code=action.code,
                detail=action.detail,
            )
        ack = Ack(
            re=action.message_id,
            status="ok" if action.status == "ok" else "rejected",
            code=action.code,
            detail=action.detail[:500],
        )
        self.post.ack(action.device_id, ack)

    async def _record(self, action: events.RecordUpdate) -> None:
        manifest, number = action.manifest, action.manifest.round_number
        text = manifest.model_dump_json()
        # A disk takes its time to promise; the server listens meanwhile.
        record = functools.partial(
            self.store.record_update, manifest.run_id, number, action.device_id, text
        )
        await anyio.to_thread.run_sync(record)
        self.on_report(action.device_id, self._cross_checked(action))
        self.live[action.device_id] = LiveMember(
            "updated",
            manifest.report.steps_done,
            manifest.report.steps_done,
            manifest.report.last_loss,
        )
        log.info(
            "update_accepted",
            device_id=action.device_id,
            round_number=manifest.round_number,
            size_bytes=manifest.update.size_bytes,
        )

    def _cross_checked(self, action: events.RecordUpdate) -> UpdateManifest:
        """The manifest with times that can be true of what was seen here."""
        open_round = self.coordinator.round
        member = open_round.members.get(action.device_id) if open_round else None
        if member is None or member.completion_s is None:
            return action.manifest
        report, doubt = cross_checked(action.manifest.report, member.completion_s)
        if doubt:
            log.warning("times_not_believed", device_id=action.device_id, why=doubt)
        return action.manifest.model_copy(update={"report": report})

    # Slow work, beside the loop

    async def _check(self, action: events.CheckUpdate) -> None:
        problem = await anyio.to_thread.run_sync(self._problem_with, action)
        self.feed(
            events.UpdateChecked(action.device_id, action.message_id, action.manifest, problem)
        )

    def _problem_with(self, action: events.CheckUpdate) -> str | None:
        """Look at the size before the bytes; None when all is well."""
        manifest, context = action.manifest, self.context
        try:
            size_bytes = self.blobs.size_bytes(manifest.update.sha256)
            if size_bytes != manifest.update.size_bytes:
                return (
                    f"blob has {size_bytes} bytes, the manifest says {manifest.update.size_bytes}"
                )
            if size_bytes > MAX_ADAPTER_BYTES:
                return f"update of {size_bytes} bytes exceeds {MAX_ADAPTER_BYTES}"
            data = self.blobs.read(manifest.update.sha256)
        except (ProtocolError, OSError) as error:
            return str(error)
        return problem_with(
            data,
            manifest,
            context.model_shape,
            len(context.labels),
            assigned=action.assigned,
        )

    async def _aggregate(self, action: events.AggregateRound) -> None:
        self._delivery.spent = {action.base.sha256} | {
            update.manifest.update.sha256 for update in action.updates
        }
        self._delivery.spent |= self.coordinator.prefix.checkpoint().blobs()
        try:
            work = functools.partial(anyio.to_thread.run_sync, self._new_adapter, action)
            aggregated = await until_stored(work, what="the new global adapter")
        except (LegendError, OSError, MemoryError) as error:
            log.exception("aggregation_failed", round_number=action.round_number)
            self.feed(events.StepBroke(f"aggregation failed: {error}"))
            return
        for finding in aggregated.findings:
            log.warning("update_not_in_full", round_number=action.round_number, **asdict(finding))
        self.feed(aggregated)

    def _new_adapter(self, action: events.AggregateRound) -> events.RoundAggregated:
        base, read = self.blobs.read(action.base.sha256), self.blobs.read
        strategy, open_round = self.coordinator.strategy, self.coordinator.round
        members = open_round.members.values() if open_round else ()
        before = saved_state(strategy)
        try:
            new = new_adapter(
                strategy,
                base,
                action.updates,
                read=read,
                assigned=[member.checkpoint for member in members],
            )
            adapter = BlobRef(sha256=self.blobs.put(new.data), size_bytes=len(new.data))
            cuts = stored_cuts(
                self.blobs,
                new.data,
                self.coordinator.plan,
                next_round=action.round_number + 1,
            )
        except BaseException:
            # It will be done again, where the disk was full: nothing may be learned twice.
            restore_state(strategy, before)
            raise
        epsilon = self._epsilon(action.round_number)
        return events.RoundAggregated(adapter, new.findings, epsilon, cuts)

    def _epsilon(self, rounds: int) -> float | None:
        privacy = self.context.privacy
        return None if privacy is None else epsilon_after(privacy, rounds)

    async def _evaluate(self, action: events.EvaluateAdapter) -> None:
        metrics: dict[str, float | int | str | None] = {"round": action.round_number}
        # Hidden until its round is committed: the folder of results shows committed rounds.
        export = functools.partial(self._delivery.export, action.adapter, metrics, CANDIDATE_FOLDER)
        try:
            work = functools.partial(anyio.to_thread.run_sync, export)
            folder = await until_stored(work, what="the adapter to evaluate")
            result = await self.evaluator.evaluate(folder)
        except (LegendError, OSError) as error:
            log.exception("evaluation_failed", round_number=action.round_number)
            self.feed(events.StepBroke(f"evaluation failed: {error}"))
            return
        self.feed(events.AdapterEvaluated(result.accuracy, result.loss))

    async def _save(self, action: events.SaveCheckpoint) -> None:
        result = action.result
        baseline = action.baseline
        checkpoint = action.checkpoint
        if tensors := saved_state(self.coordinator.strategy):
            state = encode(tensors, Codec.FP32)
            ref = BlobRef(sha256=self.blobs.put(state), size_bytes=len(state))
            checkpoint = checkpoint.model_copy(update={"strategy_state": ref})
            self._delivery.spent |= self._strategy_states - {ref.sha256}
            self._strategy_states = {ref.sha256}
        self.store.save_checkpoint(
            self.context.run_id,
            checkpoint.model_dump_json(),
            baseline=json.dumps(asdict(baseline)) if baseline else None,
            result=None if result is None else (result.round, result.model_dump_json()),
        )
        if result is not None:
            log.info(
                "round_committed",
                round_number=result.round,
                accuracy=round(result.accuracy, 4),
                duration_s=round(result.duration_s, 2),
            )
            await self._delivery.after_commit(result, checkpoint)
        self.live.clear()
        self.commands.clear()


def new_message_id() -> str:
    """An id for one logical message."""
    return uuid.uuid4().hex
