"""Whatever happens in whatever order, a run keeps its promises."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from broker_server.coordinator import Phase
from broker_server.run_events import (
    Acknowledge,
    AdapterEvaluated,
    AggregateRound,
    AssignmentAccepted,
    AssignmentFailed,
    CancelRequested,
    CheckUpdate,
    DeviceLost,
    DeviceReported,
    EvaluateAdapter,
    FinishRun,
    RecordUpdate,
    RoundAggregated,
    RunStarted,
    SendAssignment,
    Tick,
    UpdateArrived,
    UpdateChecked,
)
from tests.broker_server.test_coordinator import Conversation
from tests.support.capacities import device
from wire_protocol.messages import UpdateManifest
from wire_protocol.parts import BlobRef

DEVICES = st.sampled_from(["a", "b", "c"])


class AnyOrder(RuleBasedStateMachine):
    """Devices come, go, answer, fail and repeat themselves; the server is slow."""

    def __init__(self) -> None:
        super().__init__()
        self.talk = Conversation()
        self.answered = 0
        self.old: list[tuple[str, UpdateManifest]] = []

    @initialize()
    def start(self) -> None:
        self.talk.tell(RunStarted())

    @rule(name=DEVICES, measured=st.booleans())
    def report(self, name: str, measured: bool) -> None:
        self.talk.tell(DeviceReported(name, device(name) if measured else None))

    @rule(name=DEVICES)
    def lose(self, name: str) -> None:
        self.talk.tell(DeviceLost(name))

    @rule(name=DEVICES)
    def accept(self, name: str) -> None:
        if (found := self._manifest(name)) is not None:
            self.talk.tell(AssignmentAccepted(name, found.assignment_id))

    @rule(name=DEVICES, good=st.booleans())
    def answer(self, name: str, good: bool) -> None:
        found = self._manifest(name)
        if found is None:
            return
        self.old.append((name, found))
        for action in self.talk.tell(UpdateArrived(name, f"m{len(self.old)}", found)):
            if isinstance(action, CheckUpdate):
                problem = None if good else "bad"
                self.talk.tell(UpdateChecked(name, action.message_id, found, problem))

    @rule(data=st.data())
    def repeat_an_old_answer(self, data: st.DataObject) -> None:
        if self.old:
            name, manifest = data.draw(st.sampled_from(self.old))
            self.talk.tell(UpdateArrived(name, "again", manifest))

    @rule(name=DEVICES)
    def fail(self, name: str) -> None:
        if (found := self._manifest(name)) is not None:
            self.talk.tell(AssignmentFailed(name, found.assignment_id, "oom", "", "f"))

    @rule(seconds=st.sampled_from([0.5, 11.0, 50.0, 200.0]))
    def wait(self, seconds: float) -> None:
        self.talk.wait(seconds)

    @rule()
    def server_works(self) -> None:
        """Answer the oldest request for aggregation or evaluation."""
        slow = [a for a in self.talk.said if isinstance(a, AggregateRound | EvaluateAdapter)]
        if self.answered < len(slow):
            asked = slow[self.answered]
            self.answered += 1
            if isinstance(asked, AggregateRound):
                new = BlobRef(sha256=f"{self.answered:064x}", size_bytes=1)
                self.talk.tell(RoundAggregated(new))
            else:
                self.talk.tell(AdapterEvaluated(0.5, 1.0))

    @rule(yes=st.integers(0, 30))
    def cancel(self, yes: int) -> None:
        if yes == 30:
            self.talk.tell(CancelRequested("enough"))

    def _manifest(self, name: str) -> UpdateManifest | None:
        opened = self.talk.run.round
        return self.talk.manifest(name) if opened and name in opened.members else None

    @invariant()
    def the_run_ends_at_most_once_and_then_asks_nobody_for_anything(self) -> None:
        ends = [i for i, action in enumerate(self.talk.said) if isinstance(action, FinishRun)]
        assert len(ends) <= 1
        if ends:
            after = self.talk.said[ends[0] + 1 :]
            assert not [a for a in after if isinstance(a, SendAssignment | AggregateRound)]

    @invariant()
    def an_update_is_recorded_at_most_once_per_assignment(self) -> None:
        recorded = [
            action.manifest.assignment_id
            for action in self.talk.said
            if isinstance(action, RecordUpdate)
        ]
        assert len(recorded) == len(set(recorded))

    @invariant()
    def only_recorded_updates_are_aggregated(self) -> None:
        recorded: set[str] = set()
        for action in self.talk.said:
            if isinstance(action, RecordUpdate):
                recorded.add(action.manifest.assignment_id)
            if isinstance(action, AggregateRound):
                assert {u.manifest.assignment_id for u in action.updates} <= recorded
                assert action.updates

    @invariant()
    def an_ok_for_a_first_update_follows_its_record(self) -> None:
        for position, action in enumerate(self.talk.said):
            if not isinstance(action, Acknowledge) or action.message_id == "f":
                continue
            if (action.status, action.code) == ("ok", ""):
                assert isinstance(self.talk.said[position - 1], RecordUpdate)

    @invariant()
    def a_run_that_waits_for_devices_says_when_to_wake_it(self) -> None:
        if self.talk.run.phase in (Phase.PREPARING, Phase.COLLECTING):
            self.talk.tell(Tick())
        if self.talk.run.phase in (Phase.PREPARING, Phase.COLLECTING):
            deadline = self.talk.run.next_deadline()
            assert deadline is not None
            assert deadline > self.talk.now


AnyOrder.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAnyOrder = AnyOrder.TestCase
