"""The server's signing key on disk, and whom the server believes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from broker_server.cli import main
from broker_server.signing_keys import (
    OPERATOR_KEY,
    OPERATOR_PUBLIC_KEY,
    SERVER_KEY,
    load_or_make,
    renew,
)
from broker_server.voice import DeviceVoices
from tests.support.messages import a_birth
from wire_protocol.errors import ConfigError, ProtocolError, Refused
from wire_protocol.messages import encode_message
from wire_protocol.signed import Signer, read_statement
from wire_protocol.topics import Channel

DEVICE = Signer(bytes([4]) * 32, voucher="the certificate of nano-1")
MESSAGE = encode_message(a_birth(), message_id="m1", sid=1)


def check(certificate: str) -> tuple[str, str]:
    """Stands for the certificate authority, which has tests of its own."""
    if certificate != DEVICE.voucher:
        raise Refused("revoked")
    return "nano-1", DEVICE.public_key


def test_the_first_start_makes_keys_and_later_ones_find_them(tmp_path: Path) -> None:
    first = load_or_make(tmp_path / "signing", "home")
    again = load_or_make(tmp_path / "signing", "home")
    assert again == first
    statement = read_statement(first.server.voucher, operator_key=first.operator_key)
    assert (statement.fleet, statement.number) == ("home", first.number)
    assert statement.server_key == first.server.public_key


def test_no_key_is_readable_by_others_or_shown_in_a_repr(tmp_path: Path) -> None:
    keys = load_or_make(tmp_path, "home")
    for name in (OPERATOR_KEY, SERVER_KEY):
        assert (tmp_path / name).stat().st_mode & 0o077 == 0
    assert keys.server.seed.hex() not in repr(keys)
    assert repr(keys.server.seed) not in repr(keys)


def test_a_renewed_key_has_the_same_operator_and_a_higher_number(tmp_path: Path) -> None:
    first = load_or_make(tmp_path, "home")
    second = renew(tmp_path, "home", operator_key_file=tmp_path / OPERATOR_KEY)
    assert second.operator_key == first.operator_key
    assert second.server.public_key != first.server.public_key
    assert second.number > first.number
    assert load_or_make(tmp_path, "home") == second


def test_the_operator_key_may_lie_elsewhere(tmp_path: Path) -> None:
    keys = load_or_make(tmp_path, "home")
    (tmp_path / OPERATOR_KEY).rename(tmp_path / "usb.key")
    assert load_or_make(tmp_path, "home") == keys
    with pytest.raises(ConfigError, match="is not here"):
        renew(tmp_path, "home", operator_key_file=tmp_path / OPERATOR_KEY)
    assert renew(tmp_path, "home", operator_key_file=tmp_path / "usb.key").number > keys.number


def test_a_key_made_anew_replaces_one_that_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = load_or_make(tmp_path, "home")
    (tmp_path / SERVER_KEY).unlink()
    monkeypatch.setattr("time.time", lambda: float(lost.number + 60))
    assert load_or_make(tmp_path, "home").number > lost.number


def test_a_fleet_whose_operator_key_is_elsewhere_does_not_get_another(tmp_path: Path) -> None:
    keys = load_or_make(tmp_path / "made", "home")
    (tmp_path / OPERATOR_PUBLIC_KEY).write_text(keys.operator_key)
    with pytest.raises(ConfigError, match="kept elsewhere"):
        load_or_make(tmp_path, "home")
    assert not (tmp_path / OPERATOR_KEY).exists()


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"seed":"zz","voucher":""}', "\x00"])
def test_a_damaged_key_is_an_error_that_says_which_file(tmp_path: Path, content: str) -> None:
    load_or_make(tmp_path, "home")
    (tmp_path / SERVER_KEY).write_text(content)
    with pytest.raises(ConfigError, match=r"server-signing\.json is damaged"):
        load_or_make(tmp_path, "home")


def test_the_key_of_another_fleet_is_an_error(tmp_path: Path) -> None:
    load_or_make(tmp_path, "home")
    with pytest.raises(ConfigError, match="for fleet 'home'"):
        load_or_make(tmp_path, "office")


def test_what_a_device_signed_with_its_certificates_key_is_believed() -> None:
    voices = DeviceVoices(check)
    assert voices.open("nano-1", Channel.UPDATE, DEVICE.sign(MESSAGE)) == MESSAGE


def test_a_heartbeat_needs_no_signature() -> None:
    assert DeviceVoices(check).open("nano-1", Channel.HEARTBEAT, MESSAGE) == MESSAGE


def test_without_identities_nothing_is_signed() -> None:
    assert DeviceVoices().open("nano-1", Channel.UPDATE, MESSAGE) == MESSAGE


def _tampered() -> bytes:
    signed = json.loads(DEVICE.sign(MESSAGE))
    signed["text"] += " "
    return json.dumps(signed).encode()


@pytest.mark.parametrize(
    ("device_id", "payload", "because"),
    [
        ("nano-1", MESSAGE, "not signed"),
        ("nano-1", _tampered(), "signature is wrong"),
        ("nano-2", DEVICE.sign(MESSAGE), "signed by 'nano-1'"),
        ("nano-1", Signer(DEVICE.seed, "another").sign(MESSAGE), "not accepted: revoked"),
        ("nano-1", Signer(bytes([8]) * 32, DEVICE.voucher).sign(MESSAGE), "another key"),
    ],
)
def test_a_forged_message_is_refused(device_id: str, payload: bytes, because: str) -> None:
    with pytest.raises(ProtocolError, match=because):
        DeviceVoices(check).open(device_id, Channel.UPDATE, payload)


def test_the_command_line_shows_and_renews_the_key_and_never_prints_a_secret(
    tmp_path: Path,
) -> None:
    settings = tmp_path / "settings.yml"
    settings.write_text(f"fleet: home\nstate_dir: {tmp_path / 'state'}\n")
    run = CliRunner().invoke

    def numbers(*arguments: str) -> dict[str, object]:
        answer = run(main, ["signing-key", *arguments, "--settings", str(settings), "--json"])
        assert answer.exit_code == 0, answer.output
        for name in (OPERATOR_KEY, SERVER_KEY):
            text = (tmp_path / "state" / "signing" / name).read_text()
            seed = json.loads(text)["seed"] if name == SERVER_KEY else text.strip()
            assert seed not in answer.output
        return dict(json.loads(answer.output))

    first, second = numbers("show"), numbers("renew")
    assert int(str(second["number"])) > int(str(first["number"]))
    assert first["operator_key"] == second["operator_key"]
    assert first["server_key"] != second["server_key"]
    missing = ["signing-key", "renew", "--settings", str(settings), "--operator-key", "nowhere"]
    answer = run(main, missing)
    assert answer.exit_code == 78
    assert "is not here" in answer.output
