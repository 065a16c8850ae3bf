"""One run as a state machine: events in, actions out.

Rule 1: everything that decides what a run does next lives here or in
``open_round``. Rule 2: nothing here does I/O, reads a clock or draws unseeded
randomness.

    BASELINE -> PREPARING -> COLLECTING -> AGGREGATING -> EVALUATING -+-> ENDED
                    ^                                                 |
                    +------------------- next round ------------------+
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from enum import Enum

from typing_extensions import assert_never

from broker_server.learned_tokens import learned_tokens
from broker_server.open_round import OpenRound
from broker_server.prefix_book import PrefixBook
from broker_server.round_summary import summarise
from broker_server.run_events import (
    Acknowledge,
    Action,
    AdapterEvaluated,
    AggregateRound,
    AssignmentAccepted,
    AssignmentFailed,
    CancelRequested,
    DeviceLost,
    DeviceReported,
    EvaluateAdapter,
    Event,
    FinishRun,
    MeasureDevice,
    RoundAggregated,
    RunStarted,
    SaveCheckpoint,
    StepBroke,
    Tick,
    UpdateArrived,
    UpdateChecked,
)
from broker_server.run_state import (
    KnownDevice,
    MemberCheckpoint,
    RunCheckpoint,
    RunPlan,
    RunStatus,
)
from broker_server.strategies import DeviceCapacity, Strategy
from broker_server.strategies.learning import RoundOutcome, learn_from_round
from wire_protocol.messages import UpdateManifest
from wire_protocol.parts import BlobRef

RESUME_SETTLE_S = 5.0
"""Longer than the jitter with which devices answer a restarted server."""


class Phase(str, Enum):
    """What the run waits for."""

    STARTING = "starting"
    BASELINE = "baseline"
    PREPARING = "preparing"
    COLLECTING = "collecting"
    AGGREGATING = "aggregating"
    EVALUATING = "evaluating"
    ENDED = "ended"


class Coordinator:
    """Decides what one run does next.

    Args:
        plan: what never changes during the run.
        strategy: configures devices; aggregating bytes is the shell's work.
        checkpoint: where to begin, or to go on after a restart.
        recorded: updates of the open round that were acknowledged before.
    """

    def __init__(
        self,
        plan: RunPlan,
        strategy: Strategy,
        checkpoint: RunCheckpoint,
        recorded: dict[str, UpdateManifest] | None = None,
    ) -> None:
        self.plan = plan
        self.strategy = strategy
        self.phase = Phase.STARTING
        self.round_number = checkpoint.round_number
        self.attempt = checkpoint.attempt
        self.adapter: BlobRef = checkpoint.adapter
        self.baseline_done = checkpoint.baseline_done
        self.tokens_per_step = checkpoint.tokens_per_step
        self.devices: dict[str, KnownDevice] = {}
        self.round: OpenRound | None = None
        self.prefix = PrefixBook(plan.prefix, checkpoint.prefix)
        self._parts = dict(checkpoint.members)
        self._finished = checkpoint.finished
        self._settle_until = -math.inf
        self._recorded = dict(recorded or {})
        self._aggregation: RoundAggregated | None = None
        self._prepare_until = math.inf
        self._duration_s = 0.0

    def handle(self, event: Event, now: float) -> list[Action]:
        """Apply one event and say what must be done about it.

        Args:
            event: what happened. Handling the same event twice is harmless:
                MQTT QoS 1 may deliver a message more than once.
            now: seconds on the caller's monotonic clock; never goes backwards.

        Returns:
            Actions to carry out in order.
        """
        if self.phase is Phase.ENDED:
            return _receipt(event)
        match event:
            case RunStarted():
                actions = self._start(now)
            case DeviceReported():
                actions = self._device_reported(event, now)
            case DeviceLost():
                actions = self._device_lost(event, now)
            case AssignmentAccepted() | AssignmentFailed() | UpdateArrived() | UpdateChecked():
                actions = self._answered(event, now)
            case RoundAggregated():
                actions = self._aggregated(event, now)
            case AdapterEvaluated():
                actions = self._evaluated(event, now)
            case StepBroke():
                actions = self._end(RunStatus.FAILED, event.detail)
            case CancelRequested():
                actions = self._end(RunStatus.CANCELLED, event.reason)
            case Tick():
                actions = self._tick(now)
            case _:
                assert_never(event)
        return actions + self._advance(now)

    def next_deadline(self) -> float | None:
        """When to call ``handle(Tick(), now)`` if nothing else happens first."""
        if self.phase is Phase.PREPARING:
            settling = self._settle_until > -math.inf
            return self._settle_until if settling else self._prepare_until
        if self.phase is Phase.COLLECTING and self.round:
            return self.round.next_deadline(self.devices)
        return None

    # Phases

    def _start(self, now: float) -> list[Action]:
        if self.phase is not Phase.STARTING:
            return []
        if not self.baseline_done:
            self.phase = Phase.BASELINE
            return [SaveCheckpoint(self._checkpoint()), EvaluateAdapter(0, self.adapter)]
        if self._finished is not None:
            return self._end(RunStatus.FINISHED, self._finished)
        if self._parts:
            return self._open_round(now)
        # After a restart devices come back one by one: the first is not the cohort.
        self._settle_until = now + RESUME_SETTLE_S
        return self._prepare(now)

    def _prepare(self, now: float) -> list[Action]:
        self.phase = Phase.PREPARING
        self._prepare_until = now + self.plan.prepare_s
        return []

    def _advance(self, now: float) -> list[Action]:
        """Leave phases as long as what they wait for is there."""
        actions: list[Action] = []
        while step := self._next_phase(now):
            actions += step
        return actions

    def _next_phase(self, now: float) -> list[Action]:
        if self.phase is Phase.PREPARING and self._is_prepared(now):
            return self._begin_round(now)
        if self.phase is Phase.PREPARING and now >= self._prepare_until:
            return self._end(RunStatus.FAILED, self._nobody())
        if (
            self.phase is Phase.COLLECTING
            and self.round
            and self.round.is_collected(self.devices, now)
        ):
            return self._end_collecting(self.round, now)
        return []

    def _is_prepared(self, now: float) -> bool:
        """The first round waits for devices that still measure themselves, later ones do not."""
        if now < self._settle_until:
            return False
        self._settle_until = -math.inf
        online = [known for known in self.devices.values() if known.online]
        measuring = any(not known.capacity and not known.note for known in online)
        settled = self.round_number > 1 or not measuring or now >= self._prepare_until
        return settled and any(known.capacity for known in online)

    def waits_for(self) -> str:
        """Why no round is open although the run goes on; empty when there is nothing to say."""
        able = any(known.online and known.capacity for known in self.devices.values())
        if self.phase is not Phase.PREPARING or able:
            return ""
        return "waits: " + self._nobody()

    def _nobody(self) -> str:
        notes = [
            f"{name}: {known.note or 'offline or still measuring itself'}"
            for name, known in sorted(self.devices.items())
        ]
        return "no device can take part (" + ("; ".join(notes) or "none is online") + ")"

    def _end(self, status: RunStatus, reason: str) -> list[Action]:
        self.phase = Phase.ENDED
        cancels = self.round.cancel(reason) if self.round else []
        return [*cancels, FinishRun(status, reason)]

    # Devices

    def _device_reported(self, event: DeviceReported, now: float) -> list[Action]:
        before = self.devices.get(event.device_id)
        self.devices[event.device_id] = KnownDevice(event.capacity, note=event.note)
        came_back = before is None or not before.online
        actions: list[Action] = []
        if self.round and event.device_id in self.round.members and came_back:
            actions += self.round.send([event.device_id], now)
        if event.capacity is None and not event.note and came_back:
            actions.append(MeasureDevice(event.device_id))
        return actions

    def _device_lost(self, event: DeviceLost, now: float) -> list[Action]:
        known = self.devices.get(event.device_id)
        if known and known.online:
            known.online, known.lost_at = False, now
        return []

    def _tick(self, now: float) -> list[Action]:
        if self.phase is Phase.COLLECTING and self.round:
            return self.round.resend(self.devices, now)
        return []

    # A round

    def _cohort(self) -> list[DeviceCapacity]:
        able = {
            name: self.prefix.known(known.capacity)
            for name, known in sorted(self.devices.items())
            if known.online and known.capacity
        }
        wanted = self.plan.devices_per_round
        if wanted is None or wanted >= len(able):
            return list(able.values())
        seed = f"{self.plan.seed}/{self.round_number}/{self.attempt}"
        names = random.Random(seed).sample(sorted(able), wanted)  # noqa: S311 - no secret
        return [able[name] for name in sorted(names)]

    def _begin_round(self, now: float) -> list[Action]:
        self.prefix.begin_round(self.round_number)
        shape = replace(self.plan.shape, tokens_per_step=self.tokens_per_step)
        configuration = self.strategy.configure(shape, self._cohort(), self.round_number)
        for device_id, reason in configuration.refused.items():
            self.devices[device_id].note = reason
        if not configuration.plans:
            return self._end(RunStatus.FAILED, self._nobody())
        self._parts = {
            device_id: MemberCheckpoint(
                assignment_id=self.plan.assignment_id(self.round_number, self.attempt, device_id),
                ranks=plan.lora.ranks,
                steps=plan.steps,
                predicted_s=plan.predicted_s,
                factors=plan.factors,
                quantised_layers=plan.quantised_layers,
                base=self.prefix.base(plan.lora),
                prefix=self.prefix.prefix(plan.lora.depth),
            )
            for device_id, plan in sorted(configuration.plans.items())
        }
        return [SaveCheckpoint(self._checkpoint()), *self._open_round(now)]

    def _open_round(self, now: float) -> list[Action]:
        """Send the assignments of ``_parts``; what was recorded stays recorded."""
        self.phase = Phase.COLLECTING
        self.round = OpenRound(
            self.plan, self.round_number, self.adapter, self._parts, self._recorded, now
        )
        self._recorded = {}
        for name in self._parts:
            # After a restart nobody has reported yet: lost, with time to come back.
            self.devices.setdefault(name, KnownDevice(None, online=False, lost_at=now))
        return self.round.send([n for n in self._parts if self.devices[n].online], now)

    def _answered(
        self,
        event: AssignmentAccepted | AssignmentFailed | UpdateArrived | UpdateChecked,
        now: float,
    ) -> list[Action]:
        if self.round is None:
            return _receipt(event)
        if isinstance(event, UpdateArrived):
            return self.round.update_arrived(event)
        if isinstance(event, UpdateChecked):
            return self.round.update_checked(event, now)
        if isinstance(event, AssignmentAccepted):
            self.round.accepted(event)
        else:
            self.round.failed(event)
        return _receipt(event)

    def _end_collecting(self, open_round: OpenRound, now: float) -> list[Action]:
        actions, accepted = open_round.close(now)
        if accepted:
            self.phase = Phase.AGGREGATING
            return [*actions, AggregateRound(self.round_number, self.adapter, accepted)]
        self.attempt += 1
        if self.attempt >= self.plan.attempts:
            details = "; ".join(
                f"{name}: {member.detail}" for name, member in sorted(open_round.members.items())
            )
            times = self.plan.attempts
            reason = f"round {self.round_number} brought no update {times} times ({details})"
            return [*actions, *self._end(RunStatus.FAILED, reason)]
        self.round, self._parts = None, {}
        return [*actions, SaveCheckpoint(self._checkpoint()), *self._prepare(now)]

    # From updates to the next round

    def _aggregated(self, event: RoundAggregated, now: float) -> list[Action]:
        if self.phase is not Phase.AGGREGATING or self.round is None:
            return []
        self.phase = Phase.EVALUATING
        self._aggregation = event
        self._duration_s = now - self.round.began
        return [EvaluateAdapter(self.round_number, event.adapter)]

    def _evaluated(self, event: AdapterEvaluated, now: float) -> list[Action]:
        if self.phase is Phase.BASELINE:
            self.baseline_done = True
            self.round_number = 1
            learn_from_round(self.strategy, RoundOutcome(0, event.accuracy, 0.0))
            return [SaveCheckpoint(self._checkpoint(), baseline=event), *self._prepare(now)]
        if self.phase is not Phase.EVALUATING or self.round is None or self._aggregation is None:
            return []
        result = summarise(
            self.round_number,
            event,
            self.round.members,
            aggregated=self._aggregation,
            collected_s=self.round.collected_s,
            duration_s=self._duration_s,
        )
        outcome = RoundOutcome(self.round_number, event.accuracy, self._duration_s)
        learn_from_round(self.strategy, outcome)
        self._learn(self.round, self._aggregation)
        done = self.round_number
        self.adapter, self._aggregation = self._aggregation.adapter, None
        self.round_number, self.attempt = done + 1, 0
        self.round, self._parts = None, {}
        target = self.plan.target_accuracy
        if target is not None and event.accuracy >= target:
            self._finished = f"target accuracy {target:.3f} reached in round {done}"
        elif done >= self.plan.rounds:
            self._finished = f"all {done} rounds done"
        saved = SaveCheckpoint(self._checkpoint(), result=result)
        if self._finished is not None:
            return [saved, *self._end(RunStatus.FINISHED, self._finished)]
        return [saved, *self._prepare(now)]

    def _learn(self, open_round: OpenRound, aggregated: RoundAggregated) -> None:
        updates = {name: m.manifest for name, m in open_round.members.items() if m.manifest}
        self.prefix.learn(updates, aggregated.cuts)
        self.tokens_per_step = learned_tokens(self.tokens_per_step, updates.values())

    def _checkpoint(self) -> RunCheckpoint:
        return RunCheckpoint(
            round_number=self.round_number,
            attempt=self.attempt,
            adapter=self.adapter,
            baseline_done=self.baseline_done,
            tokens_per_step=self.tokens_per_step,
            members=self._parts,
            finished=self._finished,
            prefix=self.prefix.checkpoint(),
        )


def _receipt(event: Event) -> list[Action]:
    """What ends a device's resending where no round decides: updates are late, failures noted."""
    if isinstance(event, UpdateArrived | UpdateChecked):
        return [Acknowledge(event.device_id, event.message_id, "rejected", "stale")]
    if isinstance(event, AssignmentFailed) and event.message_id:
        return [Acknowledge(event.device_id, event.message_id, "ok")]
    return []
