"""``broker-server pki`` as a person types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.asymmetric import ed25519

from broker_server.cli import main
from broker_server.pki import FleetPki
from tests.support.pki import signing_request


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = pki(tmp_path / "pki", "init", "--fleet", "lab", "--host", "edge.example")
    assert made.exit_code == 0, made.output
    return tmp_path / "pki"


@pytest.fixture
def csr(tmp_path: Path) -> Path:
    path = tmp_path / "device.csr"
    path.write_text(signing_request(ed25519.Ed25519PrivateKey.generate()))
    return path


def pki(folder: Path, command: str, *arguments: str, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(main, ["pki", command, "--pki", str(folder), *arguments], stdin)


def fails(result: Result, exit_code: int, words: str) -> None:
    """One line on stderr, with this exit code."""
    assert result.exit_code == exit_code, result.output
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert not result.stdout


def test_init_says_what_to_do_next_and_may_be_repeated(folder: Path) -> None:
    again = pki(folder, "init", "--fleet", "lab")
    assert f"set 'pki: {folder}'" in again.stdout
    opened = FleetPki(folder)
    assert opened.ca_fingerprint in again.stdout
    assert opened.operator_public_key in again.stdout
    assert "edge.example" in opened.hosts("broker")
    fails(pki(folder, "init", "--fleet", "other"), 78, "holds the authority of fleet 'lab'")


def test_the_folder_comes_from_the_settings(folder: Path, tmp_path: Path) -> None:
    settings = tmp_path / "settings.yml"
    settings.write_text(f"fleet: lab\npki: {folder}\n")
    listed = CliRunner().invoke(main, ["pki", "list", "--settings", str(settings)])
    assert "legend-server-lab" in listed.stdout
    settings.write_text(f"fleet: lab\nstate_dir: {folder.parent}\n")
    listed = CliRunner().invoke(main, ["pki", "list", "--settings", str(settings)])
    assert "legend-server-lab" in listed.stdout


def test_a_device_s_certificate_goes_to_a_file_or_to_stdout(
    folder: Path, csr: Path, tmp_path: Path
) -> None:
    target = tmp_path / "device.pem"
    issued = pki(folder, "issue", "pi-1", "--csr", str(csr), "--out", str(target), "--days", "7")
    assert issued.stdout.startswith("issued pi-1 ")
    opened = FleetPki(folder)
    record = next(record for record in opened.records() if record.name == "pi-1")
    assert opened.verify_device(target.read_text(), record.not_after - 1).name == "pi-1"
    piped = pki(folder, "issue", "pi-2", "--csr", "-", stdin=csr.read_text())
    assert opened.verify_device(piped.stdout, record.not_after - 1).name == "pi-2"


def test_wrong_requests_and_names_are_one_line(folder: Path, csr: Path, tmp_path: Path) -> None:
    noise = tmp_path / "noise"
    noise.write_bytes(bytes(range(256)) * 1000)
    no_request = "not a certificate signing request"
    fails(pki(folder, "issue", "pi-1", "--csr", str(noise)), 76, no_request)
    noise.write_text("x" * 1_000_000)
    fails(pki(folder, "issue", "pi-1", "--csr", str(noise)), 76, "more than 16384")
    fails(pki(folder, "issue", "PI", "--csr", str(csr)), 76, "lower-case")
    fails(pki(folder, "issue", "legend-x", "--csr", str(csr)), 76, "reserved for servers")
    unwritable = tmp_path / "missing" / "device.pem"
    result = pki(folder, "issue", "pi-1", "--csr", str(csr), "--out", str(unwritable))
    fails(result, 78, "cannot write")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["pi-1"],
        ["pi-1", "--server"],
        ["--server", "--days", "3"],
        ["--broker", "--out", "x"],
    ],
)
def test_a_wrong_combination_is_a_usage_error(folder: Path, arguments: list[str]) -> None:
    result = pki(folder, "issue", *arguments)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr


def test_the_server_gets_other_hosts_and_is_renewed(folder: Path) -> None:
    assert pki(folder, "issue", "--server", "--host", "10.0.0.9").exit_code == 0
    renewed = pki(folder, "renew", "--server")
    assert renewed.stdout.count("issued") == 1
    assert "10.0.0.9" in FleetPki(folder).hosts("server")
    assert pki(folder, "renew").stdout.count("issued") == 2
    fails(pki(folder, "issue", "--broker", "--host", "a b"), 78, "no host name or address")


def test_revoking_is_said_and_listed(folder: Path, csr: Path) -> None:
    for name in ("pi-1", "pi-2"):
        pki(folder, "issue", name, "--csr", str(csr))
    first = pki(folder, "revoke", "pi-1").stdout
    lines = {line["name"]: line for line in json.loads(pki(folder, "list", "--json").stdout)}
    assert first == f"revoked pi-1 {lines['pi-1']['serial']}\n"
    assert lines["pi-1"]["state"] == "revoked"
    assert lines["pi-2"]["state"] == "valid"
    assert lines["pi-2"]["revoked_at"] is None
    assert pki(folder, "revoke", "pi-1").stdout == "pi-1 was revoked before\n"
    assert pki(folder, "revoke", lines["pi-2"]["serial"]).stdout.startswith("revoked pi-2")
    fails(pki(folder, "revoke", "nobody"), 78, "broker-server pki list")


def test_a_token_is_printed_alone(folder: Path) -> None:
    token = pki(folder, "token", "--device", "pi-1", "--ttl-s", "60").stdout
    secret, _, fingerprint = token.strip().partition(".")
    opened = FleetPki(folder)
    assert fingerprint == opened.ca_fingerprint
    assert opened.redeem_token(secret, "pi-1", 0.0).pre_authorised
    fails(pki(folder, "token", "--device", "legend-x"), 78, "reserved")


def test_without_an_authority_every_command_says_how_to_make_one(tmp_path: Path) -> None:
    for command, *arguments in (["list"], ["revoke", "x"], ["renew"], ["token"]):
        result = pki(tmp_path / "none", command, *arguments)
        fails(result, 78, "make one: broker-server pki init")
