"""The round that is open: who was assigned what, and what they answered.

Answers to updates that do not fit are part of the contract:

    for a round or run that is over      rejected, code ``stale``
    recorded before                      ok, code ``duplicate``
    not assigned to this device          rejected, code ``unknown_assignment``
    not against this round's adapter     rejected, code ``wrong_base``
    other names, shapes, ranks, values   rejected, code ``malformed``

No I/O, no clock: time is an argument.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping

from broker_server.run_events import (
    AcceptedUpdate,
    Acknowledge,
    Action,
    AssignmentAccepted,
    AssignmentFailed,
    CancelAssignment,
    CheckUpdate,
    RecordUpdate,
    SendAssignment,
    UpdateArrived,
    UpdateChecked,
)
from broker_server.run_state import (
    KnownDevice,
    Member,
    MemberCheckpoint,
    MemberStatus,
    RunPlan,
)
from wire_protocol.lora import LoraConfig
from wire_protocol.messages import RoundStart, UpdateManifest
from wire_protocol.parts import BlobRef

LONGEST_ROUND_S = 1e7
DEADLINE_FACTOR = 3.0
DEADLINE_FLOOR_S = 60.0
"""Without a deadline in the run's settings a round may take this many times
its predicted length, but never less than the floor: first predictions of a
board that nobody measured under load are often off by two."""


class OpenRound:
    """Collects the updates of one round.

    Args:
        plan: what never changes during the run.
        number: from 1.
        adapter: the global adapter that every update is a delta against.
        parts: the assignments, by device.
        recorded: updates that were acknowledged before a restart.
        now: when the assignments go out.
    """

    def __init__(
        self,
        plan: RunPlan,
        number: int,
        adapter: BlobRef,
        parts: Mapping[str, MemberCheckpoint],
        recorded: Mapping[str, UpdateManifest],
        now: float,
    ) -> None:
        self.plan = plan
        self.number = number
        self.adapter = adapter
        self.began = now
        longest = max(part.predicted_s for part in parts.values())
        self.until = now + (plan.deadline_s or max(DEADLINE_FLOOR_S, DEADLINE_FACTOR * longest))
        self.closed = False
        self.members = {name: Member(part, now, now) for name, part in parts.items()}
        for name, manifest in recorded.items():
            self.members[name].status = MemberStatus.UPDATED
            self.members[name].manifest = manifest

    def send(self, device_ids: Iterable[str], now: float) -> list[Action]:
        """Assignments, again or for the first time, for devices still pending."""
        actions: list[Action] = []
        for device_id in device_ids:
            member = self.members[device_id]
            if member.pending and not self.closed:
                member.sent_at = now
                member.given_up = False
                actions.append(SendAssignment(device_id, self._round_start(member, now)))
        return actions

    def resend(self, devices: Mapping[str, KnownDevice], now: float) -> list[Action]:
        """Assignments that an online device has not answered for too long."""
        if now >= self.until:
            return []
        return self.send(
            [
                name
                for name, member in self.members.items()
                if member.status is MemberStatus.ASSIGNED
                and devices[name].online
                and now >= member.sent_at + self.plan.resend_s
            ],
            now,
        )

    def next_deadline(self, devices: Mapping[str, KnownDevice]) -> float:
        """When this round needs a tick: its end, a resend, a lost device given up."""
        times = [self.until]
        for name, member in self.members.items():
            if member.pending and not devices[name].online and not member.given_up:
                times.append(devices[name].lost_at + self.plan.lost_grace_s)
            elif member.status is MemberStatus.ASSIGNED and devices[name].online:
                times.append(member.sent_at + self.plan.resend_s)
        return min(times)

    def is_collected(self, devices: Mapping[str, KnownDevice], now: float) -> bool:
        """True when all answered, enough answered, or time is up."""
        self._give_up_lost(devices, now)
        updated = sum(m.status is MemberStatus.UPDATED for m in self.members.values())
        waiting = any(member.pending and not member.given_up for member in self.members.values())
        enough = updated >= math.ceil(self.plan.quorum * len(self.members)) and updated > 0
        return not waiting or enough or now >= self.until

    def _give_up_lost(self, devices: Mapping[str, KnownDevice], now: float) -> None:
        for name, member in self.members.items():
            grace_ends = devices[name].lost_at + self.plan.lost_grace_s
            if member.pending and not devices[name].online and now >= grace_ends:
                member.given_up = True

    def close(self, now: float) -> tuple[list[Action], tuple[AcceptedUpdate, ...]]:
        """End collecting: who is late is cancelled, who answered takes part."""
        self.closed = True
        self.collected_s = now - self.began
        actions = self.cancel("its update did not arrive before the round ended")
        for member in self.members.values():
            if member.pending:
                member.status = MemberStatus.STRAGGLER
                member.detail = "no update before the round ended"
        accepted = tuple(
            AcceptedUpdate(name, member.manifest)
            for name, member in sorted(self.members.items())
            if member.status is MemberStatus.UPDATED and member.manifest
        )
        return actions, accepted

    def cancel(self, reason: str) -> list[Action]:
        """Tell every pending device that its work is not needed any more."""
        return [
            CancelAssignment(name, member.checkpoint.assignment_id, reason)
            for name, member in self.members.items()
            if member.pending
        ]

    def accepted(self, event: AssignmentAccepted) -> None:
        """The device works on it: no need to send it again."""
        member = self._member(event.device_id, event.assignment_id)
        if member and member.status is MemberStatus.ASSIGNED:
            member.status = MemberStatus.ACCEPTED

    def failed(self, event: AssignmentFailed) -> None:
        """The device cannot finish; the round does not wait for it."""
        member = self._member(event.device_id, event.assignment_id)
        if member and member.pending:
            member.status = MemberStatus.FAILED
            member.detail = f"{event.code}: {event.detail}"

    def update_arrived(self, event: UpdateArrived) -> list[Action]:
        """Decide from the manifest alone; bytes are checked by ``CheckUpdate``."""
        manifest = event.manifest
        member = self.members.get(event.device_id)
        if member is None or member.checkpoint.assignment_id != manifest.assignment_id:
            over = manifest.run_id != self.plan.run_id or manifest.round_number < self.number
            return [_rejected(event, "stale" if over else "unknown_assignment")]
        if member.status is MemberStatus.UPDATED:
            return [Acknowledge(event.device_id, event.message_id, "ok", "duplicate")]
        if member.status is MemberStatus.CHECKING:
            return []  # a resend; the check that runs will answer under the same id
        if self.closed or not member.pending:
            return [_rejected(event, "stale")]
        if manifest.base_sha256 != (member.checkpoint.base or self.adapter).sha256:
            return self._refuse(event, member, "wrong_base", "not against this round's adapter")
        if problem := _rank_problem(manifest.ranks, member.checkpoint.ranks):
            return self._refuse(event, member, "malformed", problem)
        member.status = MemberStatus.CHECKING
        return [CheckUpdate(event.device_id, event.message_id, manifest, member.checkpoint)]

    def update_checked(self, event: UpdateChecked, now: float) -> list[Action]:
        """Take the update in, or say what is wrong with it."""
        member = self._member(event.device_id, event.manifest.assignment_id)
        if member is None or member.status is not MemberStatus.CHECKING:
            return [_rejected(event, "stale")]
        if event.problem:
            return self._refuse(event, member, "malformed", event.problem)
        member.status = MemberStatus.UPDATED
        member.manifest = event.manifest
        member.completion_s = now - member.assigned_at
        return [
            RecordUpdate(event.device_id, event.manifest),
            Acknowledge(event.device_id, event.message_id, "ok"),
        ]

    def _member(self, device_id: str, assignment_id: str) -> Member | None:
        member = self.members.get(device_id)
        if member is None or self.closed or member.checkpoint.assignment_id != assignment_id:
            return None
        return member

    def _refuse(
        self, event: UpdateArrived | UpdateChecked, member: Member, code: str, detail: str
    ) -> list[Action]:
        member.status = MemberStatus.FAILED
        member.detail = f"{code}: {detail}"
        return [_rejected(event, code, detail)]

    def _round_start(self, member: Member, now: float) -> RoundStart:
        part = member.checkpoint
        seed = hashlib.sha256(f"{self.plan.seed}/{part.assignment_id}".encode()).digest()
        return RoundStart(
            run_id=self.plan.run_id,
            round_number=self.number,
            assignment_id=part.assignment_id,
            ranks=part.ranks,
            factors=part.factors,
            quantised_layers=part.quantised_layers,
            steps=part.steps,
            deadline_s=min(LONGEST_ROUND_S, max(1.0, self.until - now)),
            seed=int.from_bytes(seed[:4], "big"),
            recipe=self.plan.recipe,
            adapter=part.base or self.adapter,
            prefix=part.prefix,
            model_digest=self.plan.model_digest,
        )


def _rejected(event: UpdateArrived | UpdateChecked, code: str, detail: str = "") -> Acknowledge:
    return Acknowledge(event.device_id, event.message_id, "rejected", code, detail)


def _rank_problem(trained: tuple[int, ...], assigned: tuple[int, ...]) -> str | None:
    """Say why ``trained`` is not a top part of what was assigned."""
    try:
        config = LoraConfig(trained)
    except ValueError as error:
        return str(error)
    if len(trained) != len(assigned):
        return f"{len(trained)} layers instead of {len(assigned)}"
    if any(trained[layer] != assigned[layer] for layer in config.layers):
        return f"trained ranks {trained} instead of {assigned}"
    return None
