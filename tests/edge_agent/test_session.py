"""The agent's mind, told as conversations."""

from __future__ import annotations

import random

import pytest

from edge_agent.session import (
    AckArrived,
    Action,
    AnswerCommand,
    BenchmarkFailed,
    BenchmarkFinished,
    ClearOutbox,
    CommandArrived,
    Connected,
    Disconnected,
    Event,
    PostCapability,
    PostFailure,
    PostponeOutbox,
    PostUnmeasured,
    PostUpdate,
    PublishBirth,
    PublishHeartbeat,
    ResendOutbox,
    Session,
    StartBenchmark,
    StartWork,
    StopWork,
    Tick,
    WorkFailed,
    WorkFinished,
)
from tests.support.messages import SHA, a_capability, a_manifest, a_round_start
from wire_protocol.errors import FailureCode
from wire_protocol.messages import (
    Ack,
    Benchmark,
    Command,
    Rebirth,
    RoundCancel,
    RoundStart,
)

FIRST = a_round_start(assignment_id="run-1.1-0.pi-1")
SECOND = a_round_start(assignment_id="run-1.2-0.pi-1", round_number=2)
OK = AnswerCommand("c", "ok")


class Conversation:
    def __init__(self) -> None:
        self.session = Session(10.0, random.Random(0))
        self.now = 50.0

    def tell(self, *events: Event) -> list[Action]:
        return [action for event in events for action in self.session.handle(event, self.now)]

    def order(self, start: RoundStart) -> list[Action]:
        return self.tell(CommandArrived("c", Command(command=start)))

    def cancel(self, start: RoundStart) -> list[Action]:
        command = RoundCancel(assignment_id=start.assignment_id, reason="over")
        return self.tell(CommandArrived("c", Command(command=command)))

    def fail(self, start: RoundStart) -> list[Action]:
        return self.tell(WorkFailed(start.assignment_id, FailureCode.OUT_OF_MEMORY, "killed"))

    def finish(self, start: RoundStart) -> list[Action]:
        return self.tell(WorkFinished(a_manifest(assignment_id=start.assignment_id)))


def test_every_connection_begins_with_a_birth_and_what_is_owed() -> None:
    assert Conversation().tell(Connected(3)) == [PublishBirth(), ResendOutbox()]


def test_heartbeats_are_spread_around_their_interval() -> None:
    talk = Conversation()
    talk.tell(Connected(1))
    gaps = []
    for _ in range(200):
        deadline = talk.session.next_deadline()
        assert deadline is not None
        gaps.append(deadline - talk.now)
        talk.now = deadline
        assert [type(action) for action in talk.tell(Tick())] == [PublishHeartbeat]
    assert min(gaps) >= 8.0
    assert max(gaps) <= 12.0
    assert max(gaps) - min(gaps) > 2.0


def test_a_disconnected_agent_has_nothing_to_send_on_time() -> None:
    talk = Conversation()
    talk.tell(Connected(1), Disconnected())
    assert talk.session.next_deadline() is None


def test_an_assignment_is_answered_and_begun() -> None:
    talk = Conversation()
    assert talk.order(FIRST) == [OK, StartWork(FIRST)]
    assert talk.session.busy_with == FIRST.assignment_id


def test_the_same_assignment_twice_is_begun_once() -> None:
    talk = Conversation()
    talk.order(FIRST)
    assert talk.order(FIRST) == [OK]


def test_a_finished_update_is_posted_and_a_repeated_order_only_resends_it() -> None:
    talk = Conversation()
    talk.order(FIRST)
    (post,) = talk.finish(FIRST)
    assert isinstance(post, PostUpdate)
    assert talk.order(FIRST) == [AnswerCommand("c", "ok", "done"), ResendOutbox()]


def test_a_failure_is_posted_and_the_same_order_is_refused_afterwards() -> None:
    talk = Conversation()
    talk.order(FIRST)
    (post,) = talk.fail(FIRST)
    assert isinstance(post, PostFailure)
    assert post.failure.code is FailureCode.OUT_OF_MEMORY
    (answer,) = talk.order(FIRST)
    assert isinstance(answer, AnswerCommand)
    assert (answer.status, answer.code) == ("rejected", "given_up")


def test_a_device_that_ran_out_of_memory_says_anew_how_much_it_has_before_it_fails() -> None:
    talk = Conversation()
    talk.tell(Connected(3))
    talk.order(FIRST)
    birth, post = talk.fail(FIRST)
    assert birth == PublishBirth()
    assert isinstance(post, PostFailure)


def test_a_newer_assignment_stops_the_older_one_and_waits_for_it_to_end() -> None:
    talk = Conversation()
    talk.order(FIRST)
    assert talk.order(SECOND) == [OK, StopWork()]
    assert talk.fail(FIRST) == [StartWork(SECOND)]


def test_an_update_that_was_ready_before_it_could_be_stopped_is_still_posted() -> None:
    talk = Conversation()
    talk.order(FIRST)
    talk.order(SECOND)
    post, start = talk.finish(FIRST)
    assert isinstance(post, PostUpdate)
    assert start == StartWork(SECOND)


def test_cancelled_work_ends_without_an_answer() -> None:
    talk = Conversation()
    talk.order(FIRST)
    assert talk.cancel(FIRST) == [OK, StopWork()]
    assert talk.cancel(FIRST) == [OK]
    assert talk.fail(FIRST) == []
    assert talk.session.busy_with is None


def test_cancelling_what_has_not_begun_forgets_it() -> None:
    talk = Conversation()
    talk.order(FIRST)
    talk.order(SECOND)
    talk.cancel(SECOND)
    assert talk.fail(FIRST) == []


def test_nothing_else_starts_while_cancelled_work_is_still_ending() -> None:
    talk = Conversation()
    talk.order(FIRST)
    talk.cancel(FIRST)
    assert talk.tell(CommandArrived("c", Command(command=Benchmark(model_digest=SHA)))) == [OK]
    assert talk.fail(FIRST) == [StartBenchmark(SHA)]


@pytest.mark.parametrize("ending", [BenchmarkFinished(a_capability()), BenchmarkFailed("no")])
def test_an_assignment_waits_for_the_benchmark(ending: Event) -> None:
    talk = Conversation()
    order = CommandArrived("c", Command(command=Benchmark(model_digest=SHA)))
    assert talk.tell(order) == [OK, StartBenchmark(SHA)]
    assert talk.tell(order) == [OK]
    assert talk.order(FIRST) == [OK]
    *posted, start = talk.tell(ending)
    assert start == StartWork(FIRST)
    expected = PostCapability if isinstance(ending, BenchmarkFinished) else PostUnmeasured
    assert [type(action) for action in posted] == [expected]


def test_what_the_outbox_still_held_at_the_start_is_not_done_again() -> None:
    session = Session(
        10.0, random.Random(0), updated=[FIRST.assignment_id], given_up=[SECOND.assignment_id]
    )
    order = CommandArrived("c", Command(command=FIRST))
    assert session.handle(order, 0.0) == [AnswerCommand("c", "ok", "done"), ResendOutbox()]
    (answer,) = session.handle(CommandArrived("c", Command(command=SECOND)), 0.0)
    assert isinstance(answer, AnswerCommand)
    assert answer.status == "rejected"


def test_a_rebirth_comes_after_its_jitter() -> None:
    talk = Conversation()
    talk.tell(Connected(1))
    talk.tell(CommandArrived("c", Command(command=Rebirth(jitter_s=4.0))))
    deadline = talk.session.next_deadline()
    assert deadline is not None
    assert talk.now <= deadline <= talk.now + 4
    talk.now = deadline
    assert talk.tell(Tick()) == [PublishBirth()]


def test_only_a_busy_server_leaves_a_message_in_the_outbox() -> None:
    talk = Conversation()
    assert talk.tell(AckArrived(Ack(re="m", status="ok"))) == [ClearOutbox("m")]
    busy = Ack(re="m", status="busy", retry_after_s=2.0)
    assert talk.tell(AckArrived(busy)) == [PostponeOutbox("m", 2.0)]
    rejected = Ack(re="m", status="rejected", code="stale")
    assert talk.tell(AckArrived(rejected)) == [ClearOutbox("m", "stale")]
