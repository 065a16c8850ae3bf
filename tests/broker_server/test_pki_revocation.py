"""The list of what is revoked: what comes onto it, and who believes it."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519

from broker_server.pki import FleetPki
from tests.support.pki import make_pki, revocation_list, signing_request
from wire_protocol.errors import ConfigError, Refused

NOW = 1_800_000_000.0
REQUEST = signing_request(ed25519.Ed25519PrivateKey.generate())


@pytest.fixture
def pki(tmp_path: Path) -> FleetPki:
    return make_pki(tmp_path / "pki", now=NOW)


def test_revoking_a_name_revokes_all_its_certificates(pki: FleetPki) -> None:
    first, second = (pki.issue_device("pi-1", REQUEST, NOW) for _ in range(2))
    other = pki.issue_device("pi-2", REQUEST, NOW)
    pki.verify_device(first.pem, NOW)
    assert [r.serial for r in pki.revoke("pi-1", NOW + 1)] == [first.serial, second.serial]
    for issued in (first, second):
        with pytest.raises(Refused, match="revoked"):
            pki.verify_device(issued.pem, NOW + 1)
    assert pki.verify_device(other.pem, NOW + 1).name == "pi-2"
    assert {entry.serial_number for entry in revocation_list(pki)} == {first.serial, second.serial}
    assert pki.revoke("pi-1", NOW + 2) == []


def test_revoking_a_serial_leaves_the_device_s_other_certificates(pki: FleetPki) -> None:
    old, new = (pki.issue_device("pi-1", REQUEST, NOW) for _ in range(2))
    pki.revoke(f"{old.serial:x}", NOW)
    assert pki.is_revoked(old.serial)
    assert not pki.is_revoked(new.serial)


def test_what_is_unknown_or_in_use_is_not_revoked(pki: FleetPki) -> None:
    with pytest.raises(ConfigError, match="nobody"):
        pki.revoke("nobody", NOW)
    with pytest.raises(ConfigError, match="in use by this server"):
        pki.revoke("legend-server-lab", NOW)
    assert not pki.revoked()


def test_every_list_is_later_than_the_one_before(pki: FleetPki) -> None:
    # OpenSSL, given two lists of the same second, believes the first.
    before = revocation_list(pki)
    for name in ("pi-1", "pi-2", "pi-3"):
        pki.issue_device(name, REQUEST, NOW)
        pki.revoke(name, NOW)
        after = revocation_list(pki)
        assert after.last_update_utc > before.last_update_utc
        assert len(after) == len(before) + 1
        before = after


def test_openssl_believes_what_was_signed(pki: FleetPki, tmp_path: Path) -> None:
    for name in ("good", "bad"):
        issued = pki.issue_device(name, REQUEST, NOW)
        (tmp_path / f"{name}.pem").write_text(issued.pem)
    pki.revoke("bad", NOW)
    command = ["openssl", "verify", "-x509_strict", "-crl_check", "-attime", str(int(NOW))]
    command += ["-CAfile", str(pki.ca_file), "-CRLfile", str(pki.crl_file)]
    for path, fine in (
        (tmp_path / "good.pem", True),
        (tmp_path / "bad.pem", False),
        (pki.pair("server").certificate, True),
        (pki.pair("broker").certificate, True),
    ):
        done = subprocess.run([*command, str(path)], capture_output=True, text=True, check=False)
        assert (done.returncode == 0) is fine, done.stderr


def test_revocation_survives_a_restart_and_is_seen_by_others(pki: FleetPki) -> None:
    other = FleetPki(pki.folder)
    issued = pki.issue_device("pi-1", REQUEST, NOW)
    assert not other.is_revoked(issued.serial)
    pki.revoke("pi-1", NOW)
    assert other.is_revoked(issued.serial)
    assert FleetPki(pki.folder).is_revoked(issued.serial)
    (record,) = [r for r in other.records() if r.name == "pi-1"]
    assert record.revoked_at == NOW


def test_a_list_from_elsewhere_counts(pki: FleetPki, tmp_path: Path) -> None:
    elsewhere = FleetPki(shutil.copytree(pki.folder, tmp_path / "elsewhere"))
    (pki.folder / "ca.key").unlink()
    issued = elsewhere.issue_device("pi-1", REQUEST, NOW)
    assert pki.verify_device(issued.pem, NOW).name == "pi-1"
    elsewhere.revoke("pi-1", NOW)
    pki.crl_file.write_bytes(elsewhere.crl_file.read_bytes())
    with pytest.raises(Refused, match="revoked"):
        pki.verify_device(issued.pem, NOW)


def test_a_list_of_another_authority_is_an_error(pki: FleetPki, tmp_path: Path) -> None:
    foreign = make_pki(tmp_path / "foreign", now=NOW)
    pki.crl_file.write_bytes(foreign.crl_file.read_bytes())
    with pytest.raises(ConfigError, match="not signed by this fleet's authority"):
        pki.is_revoked(1)


def test_a_revocation_whose_list_was_not_written_is_completed(pki: FleetPki) -> None:
    issued = pki.issue_device("pi-1", REQUEST, NOW)
    with (pki.folder / "issued.jsonl").open("a") as file:
        file.write(json.dumps({"serial": f"{issued.serial:x}", "revoked_at": NOW}) + "\n")
    assert pki.is_revoked(issued.serial)
    assert not len(revocation_list(pki))
    FleetPki(pki.folder).prepare_to_serve(NOW)
    assert [entry.serial_number for entry in revocation_list(pki)] == [issued.serial]
