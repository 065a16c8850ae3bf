"""Whom an enrolled device believes over TLS, and what it says when it does not."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from broker_server.pki import FleetPki
from edge_agent.fleet_tls import NO_CHECK_TIME
from edge_agent.identity import Identity
from tests.support.identities import DAY_S, a_pki, an_identity, loaded
from tests.support.tls_greeting import greeting, refusal, server_side, tls_server


@pytest.fixture
def pki(tmp_path: Path) -> FleetPki:
    return a_pki(tmp_path / "pki")


@pytest.fixture
def neglected_pki(tmp_path: Path) -> FleetPki:
    """The server's certificate lived ninety days, half a year ago."""
    return a_pki(tmp_path / "neglected", now=time.time() - 180 * DAY_S)


def identity_in(pki: FleetPki, tmp_path: Path) -> Identity:
    return loaded(an_identity(pki, tmp_path / "identity"))


def test_the_server_learns_who_it_is_and_its_own_name_is_checked(
    pki: FleetPki, tmp_path: Path
) -> None:
    identity = identity_in(pki, tmp_path)
    with tls_server(server_side(pki)) as port:
        assert greeting(identity, port)[0] == "pi"
        assert "for another name" in refusal(identity, port, "elsewhere.example")


def test_a_server_of_another_authority_is_not_believed(pki: FleetPki, tmp_path: Path) -> None:
    stranger = a_pki(tmp_path / "stranger")
    identity = identity_in(pki, tmp_path)
    with tls_server(server_side(stranger)) as port:
        assert "an authority that is not believed" in refusal(identity, port)


def test_a_server_that_does_not_accept_the_certificate_is_understood(
    pki: FleetPki, tmp_path: Path
) -> None:
    identity = identity_in(pki, tmp_path)
    expired = an_identity(pki, tmp_path / "old", now=time.time() - 91 * DAY_S)
    identity.context.load_cert_chain(expired / "device.pem", expired / "device.key")
    with tls_server(server_side(pki)) as port:
        assert "this device's certificate has expired" in refusal(identity, port)


def test_a_server_certificate_from_the_future_proves_the_clock_wrong_and_is_then_believed(
    pki: FleetPki, tmp_path: Path
) -> None:
    identity = identity_in(pki, tmp_path)
    # The device's clock is right here; so the server's certificate is made tomorrow.
    pki.renew_service("server", time.time() + DAY_S)
    with tls_server(server_side(pki)) as port:
        assert "clock is behind" in refusal(identity, port)
        assert greeting(identity, port)[0] == "pi"


def test_a_wrong_clock_does_not_make_an_expired_server_certificate_good(
    neglected_pki: FleetPki, tmp_path: Path
) -> None:
    identity = identity_in(neglected_pki, tmp_path)
    identity.context.distrust_clock()
    with tls_server(server_side(neglected_pki)) as port:
        assert "the server's certificate has expired" in refusal(identity, port)


def test_only_a_certificate_from_the_future_makes_the_clock_distrusted(
    neglected_pki: FleetPki, tmp_path: Path
) -> None:
    identity = identity_in(neglected_pki, tmp_path)
    with tls_server(server_side(neglected_pki)) as port:
        for name in ("localhost", "elsewhere.example"):
            assert "the server's certificate" in refusal(identity, port, name)
    assert not identity.context.clock_is_behind


def test_a_clock_before_the_own_certificate_is_distrusted_from_the_start(
    pki: FleetPki, tmp_path: Path
) -> None:
    ahead = an_identity(pki, tmp_path / "ahead", now=time.time() + 5 * DAY_S)
    assert loaded(ahead).context.verify_flags & NO_CHECK_TIME
