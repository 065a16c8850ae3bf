"""The server's settings: one YAML file, overridden by ``BROKER_SERVER_...`` variables."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from wire_protocol.errors import ConfigError, ProtocolError
from wire_protocol.settings import Settings, parse_settings
from wire_protocol.topics import check_name

ENVIRONMENT_PREFIX = "BROKER_SERVER_"
DEFAULT_SETTINGS = Path("/etc/broker-server/settings.yml")


class BrokerSettings(Settings):
    """Which MQTT broker carries the messages.

    ``embedded`` serves devices on this machine only; for a fleet use
    ``mosquitto`` (a child of this server) or ``external``.
    """

    kind: Literal["embedded", "mosquitto", "external"] = "embedded"
    url: str | None = Field(
        None,
        pattern=r"^mqtts?://",
        repr=False,
        description="external only: mqtt://user:password@host:port",
    )
    host: str = Field("127.0.0.1", description="mosquitto only: address to listen on")
    port: int = Field(0, ge=0, le=65535, description="mosquitto only: 0 chooses a free port once")


class ServerSettings(Settings):
    """Everything that the server can be told."""

    fleet: str = Field("default", description="the fleet this server leads")
    state_dir: Path = Field(Path("/var/lib/broker-server"), description="what survives a restart")
    host: str = Field("127.0.0.1", description="address of the HTTP API")
    port: int = Field(8300, ge=0, le=65535, description="0 chooses a free port")
    token: str | None = Field(
        None, repr=False, description="required from everybody; needed off loopback"
    )
    pki: Path | None = Field(
        None, description="folder of the fleet's certificates; without one there is no TLS"
    )
    database: str | None = Field(None, repr=False, description="SQLAlchemy URL; default SQLite")
    broker: BrokerSettings = Field(default_factory=BrokerSettings)
    evaluation_threads: int = Field(1, ge=1, description="threads of the central evaluation")

    @field_validator("fleet")
    @classmethod
    def _can_stand_in_a_topic(cls, name: str) -> str:
        try:
            return check_name("fleet", name)
        except ProtocolError as error:
            raise ValueError(str(error)) from error


def load_settings(path: Path | None) -> ServerSettings:
    """Read the settings file and the environment.

    Args:
        path: None means the default file, which may be absent.

    Raises:
        ConfigError: the named file is missing or something in it is wrong.
    """
    chosen = path or DEFAULT_SETTINGS
    try:
        text = chosen.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        if path is not None:
            raise ConfigError(f"settings file {path} does not exist") from error
        text = ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"settings file {chosen} cannot be read: {error}") from error
    settings = parse_settings(
        ServerSettings, text, source=str(chosen), environ=os.environ, prefix=ENVIRONMENT_PREFIX
    )
    if settings.broker.kind == "external" and not settings.broker.url:
        raise ConfigError(f"{chosen}: broker.kind external needs broker.url")
    if not settings.token and settings.pki is None and not _is_loopback(settings.host):
        raise ConfigError(
            f"{chosen}: an API on {settings.host} needs a token or certificates; "
            "set 'token' or 'pki'"
        )
    return settings


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")
