"""Enrolment tokens: good once, for one device and one key."""

from __future__ import annotations

import hashlib
import re
import ssl
from pathlib import Path

import pytest

from broker_server.pki import FleetPki
from tests.support.pki import make_pki
from wire_protocol.errors import ProtocolError, Refused

NOW = 1_800_000_000.0


@pytest.fixture
def pki(tmp_path: Path) -> FleetPki:
    return make_pki(tmp_path / "pki", now=NOW)


def secret_of(token: str) -> str:
    return token.partition(".")[0]


def test_a_token_names_the_authority_that_the_device_must_find(pki: FleetPki) -> None:
    _, _, fingerprint = pki.create_token(NOW).partition(".")
    der = ssl.PEM_cert_to_DER_cert(pki.ca_file.read_text())
    assert fingerprint == hashlib.sha256(der).hexdigest()[:32]
    assert re.fullmatch(r"[A-Za-z0-9_-]{32}\.[0-9a-f]{32}", pki.create_token(NOW))


def test_a_token_is_used_up_by_the_first_device(pki: FleetPki) -> None:
    secret = secret_of(pki.create_token(NOW))
    grant = pki.redeem_token(secret, "pi-1", NOW, claim="key 1")
    assert grant.first_use
    assert not grant.pre_authorised
    with pytest.raises(Refused, match="has been used"):
        pki.redeem_token(secret, "pi-2", NOW, claim="key 1")
    with pytest.raises(Refused, match="has been used"):
        pki.redeem_token(secret, "pi-1", NOW, claim="key of a thief")


def test_its_user_may_ask_again_even_after_its_end(pki: FleetPki) -> None:
    secret = secret_of(pki.create_token(NOW, ttl_s=60))
    pki.redeem_token(secret, "pi-1", NOW, claim="key 1")
    again = pki.redeem_token(secret, "pi-1", NOW + 3600, claim="key 1")
    assert not again.first_use


def test_used_tokens_stay_used_after_a_restart(pki: FleetPki) -> None:
    secret = secret_of(pki.create_token(NOW))
    pki.redeem_token(secret, "pi-1", NOW)
    with pytest.raises(Refused, match="has been used"):
        FleetPki(pki.folder).redeem_token(secret, "pi-2", NOW)


def test_a_token_for_one_device_is_for_no_other_and_not_used_up_by_it(pki: FleetPki) -> None:
    secret = secret_of(pki.create_token(NOW, device_id="pi-1"))
    with pytest.raises(Refused, match="not for device pi-2"):
        pki.redeem_token(secret, "pi-2", NOW)
    assert pki.redeem_token(secret, "pi-1", NOW).pre_authorised


def test_an_expired_or_invented_token_is_refused(pki: FleetPki) -> None:
    secret = secret_of(pki.create_token(NOW, ttl_s=60))
    with pytest.raises(Refused, match="expired"):
        pki.redeem_token(secret, "pi-1", NOW + 60)
    for invented in ("invented", "", "\ud800"):
        with pytest.raises(Refused, match="unknown"):
            pki.redeem_token(invented, "pi-1", NOW)


def test_reserved_names_get_no_token(pki: FleetPki) -> None:
    with pytest.raises(ProtocolError, match="reserved"):
        pki.create_token(NOW, device_id="legend-server-lab")
    secret = secret_of(pki.create_token(NOW))
    with pytest.raises(ProtocolError, match="reserved"):
        pki.redeem_token(secret, "legend-server-lab", NOW)


def test_the_folder_does_not_hold_the_secret(pki: FleetPki) -> None:
    secret = secret_of(pki.create_token(NOW))
    assert not any(
        secret.encode() in path.read_bytes() for path in pki.folder.iterdir() if path.is_file()
    )
