"""A device's certificate is renewed in time, without a gap, and only by a real renewal."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_server.pki import FleetPki
from edge_agent.renewal import Renewal, renewal_due
from edge_agent.x509 import certificate_request
from tests.support.identities import DAY_S, a_pki, an_identity, loaded
from tests.support.tls_greeting import greeting, server_side, tls_server
from wire_protocol.errors import ProtocolError

SEED = bytes(range(32))


@pytest.fixture
def pki(tmp_path: Path) -> FleetPki:
    return a_pki(tmp_path / "pki")


@pytest.fixture
def folder(pki: FleetPki, tmp_path: Path) -> Path:
    return an_identity(pki, tmp_path / "identity")


@given(life=st.floats(1, 1e8), age=st.floats(0, 2))
def test_a_certificate_is_due_when_two_thirds_of_its_life_are_over(life: float, age: float) -> None:
    now = 1e9 + age * life
    if age < 0.666:
        assert not renewal_due(1e9, 1e9 + life, now)
    if age > 0.667:
        assert renewal_due(1e9, 1e9 + life, now)


def a_renewal(folder: Path) -> Renewal:
    return Renewal(loaded(folder), random.Random(0))


def test_a_young_certificate_is_left_alone_and_an_old_one_is_asked_for_once_an_hour(
    folder: Path,
) -> None:
    renewal = a_renewal(folder)
    begin, end = renewal.identity.certificate.not_before, renewal.identity.certificate.not_after
    assert renewal.request(begin + 10.0, 100.0) is None
    late = begin + 0.7 * (end - begin)
    asked = renewal.request(late, 100.0)
    assert asked == certificate_request(renewal.identity.seed, "pi")
    assert renewal.request(late + 60, 160.0) is None
    assert renewal.request(late + 5500, 5600.0) == asked


def test_the_server_s_word_counts_where_the_clock_says_1970(folder: Path) -> None:
    renewal = a_renewal(folder)
    certificate = renewal.identity.certificate
    life_s = float(certificate.not_after - certificate.not_before)
    assert renewal.now(0.0, 50.0) == certificate.not_before
    renewal.heard(0.4 * life_s, 50.0)
    assert renewal.request(0.0, 60.0) is None
    # Time passes on the monotonic clock alone.
    assert renewal.request(0.0, 60.0 + 0.1 * life_s) is not None


def test_a_renewed_certificate_is_presented_from_the_next_connection_on(
    folder: Path, pki: FleetPki
) -> None:
    renewal = a_renewal(an_identity(pki, folder, now=time.time() - 70 * DAY_S))
    asked = renewal.request(time.time(), 0.0)
    assert asked is not None
    fresh = pki.issue_device("pi", asked, time.time())
    renewal.install(fresh.pem)
    assert renewal.request(time.time(), 1e6) is None
    assert loaded(folder).certificate.serial == fresh.serial
    with tls_server(server_side(pki)) as port:
        assert greeting(renewal.identity, port) == ("pi", fresh.serial)


@pytest.mark.parametrize("whose", ["another key", "another name", "another fleet", "older", "junk"])
def test_a_certificate_that_is_not_a_renewal_changes_nothing(
    folder: Path, pki: FleetPki, tmp_path: Path, whose: str
) -> None:
    renewal = a_renewal(folder)
    before = (folder / "device.pem").read_bytes()
    own = certificate_request(renewal.identity.seed, "pi")
    later = time.time() + DAY_S
    wrong: dict[str, Callable[[], str]] = {
        "another key": lambda: pki.issue_device("pi", certificate_request(SEED, "pi"), later).pem,
        "another name": lambda: pki.issue_device("jetson", own, later).pem,
        "another fleet": lambda: a_pki(tmp_path / "other").issue_device("pi", own, later).pem,
        "older": lambda: pki.issue_device("pi", own, time.time() - DAY_S).pem,
        "junk": lambda: "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    }
    pem = wrong[whose]()
    with pytest.raises(ProtocolError):
        renewal.install(pem)
    assert (folder / "device.pem").read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == [
        "ca.pem",
        "device.key",
        "device.pem",
        "operator.pub",
    ]


def test_the_same_certificate_twice_does_nothing_the_second_time(folder: Path) -> None:
    renewal = a_renewal(folder)
    stamp = (folder / "device.pem").stat().st_ino
    renewal.install((folder / "device.pem").read_text())
    assert (folder / "device.pem").stat().st_ino == stamp
