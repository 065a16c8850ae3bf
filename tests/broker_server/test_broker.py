"""Broker settings, addresses and configuration files; nothing is started here."""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from broker_server.broker import ChildBroker, ExternalBroker, open_broker, parse_broker_url
from broker_server.broker_address import BrokerAddress, Credentials
from broker_server.broker_process import BrokerProcess
from broker_server.broker_programs import EmbeddedBroker, Listener, Mosquitto
from wire_protocol.errors import BrokerUnavailable, ConfigError

USERS = (Credentials("server", 's3cret"\\'), Credentials("device", "other"))


def listener(folder: Path) -> Listener:
    return Listener("127.0.0.1", 1883, USERS, folder)


def test_a_url_is_read_with_its_escaped_password() -> None:
    address = parse_broker_url("mqtts://fleet:p%40ss%2Fword@broker.example:8884")
    assert address == BrokerAddress(
        "broker.example", 8884, server_credentials=Credentials("fleet", "p@ss/word"), tls=True
    )


@pytest.mark.parametrize(("url", "port"), [("mqtt://b", 1883), ("mqtts://b/", 8883)])
def test_a_url_without_port_means_the_usual_one(url: str, port: int) -> None:
    assert parse_broker_url(url).port == port
    assert parse_broker_url(url).server_credentials is None


@pytest.mark.parametrize(
    "url", ["http://b", "mqtt://", "mqtt://b:99999", "mqtt://b:port", "mqtt://b/topic", "mqtt:b"]
)
def test_a_wrong_url_is_a_configuration_error(url: str) -> None:
    with pytest.raises(ConfigError):
        parse_broker_url(url)


def test_passwords_show_in_no_text() -> None:
    address = parse_broker_url("mqtt://fleet:hidden@localhost")
    assert "hidden" not in f"{address!r} {address} {address.url}"
    with pytest.raises(ConfigError) as caught:
        parse_broker_url("http://fleet:hidden@localhost")
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize(
    ("host", "loopback"), [("localhost", True), ("127.0.0.5", True), ("[::1]", True), ("b", False)]
)
def test_loopback_is_recognised(host: str, loopback: bool) -> None:
    assert parse_broker_url(f"mqtt://{host}").loopback_only is loopback


def test_the_broker_setting_names_one_of_three(tmp_path: Path) -> None:
    assert isinstance(open_broker("embedded", state_dir=tmp_path), ChildBroker)
    assert isinstance(open_broker("mosquitto", state_dir=tmp_path), ChildBroker)
    assert isinstance(open_broker("mqtt://b", state_dir=tmp_path), ExternalBroker)
    with pytest.raises(ConfigError, match="emqx"):
        open_broker("emqx", state_dir=tmp_path)


def test_the_embedded_broker_never_listens_to_the_network(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mosquitto"):
        open_broker("embedded", state_dir=tmp_path, host="0.0.0.0")


def test_the_embedded_configuration_is_toml_with_escaped_passwords(tmp_path: Path) -> None:
    tomllib = pytest.importorskip("tomllib")
    (text,) = EmbeddedBroker().files(listener(tmp_path)).values()
    server = tomllib.loads(text)["v4"]["1"]
    assert server["listen"] == "127.0.0.1:1883"
    assert server["connections"]["auth"] == {user.username: user.password for user in USERS}


def test_mosquitto_gets_hashes_and_not_passwords(tmp_path: Path) -> None:
    files = Mosquitto().files(listener(tmp_path))
    assert not any(user.password in text for user in USERS for text in files.values())
    name, _, stored = files["passwords"].splitlines()[0].partition(":")
    _, kind, rounds, salt, digest = stored.split("$")
    assert (name, kind) == ("server", "7")
    expected = hashlib.pbkdf2_hmac(
        "sha512", USERS[0].password.encode(), base64.b64decode(salt), int(rounds)
    )
    assert base64.b64decode(digest) == expected


def test_devices_may_write_only_below_their_own_name(tmp_path: Path) -> None:
    rules = Mosquitto().files(listener(tmp_path))["acl"].splitlines()
    device_rules = rules[rules.index("user device") :]
    writable = [rule for rule in device_rules if "write" in rule]
    assert len(writable) == 1
    assert writable[0].endswith("/d/%c/up/#")


def test_a_missing_mosquitto_names_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_args, **_options: None)
    with pytest.raises(ConfigError, match="apt install mosquitto"):
        Mosquitto().command(tmp_path)


def test_an_external_broker_that_is_not_there_is_unavailable() -> None:
    broker = ExternalBroker(parse_broker_url("mqtt://127.0.0.1:1"))
    with pytest.raises(BrokerUnavailable, match=r"mqtt://127\.0\.0\.1:1"):
        broker.start()


def test_damaged_settings_say_which_file_to_delete(tmp_path: Path) -> None:
    (tmp_path / "broker").mkdir()
    (tmp_path / "broker" / "broker.json").write_text("{")
    with pytest.raises(ConfigError, match=r"broker\.json"):
        open_broker("embedded", state_dir=tmp_path).start()


def test_a_process_that_merely_has_the_old_number_is_left_alone(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE
    ) as stranger:
        (tmp_path / "pid").write_text(f"{stranger.pid}\n")
        assert not BrokerProcess(tmp_path).end_orphan()
        assert stranger.poll() is None
        stranger.kill()
