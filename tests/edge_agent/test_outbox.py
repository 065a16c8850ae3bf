"""The durable outbox: files, restarts, and when to send again."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.outbox import (
    FIRST_RESEND_S,
    LONGEST_RESEND_S,
    Outbox,
    OutgoingMessage,
    ResendSchedule,
)
from wire_protocol.errors import ProtocolError
from wire_protocol.messages import MAX_WIRE_BYTES


def outbox(folder: Path, now: float = 0.0) -> Outbox:
    return Outbox(folder, rng=random.Random(1), now=now)


def message(message_id: str, payload: bytes = b"payload") -> OutgoingMessage:
    return OutgoingMessage(message_id, "some/topic", payload)


def test_a_new_message_is_due_at_once_and_then_rests(tmp_path: Path) -> None:
    box = outbox(tmp_path)
    box.add(message("m1"), now=5.0)
    assert box.due(5.0) == [message("m1")]
    assert box.due(5.0) == []
    assert box.due(5.0 + FIRST_RESEND_S) == [message("m1")]


def test_a_message_survives_a_restart_byte_for_byte(tmp_path: Path) -> None:
    payload = bytes(range(256))
    outbox(tmp_path).add(message("m1", payload), now=0.0)
    assert outbox(tmp_path, now=100.0).due(100.0) == [message("m1", payload)]


def test_an_acknowledged_message_is_gone_for_good(tmp_path: Path) -> None:
    box = outbox(tmp_path)
    box.add(message("m1"), now=0.0)
    box.add(message("m2"), now=0.0)
    assert box.acknowledged("m1")
    assert not box.acknowledged("m1")
    assert not box.acknowledged("never-seen")
    assert box.due(1000.0) == [message("m2")]
    assert len(outbox(tmp_path)) == 1


def test_messages_keep_their_order_over_a_restart(tmp_path: Path) -> None:
    box = outbox(tmp_path)
    ids = ["m9", "m1", "m5", "m3"]
    for message_id in ids:
        box.add(message(message_id), now=0.0)
    assert [sent.message_id for sent in outbox(tmp_path).due(0.0)] == ids


def test_the_same_id_twice_is_one_message(tmp_path: Path) -> None:
    box = outbox(tmp_path)
    box.add(message("m1", b"first"), now=0.0)
    box.add(message("m1", b"second"), now=0.0)
    assert box.due(0.0) == [message("m1", b"first")]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"topic":"t"}', b'{"payload":"*","topic":1}']
)
def test_an_unreadable_file_is_moved_aside_and_the_rest_is_sent(
    tmp_path: Path, content: bytes
) -> None:
    outbox(tmp_path).add(message("good"), now=0.0)
    (tmp_path / "bad.json").write_bytes(content)
    assert outbox(tmp_path).due(0.0) == [message("good")]
    assert (tmp_path / "bad.json.corrupt").read_bytes() == content
    assert not (tmp_path / "bad.json").exists()


def test_half_written_files_of_a_killed_agent_are_cleaned_up(tmp_path: Path) -> None:
    (tmp_path / ".abc.tmp").write_bytes(b"half")
    assert len(outbox(tmp_path)) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_message_that_no_broker_would_take_is_refused(tmp_path: Path) -> None:
    box = outbox(tmp_path)
    with pytest.raises(ProtocolError, match="exceeds"):
        box.add(message("m1", b"x" * (MAX_WIRE_BYTES + 1)), now=0.0)
    assert len(box) == 0


@pytest.mark.parametrize("message_id", ["", "../escape", "a/b", ".hidden"])
def test_an_id_that_is_no_file_name_is_refused(tmp_path: Path, message_id: str) -> None:
    with pytest.raises(ProtocolError):
        outbox(tmp_path).add(message(message_id), now=0.0)


def test_a_new_connection_makes_everything_due(tmp_path: Path) -> None:
    box = outbox(tmp_path)
    box.add(message("m1"), now=0.0)
    for now in range(0, 500, 100):
        box.due(float(now))
    box.reconnected(400.5)
    assert box.next_deadline() == 400.5
    assert box.due(400.5) == [message("m1")]
    deadline = box.next_deadline()
    assert deadline is not None
    assert deadline <= 400.5 + FIRST_RESEND_S


def test_a_busy_server_is_left_alone_for_as_long_as_it_asked(tmp_path: Path) -> None:
    box = outbox(tmp_path)
    box.add(message("m1"), now=0.0)
    box.due(0.0)
    box.postpone("m1", now=0.0, at_least_s=30.0)
    assert box.due(29.9) == []
    assert box.due(30.0 + FIRST_RESEND_S) == [message("m1")]


@given(seed=st.integers(0, 2**32), sends=st.integers(1, 20))
def test_a_resend_comes_neither_at_once_nor_later_than_the_cap(seed: int, sends: int) -> None:
    schedule = ResendSchedule(random.Random(seed))
    schedule.add("m1", 0.0)
    now = 0.0
    for number in range(sends):
        assert schedule.take_due(now) == ["m1"]
        following = schedule.next_deadline()
        assert following is not None
        bound_s = min(LONGEST_RESEND_S, FIRST_RESEND_S * 2**number)
        assert 0 < following - now <= bound_s + 1e-6
        now = following


def test_an_empty_schedule_never_wakes_anybody() -> None:
    schedule = ResendSchedule(random.Random(0))
    assert schedule.next_deadline() is None
    schedule.add("m1", 3.0)
    schedule.remove("m1")
    assert schedule.next_deadline() is None
    assert schedule.take_due(1e9) == []
