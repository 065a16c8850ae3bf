"""The fleet's authority: what it signs, what it refuses, and what a crash leaves."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from broker_server.pki import FleetPki
from broker_server.pki_x509 import (
    CERTIFICATE_S,
    DAY_S,
    common_name,
    key_of_request,
    read_certificate,
    read_device_certificate,
)
from tests.support.pki import make_pki, revocation_list, signing_request
from wire_protocol.durable import DIE_AT
from wire_protocol.errors import ConfigError, ProtocolError, Refused

NOW = 1_800_000_000.0
KEY = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
REQUEST = signing_request(KEY)


@pytest.fixture
def pki(tmp_path: Path) -> FleetPki:
    return make_pki(tmp_path / "pki", now=NOW)


def test_private_files_are_for_their_owner_only(pki: FleetPki) -> None:
    assert pki.folder.stat().st_mode & 0o777 == 0o700
    for path in pki.folder.iterdir():
        if path.suffix not in (".pem", ".pub"):
            assert path.stat().st_mode & 0o777 == 0o600, path
    assert {path.name for path in pki.folder.glob("*.key")} == {
        "ca.key", "server.key", "broker.key", "operator.key",
    }  # fmt: skip


def test_making_it_again_changes_nothing(pki: FleetPki) -> None:
    before = {path.name: path.read_bytes() for path in pki.folder.iterdir()}
    make_pki(pki.folder, now=NOW + 5)
    assert {path.name: path.read_bytes() for path in pki.folder.iterdir()} == before


def test_a_folder_is_for_one_fleet(pki: FleetPki) -> None:
    with pytest.raises(ConfigError, match="'lab'"):
        FleetPki.create(pki.folder, "other", [], NOW)


def test_the_operators_public_key_belongs_to_the_private_one(pki: FleetPki) -> None:
    private = ed25519.Ed25519PrivateKey.from_private_bytes(pki.operator_seed())
    assert private.public_key().public_bytes_raw().hex() == pki.operator_public_key
    (pki.folder / "operator.key").unlink()
    assert len(pki.operator_public_key) == 64
    with pytest.raises(ConfigError, match="where the operator's key is kept"):
        pki.operator_seed()


def test_a_device_is_named_by_us_and_not_by_its_request(pki: FleetPki) -> None:
    issued = pki.issue_device("pi-1", signing_request(KEY, "legend-server-lab"), NOW)
    assert common_name(read_certificate(issued.pem)) == "pi-1"
    identity = pki.verify_device(issued.pem, NOW)
    assert identity.name == "pi-1"
    assert identity.serial == issued.serial
    assert identity.public_key == KEY.public_key().public_bytes_raw().hex()


def test_a_device_may_have_a_p256_key_but_then_signs_nothing(pki: FleetPki) -> None:
    request = signing_request(ec.generate_private_key(ec.SECP256R1()))
    issued = pki.issue_device("pi-1", request, NOW)
    with pytest.raises(Refused, match="Ed25519"):
        pki.verify_device(issued.pem, NOW)


@pytest.mark.parametrize("name", ["legend-server-lab", "legend-x", "PI", "a/b", "+", "#", "", "-a"])
def test_names_that_would_give_rights_are_refused(pki: FleetPki, name: str) -> None:
    with pytest.raises(ProtocolError):
        pki.issue_device(name, REQUEST, NOW)
    assert len(pki.records()) == 2


def _rsa_request() -> str:
    key = rsa.generate_private_key(65537, 2048)
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, SHA256()).public_bytes(Encoding.PEM).decode()


def _tampered_request() -> str:
    der = bytearray(x509.load_pem_x509_csr(REQUEST.encode()).public_bytes(Encoding.DER))
    der[der.index(KEY.public_key().public_bytes_raw())] ^= 1
    return x509.load_der_x509_csr(bytes(der)).public_bytes(Encoding.PEM).decode()


@pytest.mark.parametrize(
    ("request_pem", "complaint"),
    [
        ("", "not a certificate signing request"),
        ("garbage \ud800", "not a certificate signing request"),
        (REQUEST[:-60], "not a certificate signing request"),
        (REQUEST.replace("M", "N", 1), "not a certificate signing request"),
        (REQUEST + "x" * 20_000, "more than 16384"),
        (_rsa_request(), "Ed25519 or P-256"),
        (signing_request(ec.generate_private_key(ec.SECP384R1())), "Ed25519 or P-256"),
        (_tampered_request(), "not signed by its own key"),
    ],
)
def test_a_bad_request_is_one_line(pki: FleetPki, request_pem: str, complaint: str) -> None:
    with pytest.raises(ProtocolError, match=complaint) as caught:
        pki.issue_device("pi-1", request_pem, NOW)
    assert "\n" not in str(caught.value)


@given(st.text() | st.binary().map(lambda noise: REQUEST[:40] + noise.hex() + REQUEST[80:]))
def test_noise_is_a_protocol_error_and_nothing_else(noise: str) -> None:
    with pytest.raises(ProtocolError):
        key_of_request(noise)
    with pytest.raises(ProtocolError):
        read_certificate(noise)


def test_a_foreign_authority_of_the_same_name_certifies_nobody(
    pki: FleetPki, tmp_path: Path
) -> None:
    foreign = make_pki(tmp_path / "foreign", now=NOW)
    issued = foreign.issue_device("pi-1", REQUEST, NOW)
    with pytest.raises(Refused, match="this fleet's authority"):
        pki.verify_device(issued.pem, NOW)


def test_a_certificate_ends(pki: FleetPki) -> None:
    issued = pki.issue_device("pi-1", REQUEST, NOW)
    pki.verify_device(issued.pem, NOW + CERTIFICATE_S - 1)
    with pytest.raises(Refused, match="expired"):
        pki.verify_device(issued.pem, NOW + CERTIFICATE_S)


def test_a_certificate_ends_with_its_authority_at_the_latest(pki: FleetPki) -> None:
    late = NOW + 3640 * DAY_S
    issued = pki.issue_device("pi-1", REQUEST, late)
    assert issued.not_after == NOW + 3650 * DAY_S


@pytest.mark.parametrize("service", ["ca", "server", "broker"])
def test_other_certificates_of_the_fleet_are_no_device(pki: FleetPki, service: str) -> None:
    with pytest.raises(Refused, match="not one of a device"):
        pki.verify_device((pki.folder / f"{service}.pem").read_text(), NOW)


def test_what_takes_a_session_over_cannot_sign(pki: FleetPki) -> None:
    certificate, _key = pki.takeover("pi-1", NOW)
    with pytest.raises(Refused, match="Ed25519"):
        pki.verify_device(certificate, NOW)


def test_without_the_authority_s_key_nothing_is_signed_and_the_rest_works(
    pki: FleetPki, tmp_path: Path
) -> None:
    issued = pki.issue_device("pi-1", REQUEST, NOW)
    (pki.folder / "ca.key").rename(tmp_path / "ca.key")
    assert not pki.can_issue
    for attempt in (
        lambda: pki.issue_device("pi-2", REQUEST, NOW),
        lambda: pki.revoke("pi-1", NOW),
        lambda: pki.renew_service("server", NOW),
        lambda: pki.takeover("pi-1", NOW),
    ):
        with pytest.raises(ConfigError, match="where the authority's key is kept"):
            attempt()
    pki.prepare_to_serve(NOW)
    assert pki.verify_device(issued.pem, NOW).name == "pi-1"


def test_a_service_keeps_its_key_and_its_hosts_when_it_is_renewed(tmp_path: Path) -> None:
    pki = FleetPki.create(tmp_path / "pki", "lab", ["edge.example", "10.0.0.1"], NOW)
    key = pki.pair("server").key.read_bytes()
    later = NOW + 70 * DAY_S
    assert pki.due(NOW) == []
    assert pki.due(later) == ["server", "broker"]
    issued = pki.renew_service("server", later)
    assert issued.not_after == later + CERTIFICATE_S
    assert pki.due(later) == ["broker"]
    assert pki.pair("server").key.read_bytes() == key
    assert set(pki.hosts("server")) == {
        "edge.example", "10.0.0.1", "localhost", "127.0.0.1", "::1",
    }  # fmt: skip


@pytest.mark.parametrize("host", ["a b", "", "ümlaut.example", "http://x", "x:80"])
def test_a_host_that_is_none_is_a_configuration_error(pki: FleetPki, host: str) -> None:
    with pytest.raises(ConfigError, match="host name or address"):
        pki.issue_service("server", [host], NOW)


def test_a_server_that_slept_through_its_end_is_renewed(pki: FleetPki) -> None:
    later = NOW + 100 * DAY_S
    pki.prepare_to_serve(later)
    assert pki.due(later) == []
    (pki.folder / "ca.key").unlink()
    with pytest.raises(ConfigError, match=r"server\.pem has expired"):
        pki.prepare_to_serve(later + 100 * DAY_S)


def test_a_key_of_another_certificate_is_named(pki: FleetPki) -> None:
    pki.pair("server").key.write_bytes(pki.pair("broker").key.read_bytes())
    with pytest.raises(ConfigError, match=r"server\.key does not belong"):
        pki.prepare_to_serve(NOW)


@pytest.mark.parametrize("name", ["ca.pem", "server.pem", "crl.pem", "broker.key"])
def test_a_missing_or_damaged_file_is_named(pki: FleetPki, name: str) -> None:
    (pki.folder / "ca.key").unlink()
    for damage in ((pki.folder / name).write_text, lambda _text: (pki.folder / name).unlink()):
        damage("not PEM")
        with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
            FleetPki(pki.folder).prepare_to_serve(NOW)


def test_a_half_written_record_is_forgotten_and_a_damaged_one_is_an_error(pki: FleetPki) -> None:
    path = pki.folder / "issued.jsonl"
    with path.open("a") as file:
        file.write('{"serial": "ab", "name": "ha')
    assert len(pki.records()) == 2
    pki.issue_device("pi-1", REQUEST, NOW)
    assert [record.name for record in FleetPki(pki.folder).records()][2:] == ["pi-1"]
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(ConfigError, match="line 1 is damaged"):
        pki.records()


CREATES = """
import sys
from pathlib import Path
from broker_server.pki import FleetPki
FleetPki.create(Path(sys.argv[1]), "lab", ["edge.example"], float(sys.argv[2]))
"""


@pytest.mark.parametrize(
    "point",
    [
        "server.pki_key/half",
        "server.pki_key/done",
        "server.pki_key/written#3",
        "server.pki_key/done#4",
        "server.pki_key/done#5",
        "server.pki_certificate/half",
        "server.pki_certificate/done",
        "server.pki_certificate/written#2",
        "server.pki_crl/half",
        "server.pki_crl/done",
        "server.pki_issued/half",
        "server.pki_issued/done",
        "server.pki_issued/half#2",
    ],
)
def test_making_it_can_be_killed_anywhere_and_done_again(tmp_path: Path, point: str) -> None:
    folder = tmp_path / "pki"
    command = [sys.executable, "-c", CREATES, str(folder), str(NOW)]
    killed = subprocess.run(command, env={**os.environ, DIE_AT: point}, check=False)
    assert killed.returncode == -9, point
    pki = FleetPki.create(folder, "lab", ["edge.example"], NOW)
    pki.prepare_to_serve(NOW)
    pki.verify_device(pki.issue_device("pi-1", REQUEST, NOW).pem, NOW)
    for certificate in (pki.folder / "server.pem", pki.folder / "broker.pem"):
        serial = read_certificate(certificate.read_text()).serial_number
        assert serial in {record.serial for record in pki.records()}


def test_two_at_work_in_one_folder_lose_nothing(pki: FleetPki) -> None:
    def work(own: FleetPki, prefix: str) -> None:
        for number in range(5):
            own.issue_device(f"{prefix}-{number}", REQUEST, NOW)
            own.revoke(f"{prefix}-{number}", NOW)

    threads = [
        threading.Thread(target=work, args=(FleetPki(pki.folder), prefix)) for prefix in "abc"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    serials = {record.serial for record in pki.records() if record.kind == "device"}
    assert len(serials) == 15
    assert {entry.serial_number for entry in revocation_list(pki)} == serials


def test_text_that_is_no_unicode_is_no_certificate(pki: FleetPki) -> None:
    with pytest.raises(ProtocolError, match="not a certificate"):
        pki.verify_device("\ud800", NOW)


def test_reading_a_certificate_needs_no_folder(pki: FleetPki) -> None:
    issued = pki.issue_device("pi-1", REQUEST, NOW)
    authority = read_certificate(pki.ca_pem)
    assert read_device_certificate(issued.pem, authority).serial == issued.serial
