"""The registry: leases, session numbers, capacities."""

from __future__ import annotations

import pytest

from broker_server.fleet import (
    USED_TWICE,
    USED_TWICE_S,
    Fleet,
    Joined,
    Left,
    NeedsRebirth,
    UsedTwice,
)
from tests.support.messages import SHA, a_birth, a_capability, a_manifest, a_report
from wire_protocol.messages import Heartbeat

BEAT = Heartbeat(sequence=1)


def born(fleet: Fleet, now: float = 0.0, sid: int = 1) -> None:
    fleet.born("pi-1", sid, a_birth(heartbeat_s=10.0), now)


def test_a_silent_device_is_lost_after_three_missed_heartbeats() -> None:
    fleet = Fleet()
    born(fleet)
    assert fleet.next_deadline() == 30.0
    assert fleet.expire(29.9) == []
    assert fleet.expire(30.0) == [Left("pi-1", "silent for 30 s")]
    assert fleet.expire(31.0) == []


def test_a_heartbeat_renews_the_lease() -> None:
    fleet = Fleet()
    born(fleet)
    assert fleet.heartbeat("pi-1", 1, BEAT, 25.0) == []
    assert fleet.next_deadline() == 55.0


def test_a_device_that_is_heard_again_is_back() -> None:
    fleet = Fleet()
    born(fleet)
    fleet.expire(40.0)
    assert fleet.heartbeat("pi-1", 1, BEAT, 41.0) == [Joined("pi-1")]


def test_a_closed_connection_is_noticed_at_once() -> None:
    fleet = Fleet()
    born(fleet)
    assert fleet.said_offline("pi-1", 1) == [Left("pi-1", "its connection closed")]
    assert fleet.said_offline("pi-1", 1) == []


def test_a_death_older_than_the_last_birth_means_nothing() -> None:
    fleet = Fleet()
    born(fleet, sid=1)
    born(fleet, now=5.0, sid=2)
    assert fleet.said_offline("pi-1", 1) == []
    assert fleet.devices["pi-1"].online


def test_a_birth_older_than_the_last_one_means_nothing() -> None:
    fleet = Fleet()
    born(fleet, sid=5)
    assert fleet.born("pi-1", 4, a_birth(board="other"), 1.0) == []
    assert fleet.devices["pi-1"].birth.board == "rpi-5-8"


def test_a_device_that_lost_its_counter_is_taken_back_after_its_next_boot() -> None:
    fleet = Fleet()
    born(fleet, sid=5)
    changes = fleet.born("pi-1", 1, a_birth(boot_id="boot-2"), 1.0)
    assert changes == [Left("pi-1", "it started again"), Joined("pi-1")]
    assert fleet.heartbeat("pi-1", 1, BEAT, 2.0) == []


def test_a_stranger_and_a_wrong_session_are_asked_for_their_birth() -> None:
    fleet = Fleet()
    assert fleet.heartbeat("pi-1", 1, BEAT, 0.0) == [NeedsRebirth("pi-1")]
    born(fleet, sid=1)
    assert fleet.heartbeat("pi-1", 2, BEAT, 1.0) == [NeedsRebirth("pi-1")]
    assert fleet.measured("pi-2", a_capability()) == [NeedsRebirth("pi-2")]


def test_a_restored_device_is_offline_until_it_speaks() -> None:
    fleet = Fleet()
    fleet.restore("pi-1", 3, a_birth(), 0.0)
    assert fleet.next_deadline() is None
    assert fleet.heartbeat("pi-1", 3, BEAT, 1.0) == [Joined("pi-1")]


def capacity_of(
    fleet: Fleet, dataset: str = "triage", labels: tuple[str, ...] = ()
) -> tuple[object, str]:
    return fleet.capacity("pi-1", model_digest=SHA, dataset=dataset, labels=labels)


def test_a_measured_device_with_the_dataset_has_a_capacity() -> None:
    fleet = Fleet()
    born(fleet)
    capacity, note = fleet.capacity(
        "pi-1", model_digest=SHA, dataset="triage", labels=("disk", "network", "power")
    )
    assert capacity is not None
    assert (capacity.examples, capacity.forward_s_per_token_layer, note) == (100, 1e-5, "")


@pytest.mark.parametrize(
    ("dataset", "labels", "words"),
    [
        ("other", (), "has no dataset 'other' (it has: triage)"),
        ("triage", ("disk",), "labels that the run does not know: network"),
    ],
)
def test_a_device_that_cannot_take_part_has_a_reason(
    dataset: str, labels: tuple[str, ...], words: str
) -> None:
    fleet = Fleet()
    born(fleet)
    capacity, note = capacity_of(fleet, dataset, labels)
    assert capacity is None
    assert words in note


def test_an_empty_dataset_is_a_reason_and_a_missing_benchmark_is_not() -> None:
    fleet = Fleet()
    fleet.born("pi-1", 1, a_birth(datasets={"triage": {"examples": 0}}), 0.0)
    assert "empty" in capacity_of(fleet)[1]
    fleet.born("pi-1", 2, a_birth(capability=a_capability(compute=None)), 0.0)
    assert capacity_of(fleet) == (None, "")


def test_a_device_that_could_not_measure_itself_says_why_until_it_starts_again() -> None:
    fleet = Fleet()
    fleet.born("pi-1", 1, a_birth(capability=a_capability(compute=None)), 0.0)
    assert fleet.could_not_measure("pi-1", SHA, "torch is missing") == [Joined("pi-1")]
    assert capacity_of(fleet) == (None, "could not measure itself: torch is missing")
    born(fleet, now=1.0, sid=2)
    assert capacity_of(fleet)[1] == ""


def test_an_agent_of_another_protocol_stays_out_with_the_reason() -> None:
    fleet = Fleet()
    fleet.born("pi-1", 1, a_birth(protocol=(9,)), 0.0)
    assert "speaks protocol 9, this server 1" in capacity_of(fleet)[1]


def test_rounds_move_the_estimate_and_a_new_benchmark_replaces_it() -> None:
    fleet = Fleet()
    born(fleet)
    # 500 tokens, 3 layers, 2 of them trained: 1.5e-5 s forward, 3e-5 s backward.
    report = a_report(tokens=500, forward_s=1.5e-5 * 1500, backward_s=3e-5 * 1000)
    fleet.learn("pi-1", a_manifest(report=report), rho=0.5)
    capacity, _ = fleet.capacity("pi-1", model_digest=SHA, dataset="triage", labels=())
    assert capacity is not None
    assert capacity.forward_s_per_token_layer == pytest.approx(1.25e-5)
    assert capacity.backward_s_per_token_layer == pytest.approx(2.5e-5)
    fleet.measured("pi-1", a_capability())
    capacity, _ = fleet.capacity("pi-1", model_digest=SHA, dataset="triage", labels=())
    assert capacity is not None
    assert capacity.forward_s_per_token_layer == 1e-5


def test_what_was_learned_survives_a_reconnect_of_the_same_device() -> None:
    fleet = Fleet()
    born(fleet)
    report = a_report(forward_s=1.5e-5 * 1500, backward_s=3e-5 * 1000)
    fleet.learn("pi-1", a_manifest(report=report), rho=0.5)
    born(fleet, now=9.0, sid=2)
    assert fleet.devices["pi-1"].estimate is not None
    changed = a_birth(capability=a_capability(fingerprint="cd" * 32))
    fleet.born("pi-1", 3, changed, 10.0)
    assert fleet.devices["pi-1"].estimate is None


def test_a_device_that_may_not_train_stays_out_and_says_why_until_it_may_again() -> None:
    fleet = Fleet()
    fleet.born("pi-1", 1, a_birth(), 0.0)
    hot = Heartbeat(sequence=1, not_training="71 C, above 70")
    assert fleet.heartbeat("pi-1", 1, hot, 1.0) == [Joined("pi-1")]
    assert fleet.heartbeat("pi-1", 1, hot, 2.0) == []

    def note() -> str:
        return fleet.capacity("pi-1", model_digest=SHA, dataset="reviews", labels=())[1]

    assert note() == "does not train now: 71 C, above 70"
    assert fleet.heartbeat("pi-1", 1, Heartbeat(sequence=2), 3.0) == [Joined("pi-1")]
    assert "does not train" not in note()


def test_a_device_may_say_so_as_it_introduces_itself() -> None:
    fleet = Fleet()
    fleet.born("pi-1", 1, a_birth(not_training="on battery"), 0.0)
    assert fleet.devices["pi-1"].not_training == "on battery"


def test_two_agents_of_one_name_are_told_apart_and_kept_out_until_one_is_gone() -> None:
    fleet = Fleet()
    fleet.born("pi-1", 8, a_birth(boot_id="first"), 0.0)
    assert fleet.born("pi-1", 8, a_birth(boot_id="second"), 1.0)[-1] == Joined("pi-1")
    assert fleet.born("pi-1", 9, a_birth(boot_id="first"), 2.0)[0] == UsedTwice("pi-1")
    again = fleet.born("pi-1", 9, a_birth(boot_id="second"), 3.0)
    assert UsedTwice("pi-1") not in again, "said once"
    assert fleet.devices["pi-1"].note == USED_TWICE
    wanted = {"model_digest": SHA, "dataset": "triage", "labels": ()}
    assert fleet.capacity("pi-1", **wanted) == (None, USED_TWICE)  # type: ignore[arg-type]
    for now in range(20, 603, 20):
        fleet.heartbeat("pi-1", 9, BEAT, float(now))
    assert fleet.next_deadline() == 3.0 + USED_TWICE_S
    assert fleet.expire(3.0 + USED_TWICE_S) == [Joined("pi-1")]
    assert fleet.devices["pi-1"].note == ""


def test_a_birth_of_an_earlier_boot_that_the_broker_delivers_again_is_no_second_agent() -> None:
    fleet = Fleet()
    fleet.born("pi-1", 8, a_birth(boot_id="first"), 0.0)
    fleet.born("pi-1", 9, a_birth(boot_id="second"), 1.0)
    changes = fleet.born("pi-1", 8, a_birth(boot_id="first"), 2.0)
    assert UsedTwice("pi-1") not in changes
