"""The run's state machine, told as conversations: events in, actions out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import pytest

from broker_server.coordinator import Coordinator, Phase
from broker_server.run_events import (
    Acknowledge,
    Action,
    AdapterEvaluated,
    AggregateRound,
    AssignmentAccepted,
    AssignmentFailed,
    CancelAssignment,
    CancelRequested,
    CheckUpdate,
    DeviceLost,
    DeviceReported,
    EvaluateAdapter,
    Event,
    FinishRun,
    MeasureDevice,
    RecordUpdate,
    RoundAggregated,
    RunStarted,
    SaveCheckpoint,
    SendAssignment,
    StepBroke,
    Tick,
    UpdateArrived,
    UpdateChecked,
)
from broker_server.run_state import RunCheckpoint, RunPlan, RunStatus
from broker_server.strategies import strategy_named
from tests.support.capacities import SIX_LAYERS, device
from tests.support.messages import SHA, a_manifest, a_recipe
from wire_protocol.messages import UpdateManifest
from wire_protocol.parts import BlobRef

ActionType = TypeVar("ActionType", bound=Action)

ADAPTER = BlobRef(sha256=SHA, size_bytes=1000)
START = RunCheckpoint(
    round_number=0, attempt=0, adapter=ADAPTER, baseline_done=False, tokens_per_step=512.0
)
PLAN = RunPlan("run-1", rounds=2, shape=SIX_LAYERS, recipe=a_recipe(), model_digest=SHA)


class Conversation:
    """A coordinator, a clock that only we move, and everything it ever said."""

    def __init__(
        self, plan: RunPlan = PLAN, checkpoint: RunCheckpoint = START, **more: Any
    ) -> None:
        self.run = Coordinator(plan, strategy_named("legend", {}), checkpoint, **more)
        self.now = 100.0
        self.said: list[Action] = []

    def tell(self, *events: Event) -> list[Action]:
        """Feed events; returns the actions they caused."""
        actions = [action for event in events for action in self.run.handle(event, self.now)]
        self.said += actions
        return actions

    def wait(self, seconds: float) -> list[Action]:
        self.now += seconds
        return self.tell(Tick())

    def begin(self, *names: str) -> list[Action]:
        """Bring the run to its first round with these devices."""
        self.tell(RunStarted(), *(DeviceReported(name, device(name)) for name in names))
        return self.tell(AdapterEvaluated(0.1, 2.0))

    def manifest(self, name: str, **changes: Any) -> UpdateManifest:
        assert self.run.round is not None
        part = self.run.round.members[name].checkpoint
        fields = {
            "round_number": self.run.round_number,
            "assignment_id": part.assignment_id,
            "base_sha256": self.run.adapter.sha256,
            "ranks": part.ranks,
        }
        return a_manifest(**{**fields, **changes})

    def update(self, name: str, **changes: Any) -> list[Action]:
        """An update arrives and passes every check."""
        manifest = self.manifest(name, **changes)
        asked = self.tell(UpdateArrived(name, f"m-{name}", manifest))
        if not only(asked, CheckUpdate):
            return asked
        return asked + self.tell(UpdateChecked(name, f"m-{name}", manifest, None))


def only(actions: list[Action], kind: type[ActionType]) -> list[ActionType]:
    return [action for action in actions if isinstance(action, kind)]


def kinds(actions: list[Action]) -> list[str]:
    return [type(action).__name__ for action in actions]


def test_a_run_begins_by_evaluating_the_untrained_adapter() -> None:
    talk = Conversation()
    assert kinds(talk.tell(RunStarted())) == ["SaveCheckpoint", "EvaluateAdapter"]


def test_the_checkpoint_is_saved_before_any_assignment_leaves() -> None:
    actions = Conversation().begin("a", "b")
    assert kinds(actions) == ["SaveCheckpoint"] * 2 + ["SendAssignment"] * 2
    assert set(only(actions, SaveCheckpoint)[-1].checkpoint.members) == {"a", "b"}


def test_two_rounds_from_assignment_to_the_end() -> None:
    talk = Conversation()
    talk.begin("a", "b")
    for number in (1, 2):
        talk.now += 10
        talk.update("a")
        talk.now += 5
        last = talk.update("b")
        (aggregate,) = only(last, AggregateRound)
        assert [update.device_id for update in aggregate.updates] == ["a", "b"]
        new = BlobRef(sha256=f"{number}" * 64, size_bytes=9)
        talk.now += 1
        assert kinds(talk.tell(RoundAggregated(new))) == ["EvaluateAdapter"]
        end = talk.tell(AdapterEvaluated(0.5 + number / 10, 1.0))
        (saved,) = only(end, SaveCheckpoint)[:1]
        assert saved.result is not None
        assert saved.checkpoint.adapter == new
        assert saved.result.duration_s == pytest.approx(16)
        waits = {one.device_id: one.waiting_s for one in saved.result.devices}
        assert waits == {"a": pytest.approx(5), "b": pytest.approx(0)}
    (finish,) = only(end, FinishRun)
    assert finish.status is RunStatus.FINISHED
    assert talk.run.phase is Phase.ENDED


def test_an_update_is_recorded_before_it_is_acknowledged() -> None:
    talk = Conversation()
    talk.begin("a", "b")
    assert kinds(talk.update("a")) == ["CheckUpdate", "RecordUpdate", "Acknowledge"]


def test_a_resent_update_is_acknowledged_again_but_counts_once() -> None:
    talk = Conversation()
    talk.begin("a", "b")
    talk.update("a")
    (again,) = talk.tell(UpdateArrived("a", "m-a", talk.manifest("a")))
    assert again == Acknowledge("a", "m-a", "ok", "duplicate")
    talk.update("b")
    (aggregate,) = only(talk.said, AggregateRound)
    assert len(aggregate.updates) == 2


def test_a_resend_while_the_first_is_checked_starts_no_second_check() -> None:
    talk = Conversation()
    talk.begin("a", "b")
    manifest = talk.manifest("a")
    assert only(talk.tell(UpdateArrived("a", "m", manifest)), CheckUpdate)
    assert talk.tell(UpdateArrived("a", "m", manifest)) == []


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"run_id": "another", "assignment_id": "x"}, "stale"),
        ({"round_number": 1, "assignment_id": "other"}, "unknown_assignment"),
        ({"base_sha256": "ee" * 32}, "wrong_base"),
        ({"ranks": (9,) * 6}, "malformed"),
        ({"ranks": (4, 4)}, "malformed"),
        ({"ranks": (4, 0, 0, 0, 0, 4)}, "malformed"),
    ],
)
def test_an_update_that_does_not_fit_is_rejected_by_name(
    changes: dict[str, Any], code: str
) -> None:
    talk = Conversation()
    talk.begin("a", "b")
    (answer,) = only(talk.update("a", **changes), Acknowledge)
    assert (answer.status, answer.code) == ("rejected", code)
    assert not only(talk.said, RecordUpdate)


def test_a_device_may_train_fewer_layers_than_assigned() -> None:
    talk = Conversation()
    talk.begin("a", "b")
    ranks = talk.manifest("a").ranks
    shallow = (0,) * 5 + ranks[5:]
    assert only(talk.update("a", ranks=shallow), RecordUpdate)


def test_a_malformed_update_ends_the_device_s_round_and_not_the_run() -> None:
    talk = Conversation()
    talk.begin("a", "b")
    manifest = talk.manifest("a")
    talk.tell(UpdateArrived("a", "m", manifest))
    (answer,) = talk.tell(UpdateChecked("a", "m", manifest, "holds NaN"))
    assert answer == Acknowledge("a", "m", "rejected", "malformed", "holds NaN")
    (aggregate,) = only(talk.update("b"), AggregateRound)
    assert [update.device_id for update in aggregate.updates] == ["b"]


def test_a_late_update_is_stale_and_the_straggler_was_told() -> None:
    talk = Conversation(replace(PLAN, deadline_s=60.0))
    talk.begin("a", "b")
    talk.update("a")
    manifest = talk.manifest("b")
    actions = talk.wait(61)
    assert [cancel.device_id for cancel in only(actions, CancelAssignment)] == ["b"]
    assert only(actions, AggregateRound)
    (answer,) = talk.tell(UpdateArrived("b", "m-b", manifest))
    assert answer == Acknowledge("b", "m-b", "rejected", "stale")


def test_a_quorum_ends_the_round_early() -> None:
    talk = Conversation(replace(PLAN, quorum=0.5))
    talk.begin("a", "b", "c", "d")
    talk.update("a")
    assert talk.run.phase is Phase.COLLECTING
    assert only(talk.update("b"), AggregateRound)


def test_a_failure_is_acknowledged_and_the_round_goes_on_without_the_device() -> None:
    talk = Conversation()
    talk.begin("a", "b")
    assignment = talk.manifest("a").assignment_id
    actions = talk.tell(AssignmentFailed("a", assignment, "out_of_memory", "killed", "m-1"))
    assert actions == [Acknowledge("a", "m-1", "ok")]
    assert only(talk.update("b"), AggregateRound)


def test_an_unanswered_assignment_is_sent_again_and_an_accepted_one_is_not() -> None:
    talk = Conversation()
    talk.begin("a", "b")
    talk.tell(AssignmentAccepted("a", talk.manifest("a").assignment_id))
    resent = only(talk.wait(PLAN.resend_s + 1), SendAssignment)
    assert [send.device_id for send in resent] == ["b"]


def test_a_device_that_comes_back_gets_the_same_assignment_again() -> None:
    talk = Conversation()
    (first, _) = only(talk.begin("a", "b"), SendAssignment)
    talk.tell(DeviceLost("a"))
    talk.now += 5
    (again,) = only(talk.tell(DeviceReported("a", device("a"))), SendAssignment)
    assert again.start.assignment_id == first.start.assignment_id
    assert again.start.deadline_s < first.start.deadline_s


def test_a_device_that_stays_away_is_given_up_after_its_grace() -> None:
    talk = Conversation()
    talk.begin("a", "b")
    talk.update("b")
    talk.tell(DeviceLost("a"))
    assert not only(talk.wait(PLAN.lost_grace_s - 1), AggregateRound)
    deadline = talk.run.next_deadline()
    assert deadline is not None
    assert deadline == pytest.approx(talk.now + 1)
    assert only(talk.wait(1), AggregateRound)


def test_a_device_that_has_not_measured_itself_is_asked_to_and_waited_for() -> None:
    talk = Conversation()
    talk.tell(RunStarted(), DeviceReported("a", device("a")))
    assert talk.tell(DeviceReported("b", None)) == [MeasureDevice("b")]
    assert not only(talk.tell(AdapterEvaluated(0.1, 2.0)), SendAssignment)
    sent = only(talk.tell(DeviceReported("b", device("b"))), SendAssignment)
    assert {send.device_id for send in sent} == {"a", "b"}


def test_a_device_that_cannot_take_part_is_not_waited_for() -> None:
    talk = Conversation()
    talk.tell(RunStarted(), DeviceReported("a", device("a")))
    talk.tell(DeviceReported("b", None, "has no dataset 'triage'"))
    sent = only(talk.tell(AdapterEvaluated(0.1, 2.0)), SendAssignment)
    assert [send.device_id for send in sent] == ["a"]


def test_a_run_that_nobody_can_do_fails_with_everybody_s_reason() -> None:
    talk = Conversation()
    talk.tell(RunStarted(), DeviceReported("a", None, "has no dataset 'triage'"))
    talk.tell(AdapterEvaluated(0.1, 2.0))
    (finish,) = only(talk.wait(PLAN.prepare_s), FinishRun)
    assert finish.status is RunStatus.FAILED
    assert "a: has no dataset 'triage'" in finish.reason


def test_devices_too_small_for_the_model_fail_the_run_with_numbers() -> None:
    talk = Conversation()
    talk.tell(RunStarted(), DeviceReported("a", device("a", memory_budget_bytes=1e6)))
    (finish,) = only(talk.tell(AdapterEvaluated(0.1, 2.0)), FinishRun)
    assert finish.status is RunStatus.FAILED
    assert "a:" in finish.reason


def test_rounds_without_any_update_are_tried_again_and_then_fail_the_run() -> None:
    talk = Conversation(replace(PLAN, deadline_s=10.0, attempts=2))
    talk.begin("a")
    first = talk.manifest("a").assignment_id
    again = only(talk.wait(11), SendAssignment)
    assert again[0].start.assignment_id != first
    (finish,) = only(talk.wait(11), FinishRun)
    assert finish.status is RunStatus.FAILED
    assert "brought no update 2 times" in finish.reason


def test_the_target_accuracy_ends_the_run() -> None:
    talk = Conversation(replace(PLAN, rounds=9, target_accuracy=0.8))
    talk.begin("a")
    talk.update("a")
    talk.tell(RoundAggregated(ADAPTER))
    (finish,) = only(talk.tell(AdapterEvaluated(0.85, 0.4)), FinishRun)
    assert (finish.status, "0.800" in finish.reason) == (RunStatus.FINISHED, True)


def test_cancelling_tells_the_devices_and_ends_the_run() -> None:
    talk = Conversation()
    talk.begin("a", "b")
    talk.update("b")
    actions = talk.tell(CancelRequested("by the operator"))
    assert kinds(actions) == ["CancelAssignment", "FinishRun"]
    (late,) = talk.tell(UpdateArrived("a", "m", a_manifest()))
    assert late == Acknowledge("a", "m", "rejected", "stale")


def test_a_broken_step_of_the_server_fails_the_run_with_its_reason() -> None:
    talk = Conversation()
    talk.begin("a")
    talk.update("a")
    (finish,) = only(talk.tell(StepBroke("evaluation failed: no memory")), FinishRun)
    assert (finish.status, finish.reason) == (RunStatus.FAILED, "evaluation failed: no memory")


def test_a_cohort_is_drawn_by_the_seed_and_not_by_the_order_of_arrival() -> None:
    names = [f"d{number}" for number in range(9)]
    drawn = []
    for order in (names, names[::-1]):
        talk = Conversation(replace(PLAN, devices_per_round=3))
        drawn.append({send.device_id for send in only(talk.begin(*order), SendAssignment)})
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 3


def test_a_restarted_server_goes_on_in_the_middle_of_the_round() -> None:
    before = Conversation()
    before.begin("a", "b")
    before.update("a")
    saved = only(before.said, SaveCheckpoint)[-1].checkpoint
    recorded = {send.device_id: send.manifest for send in only(before.said, RecordUpdate)}

    after = Conversation(checkpoint=saved, recorded=recorded)
    after.tell(RunStarted())
    assert not only(after.said, EvaluateAdapter)
    again = only(after.tell(DeviceReported("b", device("b"))), SendAssignment)
    assert [send.device_id for send in again] == ["b"]
    duplicate = after.tell(UpdateArrived("a", "m-a", recorded["a"]))
    assert duplicate == [Acknowledge("a", "m-a", "ok", "duplicate")]
    (aggregate,) = only(after.update("b"), AggregateRound)
    assert [update.device_id for update in aggregate.updates] == ["a", "b"]


def test_a_server_killed_between_rounds_waits_for_more_than_the_first_device() -> None:
    checkpoint = START.model_copy(update={"round_number": 2, "baseline_done": True})
    talk = Conversation(checkpoint=checkpoint)
    talk.tell(RunStarted())
    assert not only(talk.tell(DeviceReported("a", device("a"))), SendAssignment)
    talk.tell(DeviceReported("b", device("b")))
    deadline = talk.run.next_deadline()
    assert deadline is not None
    sent = only(talk.wait(deadline - talk.now), SendAssignment)
    assert {send.device_id for send in sent} == {"a", "b"}


def test_a_device_given_up_does_not_keep_the_run_awake_and_may_still_answer() -> None:
    talk = Conversation()
    talk.begin("a", "b")
    talk.tell(AssignmentAccepted("b", talk.manifest("b").assignment_id))
    talk.tell(DeviceLost("a"))
    talk.wait(PLAN.lost_grace_s + 1)
    deadline = talk.run.next_deadline()
    assert deadline is not None
    assert deadline > talk.now
    assert only(talk.update("a"), RecordUpdate)


def test_a_server_killed_after_the_last_commit_only_finishes() -> None:
    checkpoint = START.model_copy(
        update={"round_number": 3, "baseline_done": True, "finished": "all 2 rounds done"}
    )
    talk = Conversation(checkpoint=checkpoint)
    (finish,) = talk.tell(RunStarted())
    assert isinstance(finish, FinishRun)
    assert finish.status is RunStatus.FINISHED
