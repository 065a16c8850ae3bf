"""One run on a virtual clock: the shell around the coordinator in a simulation.

The coordinator cannot tell it from the live shell: it gets the same events in
the order of time and its actions are carried out. Between two events nothing
happens, so the clock jumps. Aggregation and evaluation take no virtual time.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import structlog

from broker_server import run_events as events
from broker_server.adapter_cuts import stored_cuts
from broker_server.blobs import BlobStore
from broker_server.coordinator import Coordinator, Phase
from broker_server.fleet import Fleet
from broker_server.privacy import epsilon_after
from broker_server.run_spec import RunSpec
from broker_server.run_state import RunStatus
from broker_server.simulated_training import TrainedUpdate, VirtualAssignment
from broker_server.simulation_folder import Score, SimulationState
from broker_server.simulation_trainers import Trainers
from broker_server.strategies import saved_state
from broker_server.update_bytes import new_adapter, problem_with
from broker_server.virtual_cache import VirtualCache
from broker_server.virtual_fleet import Conditions, ModelCost, VirtualFleet
from broker_server.virtual_residuals import VirtualResiduals
from wire_protocol.errors import LegendError
from wire_protocol.lora import Codec
from wire_protocol.messages import RoundStart, UpdateManifest
from wire_protocol.parts import BlobRef
from wire_protocol.tensors import encode

log = structlog.get_logger()

RESTARTED_BEFORE_S = 60.0
"""Longer than a coordinator waits for devices to come back after a restart."""


@dataclass(frozen=True)
class Testbed:
    """What a virtual run acts upon.

    Attributes:
        run: the specification as the live server would accept it.
        devices: the server's registry, all of them born.
        blobs: holds global adapters.
        judge: scores a round's adapter: for decisions, and on the test file
            if that is another one.
        commit: told every committed state.
        tamper: what attackers send in place of what they learned.
    """

    run: RunSpec
    cost: ModelCost
    fleet: VirtualFleet
    devices: Fleet
    blobs: BlobStore
    trainers: Trainers
    judge: Callable[[int, BlobRef], tuple[Score, Score | None]]
    commit: Callable[[SimulationState], object]
    tamper: Callable[[int, TrainedUpdate], TrainedUpdate] = lambda _round, trained: trained

    @property
    def labels(self) -> tuple[str, ...]:
        """Classes of the head; none for instruction tuning."""
        return self.run.labels if self.run.task == "classification" else ()


class VirtualRun:
    """Drives a coordinator to the end of its run.

    Args:
        testbed: what the run acts upon.
        coordinator: decides.
        state: where to begin.
    """

    def __init__(self, testbed: Testbed, coordinator: Coordinator, state: SimulationState) -> None:
        self._testbed = testbed
        self._coordinator = coordinator
        self._state = state
        self._now = state.now
        self._order = itertools.count()
        self._queue: list[tuple[float, int, str, events.Event]] = []
        self._outgoing: list[events.SendAssignment] = []
        self._updates: dict[str, bytes] = {}
        self._caches = dict(state.caches)
        self._residuals = VirtualResiduals(testbed.blobs, state.residuals)
        self._scores: tuple[Score, Score | None] | None = None

    def run(self) -> SimulationState:
        """Go on until the run ends; returns its last state.

        Raises:
            LegendError: training or evaluation is impossible as specified.
        """
        # A restart lies in the past: what it makes the coordinator wait for takes no round's time.
        self._now = self._state.now - RESTARTED_BEFORE_S
        for _, event in self._reports(max(1, self._coordinator.round_number)):
            self._handle(event)
        self._handle(events.RunStarted())
        self._now = self._state.now
        while self._state.status is RunStatus.RUNNING:
            self._handle(self._next_event())
        return self._state

    def _handle(self, event: events.Event) -> None:
        for action in self._coordinator.handle(event, self._now):
            self._carry_out(action)
        self._train()

    # The clock

    def _push(self, when: float, device_id: str, event: events.Event) -> None:
        heapq.heappush(self._queue, (when, next(self._order), device_id, event))

    def _next_event(self) -> events.Event:
        """Move the clock to what happens next, and say what it is."""
        if not self._queue and self._coordinator.phase is Phase.PREPARING:
            self._report_devices(self._coordinator.round_number)
        deadline = self._coordinator.next_deadline()
        if self._queue and (deadline is None or self._queue[0][0] <= deadline):
            when, _, _, event = heapq.heappop(self._queue)
            self._now = max(self._now, when)
            return event
        if deadline is None:
            raise LegendError("the simulation waits for something that cannot happen")
        self._now = max(self._now, deadline)
        return events.Tick()

    # Actions

    def _carry_out(self, action: events.Action) -> None:
        match action:
            case events.SendAssignment():
                self._outgoing.append(action)
            case events.CancelAssignment():
                self._queue = [entry for entry in self._queue if entry[2] != action.device_id]
                heapq.heapify(self._queue)
            case events.CheckUpdate():
                self._check(action)
            case events.RecordUpdate():
                rho = self._coordinator.strategy.rho
                self._testbed.devices.learn(action.device_id, action.manifest, rho=rho)
            case events.AggregateRound():
                self._push(self._now, "", self._aggregated(action))
            case events.EvaluateAdapter():
                self._evaluate(action)
            case events.SaveCheckpoint():
                self._save(action)
            case events.FinishRun():
                ended = {"status": action.status, "reason": action.reason}
                self._commit(self._state.model_copy(update=ended))
            case events.Acknowledge():
                if action.status == "rejected":
                    log.warning("update_rejected", device_id=action.device_id, code=action.code)
            case events.MeasureDevice():
                pass  # a virtual device is born measured

    def _check(self, action: events.CheckUpdate) -> None:
        manifest = action.manifest
        shape, labels = self._testbed.cost.shape, len(self._testbed.labels)
        data = self._updates[manifest.update.sha256]
        problem = problem_with(data, manifest, shape, labels, assigned=action.assigned)
        checked = events.UpdateChecked(action.device_id, action.message_id, manifest, problem)
        self._push(self._now, action.device_id, checked)

    def _aggregated(self, action: events.AggregateRound) -> events.Event:
        try:
            return self._aggregate(action)
        except LegendError as error:
            return events.StepBroke(f"aggregation failed: {error}")

    def _aggregate(self, action: events.AggregateRound) -> events.RoundAggregated:
        blobs, privacy = self._testbed.blobs, self._testbed.run.privacy
        base, read = blobs.read(action.base.sha256), self._updates.__getitem__
        open_round = self._coordinator.round
        members = open_round.members.values() if open_round else ()
        assigned = [member.checkpoint for member in members]
        strategy = self._coordinator.strategy
        new = new_adapter(strategy, base, action.updates, read=read, assigned=assigned)
        self._updates.clear()
        adapter = BlobRef(sha256=blobs.put(new.data), size_bytes=len(new.data))
        epsilon = None if privacy is None else epsilon_after(privacy, action.round_number)
        cuts = stored_cuts(
            blobs,
            new.data,
            self._coordinator.plan,
            next_round=action.round_number + 1,
        )
        return events.RoundAggregated(adapter, new.findings, epsilon, cuts)

    def _evaluate(self, action: events.EvaluateAdapter) -> None:
        self._scores = self._testbed.judge(action.round_number, action.adapter)
        decisive, _ = self._scores
        # Before the answer: it opens the next round, and the lost must be back by then.
        self._report_devices(action.round_number + 1)
        self._push(self._now, "", events.AdapterEvaluated(decisive.accuracy, decisive.loss))

    def _save(self, action: events.SaveCheckpoint) -> None:
        """Commit between rounds; a round that is open is trained again after a restart."""
        if self._scores is None or (action.result is None and action.baseline is None):
            return
        decisive, test = self._scores
        before = self._state
        estimates = {
            name: record.estimate
            for name, record in self._testbed.devices.devices.items()
            if record.estimate is not None
        }
        changes = {
            "now": self._now,
            "checkpoint": action.checkpoint,
            "baseline": decisive if action.baseline else before.baseline,
            "rounds": (*before.rounds, action.result) if action.result else before.rounds,
            "test_scores": (*before.test_scores, test),
            "estimates": estimates,
            "strategy_state": self._strategy_state(),
            "caches": dict(self._caches),
            "residuals": self._residuals.commit(),
        }
        self._commit(before.model_copy(update=changes))

    def _strategy_state(self) -> BlobRef | None:
        tensors = saved_state(self._coordinator.strategy)
        if not tensors:
            return None
        data = encode(tensors, Codec.FP32)
        return BlobRef(sha256=self._testbed.blobs.put(data), size_bytes=len(data))

    def _commit(self, state: SimulationState) -> None:
        spent = _blobs_of(self._state) - _blobs_of(state)
        self._state = state
        self._testbed.commit(state)
        for sha256 in spent:
            self._testbed.blobs.remove(sha256)

    # Devices

    def _report_devices(self, round_number: int) -> None:
        for device_id, event in self._reports(round_number):
            self._push(self._now, device_id, event)

    def _reports(self, round_number: int) -> Iterator[tuple[str, events.Event]]:
        """Who is there for a round, with what is known of it, and who is away."""
        present = set(self._testbed.fleet.present(round_number))
        for device_id in self._testbed.devices.devices:
            if device_id not in present:
                yield device_id, events.DeviceLost(device_id)
                continue
            capacity, note = self._testbed.devices.capacity(
                device_id,
                model_digest=self._testbed.cost.digest,
                dataset=self._testbed.run.dataset,
                labels=self._testbed.labels,
            )
            yield device_id, events.DeviceReported(device_id, capacity, note)

    def _train(self) -> None:
        """Let the devices work that were just assigned something."""
        outgoing, self._outgoing = self._outgoing, []
        working: list[VirtualAssignment] = []
        for action in outgoing:
            device_id, start = action.device_id, action.start
            accepted = events.AssignmentAccepted(device_id, start.assignment_id)
            self._push(self._now, device_id, accepted)
            lost_at = self._lost_at(action)
            if lost_at is not None:
                self._push(lost_at, device_id, events.DeviceLost(device_id))
                continue
            conditions = self._testbed.fleet.conditions(device_id, start.round_number)
            working.append(self._assignment(device_id, start, conditions))
        for assignment, trained in zip(working, self._testbed.trainers.train(working), strict=True):
            self._answer(assignment, trained)

    def _assignment(
        self, device_id: str, start: RoundStart, conditions: Conditions
    ) -> VirtualAssignment:
        read = self._testbed.blobs.read
        below = start.prefix.adapter if start.prefix else None
        version = self._coordinator.prefix.version
        return VirtualAssignment(
            device_id,
            start,
            conditions,
            self._testbed.cost,
            adapter=read(start.adapter.sha256),
            below=read(below.sha256) if below else None,
            cache=self._caches.get(device_id, VirtualCache()).of(version),
            residual=self._residuals.of(device_id),
        )

    def _lost_at(self, action: events.SendAssignment) -> float | None:
        """When the device is lost in this assignment, if it is."""
        coordinator, start = self._coordinator, action.start
        share = self._testbed.fleet.lost_after(
            action.device_id, start.round_number, coordinator.attempt
        )
        if share is None or coordinator.round is None:
            return None
        part = coordinator.round.members[action.device_id].checkpoint
        return self._now + share * part.predicted_s

    def _answer(self, assignment: VirtualAssignment, trained: TrainedUpdate) -> None:
        when = self._now + trained.duration_s
        if trained.cache is not None:
            self._caches[assignment.device_id] = trained.cache
        if trained.residual is not None:
            self._residuals.keep(assignment.device_id, trained.residual)
        device_id, start = assignment.device_id, assignment.start
        if trained.failure is not None or trained.report is None:
            code, detail = trained.failure or ("internal", "no report")
            failed = events.AssignmentFailed(device_id, start.assignment_id, code, detail)
            self._push(when, device_id, failed)
            return
        trained = self._testbed.tamper(start.round_number, trained)
        digest = hashlib.sha256(trained.update).hexdigest()
        self._updates[digest] = trained.update
        manifest = UpdateManifest(
            run_id=start.run_id,
            round_number=start.round_number,
            assignment_id=start.assignment_id,
            base_sha256=start.adapter.sha256,
            ranks=start.ranks,
            update=BlobRef(sha256=digest, size_bytes=len(trained.update)),
            examples=trained.examples,
            report=trained.report,
            emulated=self._testbed.fleet.devices[device_id].group.board,
        )
        arrived = events.UpdateArrived(device_id, start.assignment_id, manifest)
        self._push(when, device_id, arrived)


def _blobs_of(state: SimulationState) -> set[str]:
    refs = (state.checkpoint.adapter, state.strategy_state)
    kept = {ref.sha256 for ref in (*refs, *state.residuals.values()) if ref is not None}
    return kept | state.checkpoint.prefix.blobs()
