"""Who is let into a fleet: one table, one folder, and a door that strangers may knock at."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from starlette.exceptions import HTTPException

from broker_server.api import _http_error, _known_error
from broker_server.enrollment import (
    Claim,
    Entry,
    Status,
    accept,
    ask,
    reject,
    revoke,
)
from broker_server.enrollment_api import LARGEST_REQUEST_BYTES, Patience, enrolment_router
from broker_server.enrollment_desk import EnrolmentDesk
from broker_server.pki import FleetPki
from broker_server.pki_x509 import CERTIFICATE_S, read_certificate
from edge_agent.x509 import certificate_request
from tests.support.identities import a_pki
from wire_protocol.errors import ConfigError, LegendError, ProtocolError, Refused

NOW = 1_800_000_000.0
SEEDS = {name: bytes([number]) * 32 for number, name in enumerate(("first", "second", "third"), 1)}


def a_claim(key: str = "first") -> Claim:
    return Claim("pi", (SEEDS[key]).hex(), f"request of {key}")


def asked(entry: Entry, key: str = "first", *, new_token: bool = True) -> Entry:
    return ask(entry, a_claim(key), NOW, trusted=False, new_token=new_token).entry


# The table


def test_a_stranger_waits_until_an_operator_decides() -> None:
    waiting = ask(Entry(), a_claim(), NOW, trusted=False, new_token=True)
    assert (waiting.status, waiting.accept_now) == (Status.PENDING, False)
    inside = accept(waiting.entry, "certificate", NOW)
    assert inside.accepted is not None
    assert inside.accepted.certificate_pem == "certificate"
    assert inside.pending is None


def test_a_token_made_for_this_device_needs_no_operator() -> None:
    assert ask(Entry(), a_claim(), NOW, trusted=True, new_token=True).accept_now


def test_after_a_crash_between_request_and_certificate_the_trusted_device_is_accepted() -> None:
    interrupted = ask(Entry(), a_claim(), NOW, trusted=True, new_token=True).entry
    assert ask(interrupted, a_claim(), NOW, trusted=True, new_token=False).accept_now


def test_asking_again_with_a_used_token_changes_nothing() -> None:
    for entry in (
        asked(Entry()),
        accept(asked(Entry()), "certificate", NOW),
        reject(asked(Entry()), NOW),
        revoke(accept(asked(Entry()), "certificate", NOW), NOW),
    ):
        again = ask(entry, a_claim(), NOW + 9, trusted=False, new_token=False)
        assert again.entry == entry


def test_a_rejected_device_may_ask_again_with_a_new_token_only() -> None:
    turned_away = reject(asked(Entry()), NOW)
    assert asked(turned_away, new_token=False).pending is None
    assert asked(turned_away, new_token=True).pending is not None


def test_a_revoked_key_never_comes_back_and_a_new_one_may() -> None:
    out = revoke(accept(asked(Entry()), "certificate", NOW), NOW)
    assert ask(out, a_claim(), NOW, trusted=True, new_token=True).status is Status.REVOKED
    assert ask(out, a_claim("second"), NOW, trusted=True, new_token=True).accept_now


def test_a_second_key_waits_beside_the_one_that_is_inside() -> None:
    both = asked(accept(asked(Entry()), "certificate", NOW), "second")
    assert both.accepted is not None
    assert both.pending is not None
    assert reject(both, NOW).accepted == both.accepted
    replaced = accept(both, "newer", NOW)
    assert replaced.accepted is not None
    assert replaced.accepted.claim.key == a_claim("second").key
    assert replaced.member(a_claim("first").key) is None


def test_a_second_key_does_not_push_a_waiting_one_aside() -> None:
    with pytest.raises(Refused, match=a_claim("first").fingerprint):
        asked(asked(Entry(), "first"), "second")


def test_nothing_can_be_decided_where_nothing_waits() -> None:
    for entry in (Entry(), accept(asked(Entry()), "certificate", NOW), reject(asked(Entry()), NOW)):
        with pytest.raises(Refused, match="no request of this device is waiting"):
            accept(entry, "certificate", NOW)
        with pytest.raises(Refused):
            reject(entry, NOW)


class AnyHistory(RuleBasedStateMachine):
    """One name, three keys, every order of events."""

    def __init__(self) -> None:
        super().__init__()
        self.entry = Entry()
        self.allowed: set[str] = set()
        self.revoked: set[str] = set()

    @rule(key=st.sampled_from(sorted(SEEDS)), trusted=st.booleans(), new_token=st.booleans())
    def ask(self, key: str, trusted: bool, new_token: bool) -> None:
        try:
            said = ask(self.entry, a_claim(key), NOW, trusted=trusted, new_token=new_token)
        except Refused:
            return
        self.entry = said.entry
        if said.accept_now:
            assert trusted
            self.allowed.add(a_claim(key).key)
            self.entry = accept(self.entry, "certificate", NOW)

    @rule()
    def accept(self) -> None:
        if (waiting := self.entry.pending) is not None:
            self.allowed.add(waiting.claim.key)
            self.entry = accept(self.entry, "certificate", NOW)

    @rule()
    def reject(self) -> None:
        if self.entry.pending is not None:
            self.entry = reject(self.entry, NOW)

    @rule()
    def revoke(self) -> None:
        if self.entry.accepted is not None:
            self.revoked.add(self.entry.accepted.claim.key)
        self.entry = revoke(self.entry, NOW)
        assert self.entry.pending is None

    @invariant()
    def nobody_is_inside_without_a_yes(self) -> None:
        inside = self.entry.accepted
        if inside is not None:
            assert inside.claim.key in self.allowed
            assert inside.certificate_pem

    @invariant()
    def a_key_stands_in_one_place_at_a_time(self) -> None:
        outside = self.entry.outside
        assert outside is None or outside.status in (Status.PENDING, Status.REJECTED)
        assert outside is None or not outside.certificate_pem


TestAnyHistory = AnyHistory.TestCase


# The desk


@pytest.fixture
def pki(tmp_path: Path) -> FleetPki:
    return a_pki(tmp_path / "pki", now=NOW)


@pytest.fixture
def desk(pki: FleetPki) -> EnrolmentDesk:
    return EnrolmentDesk(pki)


def a_secret(pki: FleetPki, device_id: str | None = None, ttl_s: float = 3600.0) -> str:
    return pki.create_token(NOW, device_id=device_id, ttl_s=ttl_s).partition(".")[0]


def a_request(key: str = "first", name: str = "pi") -> str:
    return certificate_request(SEEDS[key], name)


def test_an_accepted_device_gets_the_same_certificate_however_often_it_asks(
    desk: EnrolmentDesk, pki: FleetPki
) -> None:
    secret = a_secret(pki)
    assert desk.ask("pi", a_request(), secret, NOW).status is Status.PENDING
    desk.accept("pi", NOW + 60)
    first = desk.ask("pi", a_request(), secret, NOW + 61)
    assert first.status is Status.ACCEPTED
    device = pki.verify_device(first.certificate_pem, NOW + 62)
    assert device.name == "pi"
    assert desk.ask("pi", a_request(), secret, NOW + 99) == first


def test_every_decision_outlives_the_process(desk: EnrolmentDesk, pki: FleetPki) -> None:
    secrets = {name: a_secret(pki) for name in ("waits", "in", "away", "out")}
    for name, secret in secrets.items():
        desk.ask(name, a_request(name=name), secret, NOW)
    desk.accept("in", NOW)
    desk.accept("out", NOW)
    desk.reject("away", NOW)
    desk.revoke("out", NOW)
    again = EnrolmentDesk(FleetPki(pki.folder))
    assert again.entries() == desk.entries()
    told = {
        name: again.ask(name, a_request(name=name), secret, NOW).status
        for name, secret in secrets.items()
    }
    assert {name: status.value for name, status in told.items()} == {
        "waits": "pending",
        "in": "accepted",
        "away": "rejected",
        "out": "revoked",
    }


def test_bad_tokens_are_refused_with_the_reason(desk: EnrolmentDesk, pki: FleetPki) -> None:
    used, other = a_secret(pki), a_secret(pki, "jetson")
    short = a_secret(pki, ttl_s=10)
    desk.ask("pi", a_request(), used, NOW)
    for secret, key, words in (
        ("guessed", "first", "unknown"),
        (used, "second", "has been used"),
        (other, "first", "not for device pi"),
        (short, "third", "expired"),
    ):
        with pytest.raises(Refused, match=words):
            desk.ask("pi", a_request(key), secret, NOW + 20)


def test_a_name_that_belongs_to_servers_cannot_be_enrolled(
    desk: EnrolmentDesk, pki: FleetPki
) -> None:
    with pytest.raises(ProtocolError, match="reserved for servers"):
        desk.ask("legend-server-lab", a_request(), a_secret(pki), NOW)


def test_a_new_key_under_an_old_name_voids_the_certificate_of_the_old_key(
    desk: EnrolmentDesk, pki: FleetPki
) -> None:
    old = desk.ask("pi", a_request(), a_secret(pki, "pi"), NOW)
    new = desk.ask("pi", a_request("second"), a_secret(pki, "pi"), NOW + 1)
    with pytest.raises(Refused, match="revoked"):
        pki.verify_device(old.certificate_pem, NOW + 2)
    assert pki.verify_device(new.certificate_pem, NOW + 2).name == "pi"


def test_what_another_program_revoked_is_revoked_here(desk: EnrolmentDesk, pki: FleetPki) -> None:
    secret = a_secret(pki, "pi")
    desk.ask("pi", a_request(), secret, NOW)
    FleetPki(pki.folder).revoke("pi", NOW + 1)
    assert desk.ask("pi", a_request(), secret, NOW + 2).status is Status.REVOKED
    with pytest.raises(Refused, match="revoked"):
        desk.renew("pi", a_request(), NOW + 2)


def test_a_device_that_was_never_certified_cannot_be_revoked(desk: EnrolmentDesk) -> None:
    with pytest.raises(ConfigError, match="no certificate"):
        desk.revoke("pi", NOW)


def test_a_damaged_decision_stops_the_server_with_its_file(pki: FleetPki) -> None:
    desk = EnrolmentDesk(pki)
    desk.ask("pi", a_request(), a_secret(pki), NOW)
    file = pki.folder / "enrolments" / "pi.json"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ConfigError, match=r"pi\.json"):
        EnrolmentDesk(pki)


def test_renewing_gives_one_new_certificate_for_the_same_key(
    desk: EnrolmentDesk, pki: FleetPki
) -> None:
    first = desk.ask("pi", a_request(), a_secret(pki, "pi"), NOW).certificate_pem
    # A device whose clock is ahead is answered, and gets nothing new.
    assert desk.renew("pi", a_request(), NOW + 60) == first
    due = NOW + CERTIFICATE_S * 2 / 3
    second = desk.renew("pi", a_request(), due)
    assert second != first
    assert desk.renew("pi", a_request(), due + 3600) == second
    # The old one is good until it ends: the device may not have got the new one yet.
    assert pki.verify_device(first, due + 60).name == "pi"
    with pytest.raises(Refused, match="same key"):
        desk.renew("pi", a_request("second"), due)


def test_a_certificate_that_was_issued_by_hand_is_renewed_too(
    desk: EnrolmentDesk, pki: FleetPki
) -> None:
    pki.issue_device("pi", a_request(), NOW)
    renewed = desk.renew("pi", a_request(), NOW + CERTIFICATE_S * 0.7)
    assert read_certificate(renewed).not_valid_after_utc.timestamp() > NOW + CERTIFICATE_S
    with pytest.raises(Refused, match="no certificate to renew"):
        desk.renew("jetson", a_request(name="jetson"), NOW)


# The door


@pytest.fixture
def door(desk: EnrolmentDesk) -> Iterator[TestClient]:
    api = FastAPI()
    api.include_router(enrolment_router(desk, operator_key="ab" * 32))
    api.add_exception_handler(LegendError, _known_error)
    api.add_exception_handler(HTTPException, _http_error)
    with TestClient(api) as client:
        yield client


def test_a_server_without_certificates_says_what_to_do() -> None:
    api = FastAPI()
    api.include_router(enrolment_router(None, operator_key="ab" * 32))
    api.add_exception_handler(LegendError, _known_error)
    with TestClient(api) as client:
        for answer in (
            client.get("/v1/ca"),
            client.get("/v1/enrolments"),
            client.post("/v1/enroll", json={}),
            client.post("/v1/devices/pi/accept"),
        ):
            assert answer.status_code == 403
            assert "broker-server pki init" in answer.json()["detail"]


def test_strangers_learn_the_authority_and_nothing_else(door: TestClient, pki: FleetPki) -> None:
    assert door.get("/v1/ca").json() == {"ca_pem": pki.ca_pem, "fleet": "lab"}


def test_a_pending_device_is_told_no_certificate_and_an_accepted_one_everything(
    door: TestClient, pki: FleetPki
) -> None:
    secret = pki.create_token(time.time()).partition(".")[0]
    body = {"device_id": "pi", "csr_pem": a_request(), "secret": secret}
    assert door.post("/v1/enroll", json=body).json() == {"status": "pending", "fleet": "lab"}
    (waiting,) = door.get("/v1/enrolments").json()["enrolments"]
    assert (waiting["device_id"], waiting["status"], waiting["replaces"]) == (
        "pi",
        "pending",
        False,
    )
    assert door.post("/v1/devices/pi/accept").json() == {"device_id": "pi", "status": "accepted"}
    told = door.post("/v1/enroll", json=body).json()
    assert told["ca_pem"] == pki.ca_pem
    assert told["operator_public_key"] == "ab" * 32
    assert pki.verify_device(told["certificate_pem"], time.time()).name == "pi"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"not json", 422),
        (b'{"device_id": "pi"}', 422),
        (b'{"device_id": "Pi!", "csr_pem": "x", "secret": "x"}', 422),
        (b'{"device_id": "pi", "csr_pem": "x", "secret": "x"}', 422),
        (b"x" * (LARGEST_REQUEST_BYTES + 1), 413),
    ],
)
def test_a_bad_request_is_one_line(door: TestClient, body: bytes, status: int) -> None:
    answer = door.post("/v1/enroll", content=body)
    assert answer.status_code == status
    assert "\n" not in answer.json()["detail"]


def test_who_shows_bad_tokens_is_soon_asked_to_wait(door: TestClient) -> None:
    body = {"device_id": "pi", "csr_pem": a_request(), "secret": "guessed"}
    answers = [door.post("/v1/enroll", json=body).status_code for _ in range(40)]
    assert answers[0] == 403
    assert answers[-1] == 429


def test_patience_recovers_with_time_and_is_per_address() -> None:
    patience = Patience(burst=3, rest_s=10)
    for _ in range(3):
        assert patience.wait_s("a", 100.0) == 0
        patience.tried("a", 100.0)
    assert patience.wait_s("a", 100.0) == pytest.approx(10)
    assert patience.wait_s("b", 100.0) == 0
    assert patience.wait_s("a", 111.0) == 0


def test_patience_remembers_no_more_addresses_than_it_may() -> None:
    patience = Patience()
    for number in range(10_000):
        patience.tried(str(number), 0.0)
    assert len(patience._free_at) <= 4096
