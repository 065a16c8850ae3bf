"""The brokers that the server can run itself: their configuration files and command lines.

Text and arguments only; nothing is started here. Source of every setting:
rumqttd.toml of rumqttd 0.20; mosquitto.conf(5), mosquitto_passwd(1).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import pwd
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from broker_server.broker_address import Credentials
from wire_protocol.errors import ConfigError
from wire_protocol.topics import ROOT

LARGEST_PACKET_BYTES = 262_144
SERVER_USER = "server"
DEVICE_USER = "device"


@dataclass(frozen=True)
class Listener:
    """What a broker is to do.

    Attributes:
        host: address to listen on.
        port: TCP port.
        users: who may connect.
        folder: private to this broker; it may keep its files there.
    """

    host: str
    port: int
    users: tuple[Credentials, ...]
    folder: Path


class BrokerProgram(Protocol):
    """One kind of broker."""

    @property
    def name(self) -> str:
        """What people call it."""

    def files(self, listener: Listener) -> Mapping[str, str]:
        """Its configuration: text by file name, to be written into the folder."""

    def command(self, folder: Path) -> list[str]:
        """Arguments for ``broker_child.py``.

        Raises:
            ConfigError: the program is not installed.
        """


@dataclass(frozen=True)
class EmbeddedBroker:
    """rumqttd, from the iotcore wheel. For devices on this machine: it has no access rules."""

    name: str = "embedded broker"

    def files(self, listener: Listener) -> Mapping[str, str]:
        """Its one TOML file."""
        # A JSON string is also a TOML basic string.
        users = "\n".join(
            f"{json.dumps(user.username)} = {json.dumps(user.password)}" for user in listener.users
        )
        host = f"[{listener.host}]" if ":" in listener.host else listener.host
        text = f"""\
id = 0
[router]
id = 0
max_connections = 2000
max_outgoing_packet_count = 200
max_segment_size = 8388608
max_segment_count = 2
[v4.1]
name = "legend"
listen = "{host}:{listener.port}"
next_connection_delay_ms = 1
[v4.1.connections]
connection_timeout_ms = 10000
max_payload_size = {LARGEST_PACKET_BYTES}
max_inflight_count = 100
dynamic_filters = true
[v4.1.connections.auth]
{users}
"""
        return {"rumqttd.toml": text}

    def command(self, folder: Path) -> list[str]:
        """Run it inside the child itself."""
        if find_spec("iotcore") is None:
            raise ConfigError(
                "the embedded broker is not installed: pip install 'legend-edge[server]', "
                "or use mosquitto"
            )
        return ["embedded", str(folder / "rumqttd.toml")]


@dataclass(frozen=True)
class Mosquitto:
    """The mosquitto program of the system."""

    name: str = "mosquitto"

    def files(self, listener: Listener) -> Mapping[str, str]:
        """Configuration, passwords (hashed) and access rules."""
        folder = listener.folder
        text = f"""\
per_listener_settings false
listener {listener.port} {listener.host}
allow_anonymous false
password_file {folder / "passwords"}
acl_file {folder / "acl"}
log_type error
log_type warning
connection_messages false
{mosquitto_limits(folder)}"""
        passwords = "".join(
            f"{user.username}:{_password_hash(user.password)}\n" for user in listener.users
        )
        return {"mosquitto.conf": text, "passwords": passwords, "acl": _access_rules()}

    def command(self, folder: Path) -> list[str]:
        """Start the installed program."""
        return mosquitto_command(folder)


def mosquitto_command(folder: Path) -> list[str]:
    """Start the installed program with the folder's configuration.

    Raises:
        ConfigError: it is not installed.
    """
    # Debian installs it where only root's PATH looks.
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    executable = shutil.which("mosquitto", path=path)
    if executable is None:
        raise ConfigError(
            "mosquitto is not installed: apt install mosquitto (Debian package 'mosquitto'), "
            "or use the embedded broker"
        )
    return ["program", executable, "-c", str(folder / "mosquitto.conf")]


def mosquitto_limits(folder: Path) -> str:
    """The settings that do not depend on how clients prove who they are."""
    return f"""\
set_tcp_nodelay true
max_inflight_messages 20
max_queued_messages 100000
max_queued_bytes 67108864
max_packet_size {LARGEST_PACKET_BYTES}
persistence true
persistence_location {folder}/
autosave_interval 60
persistent_client_expiration 14d
max_keepalive 300
sys_interval 30
log_dest stderr
{_stay_this_user()}"""


def _stay_this_user() -> str:
    # As root, mosquitto would become user mosquitto, who may not read the private folder.
    return "" if os.getuid() != 0 else f"user {pwd.getpwuid(0).pw_name}\n"


def _password_hash(password: str) -> str:
    """The form of mosquitto_passwd's ``$7$``: PBKDF2 with SHA-512."""
    # 101 is mosquitto's own count. The passwords are 24 random bytes, beyond guessing anyway.
    iterations, salt = 101, secrets.token_bytes(12)
    digest = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, iterations)
    return f"$7${iterations}${_base64(salt)}${_base64(digest)}"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _access_rules() -> str:
    # Devices share one user here, so a device is known by its client id (%c).
    return f"""\
user {SERVER_USER}
topic readwrite {ROOT}/#
topic read $SYS/#

user {DEVICE_USER}
topic read {ROOT}/+/all/#

pattern write {ROOT}/+/d/%c/up/#
pattern read {ROOT}/+/d/%c/down/#
"""
