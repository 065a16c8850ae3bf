"""Finding the broker: from the settings, or by asking the server over HTTP."""

from __future__ import annotations

import random
import ssl
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

import anyio
import structlog

from edge_agent.backoff import full_jitter
from edge_agent.blobs import BlobClient
from edge_agent.identity import Identity
from edge_agent.mqtt import BrokerLogin
from edge_agent.settings import AgentSettings
from wire_protocol.errors import ConfigError, Refused, ServerUnavailable
from wire_protocol.messages import PROTOCOL_VERSION

log = structlog.get_logger()

FIRST_RETRY_S = 1.0
LONGEST_RETRY_S = 60.0


@dataclass(frozen=True)
class Joined:
    """What the server told about itself.

    Attributes:
        broker: where the broker is, and how to get in.
        operator_key: public key in hex of whoever says which key is the server's; None when the
            settings name the broker and nobody was asked.
        certificate_left_s: for how many seconds more the server takes this device's certificate;
            None when nobody was asked, or it showed none.
    """

    broker: BrokerLogin
    operator_key: str | None
    certificate_left_s: float | None = None


async def find_broker(
    settings: AgentSettings,
    server: BlobClient,
    rng: random.Random,
    identity: Identity | None = None,
) -> Joined:
    """Say where the broker is; waits for a server that is not up yet.

    With an identity its operator key is the one that counts, whatever the server says.

    Raises:
        ConfigError: the address makes no sense.
        Refused: the server does not take this device in, and why.
    """
    attempt = 0
    while True:
        try:
            return await find_broker_once(settings, server, identity)
        except ServerUnavailable as error:
            delay_s = full_jitter(attempt, base_s=FIRST_RETRY_S, cap_s=LONGEST_RETRY_S, rng=rng)
            log.warning("server_not_reached", error=str(error), retry_in_s=round(delay_s, 1))
            attempt += 1
            await anyio.sleep(delay_s)


async def find_broker_once(
    settings: AgentSettings, server: BlobClient, identity: Identity | None = None
) -> Joined:
    """The same without waiting.

    Raises:
        ServerUnavailable: the server does not answer.
    """
    pinned = identity.operator_key.hex() if identity else None
    if settings.broker:
        return Joined(login_from_url(settings.broker, identity), pinned)
    answer = await server.get_json(f"/v1/join?device_id={settings.device_id}")
    if PROTOCOL_VERSION not in answer.get("protocol", ()):
        raise Refused(
            f"the server speaks protocol {answer.get('protocol')}, this agent {PROTOCOL_VERSION}; "
            "update the older one"
        )
    if answer.get("fleet") != settings.fleet:
        raise Refused(
            f"the server leads fleet {answer.get('fleet')!r}, this device belongs to "
            f"{settings.fleet!r}; set 'fleet' in the settings"
        )
    left_s = answer.get("certificate_left_s")
    return Joined(
        login_from_url(str(answer["broker_url"]), identity),
        pinned or str(answer["operator_key"]),
        float(left_s) if isinstance(left_s, (int, float)) else None,
    )


def login_from_url(url: str, identity: Identity | None = None) -> BrokerLogin:
    """Read ``mqtt://user:password@host:port`` (or mqtts).

    Raises:
        ConfigError: no host, a port that is no number, or no TLS for a device with an identity.
    """
    parts = urlsplit(url)
    try:
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError("the broker's port is not a number; use mqtt://host:1883") from error
    if parts.scheme not in ("mqtt", "mqtts") or not host:
        raise ConfigError("the broker must look like mqtt://user:password@host:port")
    tls = parts.scheme == "mqtts"
    if identity and not tls:
        raise ConfigError(
            f"the broker at {host} is reached without TLS, but this device has an identity; give "
            "the server a broker with TLS (mqtts://)"
        )
    return BrokerLogin(
        host=host,
        port=port or (8883 if tls else 1883),
        username=unquote(parts.username or ""),
        password=unquote(parts.password or ""),
        tls=(identity.context if identity else ssl.create_default_context()) if tls else None,
    )
