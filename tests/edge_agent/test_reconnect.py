"""What a device makes of the ways in which a connection ends."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from edge_agent.backoff import full_jitter
from edge_agent.reconnect import Attempt, LinkTiming, ReconnectPolicy

TIMING = LinkTiming(first_retry_s=1.0, longest_retry_s=120.0, refused_retry_s=300.0)
UNREACHABLE = Attempt("connection refused", socket_opened=False)
SILENT = Attempt("closed without an answer", socket_opened=True)
WRONG_PASSWORD = Attempt("bad password", socket_opened=True, refusal=134)


def accepted(lived_s: float) -> Attempt:
    return Attempt("lost", socket_opened=True, lived_s=lived_s)


def policy(seed: int = 0) -> ReconnectPolicy:
    return ReconnectPolicy(TIMING, random.Random(seed))


@given(seed=st.integers(0, 2**32), attempt=st.integers(0, 10_000))
def test_full_jitter_stays_between_zero_and_its_doubling_bound(seed: int, attempt: int) -> None:
    delay_s = full_jitter(attempt, base_s=1.0, cap_s=120.0, rng=random.Random(seed))
    assert 0.0 <= delay_s <= min(120.0, 2.0 ** min(attempt, 30))


def test_a_fleet_that_loses_its_broker_does_not_come_back_at_one_instant() -> None:
    delays = [policy(seed).after(accepted(1000.0)).delay_s for seed in range(100)]
    assert min(delays) < 0.2
    assert max(delays) > 0.8
    assert max(delays) <= 1.0


@given(seed=st.integers(0, 2**32), failures=st.integers(1, 40))
def test_the_bound_doubles_while_the_broker_cannot_be_reached(seed: int, failures: int) -> None:
    subject = policy(seed)
    for number in range(failures):
        rest = subject.after(UNREACHABLE)
        assert rest.delay_s <= min(120.0, 2.0**number)
        assert rest.refused_times == 0


def test_two_agents_with_one_device_id_slow_down_but_stay_near() -> None:
    rests = []
    for seed in range(40):
        subject = policy(seed)
        rests += [[subject.after(accepted(0.1)).delay_s for _ in range(10)]]
    assert all(one[0] <= 1.0 for one in rests)
    assert 4.0 < max(one[-1] for one in rests) <= 8.0


def test_a_link_that_breaks_again_and_again_keeps_nobody_away_for_minutes() -> None:
    for seed in range(20):
        subject = policy(seed)
        for _ in range(30):
            assert subject.after(UNREACHABLE).delay_s <= 120.0
            assert subject.after(accepted(3.0)).delay_s <= 8.0
            assert subject.after(UNREACHABLE).delay_s <= 16.0


def test_a_connection_that_lived_resets_the_backoff() -> None:
    subject = policy()
    for _ in range(20):
        subject.after(UNREACHABLE)
    assert subject.after(accepted(60.0)).delay_s <= 1.0


def test_a_device_that_was_let_in_is_not_kept_out_by_the_outage_before() -> None:
    for seed in range(20):
        subject = policy(seed)
        for _ in range(20):
            subject.after(UNREACHABLE)
        assert subject.after(accepted(2.0)).delay_s <= 1.0
        assert subject.after(UNREACHABLE).delay_s <= 2.0


def test_a_wrong_password_is_counted_and_waited_for_long() -> None:
    subject = policy()
    rests = [subject.after(WRONG_PASSWORD) for _ in range(3)]
    assert [rest.refused_times for rest in rests] == [1, 2, 3]
    assert all(150.0 <= rest.delay_s <= 300.0 for rest in rests)
    assert subject.after(accepted(60.0)).refused_times == 0


def test_only_repeated_silence_means_a_wrong_password() -> None:
    subject = policy()
    assert [subject.after(SILENT).refused_times for _ in range(4)] == [0, 0, 1, 2]
    subject.after(UNREACHABLE)
    assert subject.after(SILENT).refused_times == 0


def test_a_broker_that_is_full_is_not_a_wrong_password() -> None:
    full = Attempt("server unavailable", socket_opened=True, refusal=136)
    assert [policy().after(full).refused_times for _ in range(5)] == [0] * 5


def test_what_kills_every_young_connection_is_dropped() -> None:
    subject = policy()
    assert [subject.after(accepted(0.2)).drop_unsent for _ in range(3)] == [False, False, True]
    assert not subject.after(accepted(60.0)).drop_unsent


def test_a_port_that_closes_without_an_answer_is_tried_again_soon() -> None:
    subject = policy()
    for failures, rest in enumerate([subject.after(SILENT) for _ in range(4)]):
        assert rest.delay_s <= TIMING.first_retry_s * 2**failures
