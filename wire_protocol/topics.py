"""Every MQTT topic, built and parsed. No other file contains a topic literal.

    legend/v1/{fleet}/d/{device}/up/...     device -> server
    legend/v1/{fleet}/d/{device}/down/...   server -> device
    legend/v1/{fleet}/all/...               server -> every device

The device is named by the topic, which the broker's access rules protect,
never by the payload alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from wire_protocol.errors import ProtocolError

ROOT = "legend/v1"
NAME_PATTERN = r"[a-z0-9][a-z0-9-]{0,47}"
_NAME = re.compile(NAME_PATTERN)


class Channel(str, Enum):
    """What a device topic carries; the value is the end of the topic."""

    STATE = "up/state"
    BIRTH = "up/birth"
    HEARTBEAT = "up/hb"
    EVENT = "up/evt"
    UPDATE = "up/update"
    DEVICE_ACK = "up/ack"
    CERTIFICATE_REQUEST = "up/cert"
    COMMAND = "down/cmd"
    SERVER_ACK = "down/ack"
    CERTIFICATE = "down/cert"


class Broadcast(str, Enum):
    """What a topic for the whole fleet carries."""

    COMMAND = "all/cmd"
    SERVER_STATE = "all/server"


def check_name(kind: str, name: str) -> str:
    """Return ``name`` when it can stand in a topic.

    Raises:
        ProtocolError: it is not 1 to 48 lower-case letters, digits and dashes.
    """
    if not _NAME.fullmatch(name):
        raise ProtocolError(
            f"{kind} {name[:60]!r} must be 1 to 48 lower-case letters, digits and dashes"
        )
    return name


@dataclass(frozen=True)
class DeviceTopic:
    """A topic of one device."""

    fleet: str
    device_id: str
    channel: Channel

    def __post_init__(self) -> None:
        check_name("fleet", self.fleet)
        check_name("device id", self.device_id)

    def __str__(self) -> str:
        return f"{ROOT}/{self.fleet}/d/{self.device_id}/{self.channel.value}"


@dataclass(frozen=True)
class FleetTopic:
    """A topic that every device of a fleet reads."""

    fleet: str
    channel: Broadcast

    def __post_init__(self) -> None:
        check_name("fleet", self.fleet)

    def __str__(self) -> str:
        return f"{ROOT}/{self.fleet}/{self.channel.value}"


def parse_topic(text: str) -> DeviceTopic | FleetTopic:
    """Read a topic; the inverse of ``str``.

    Raises:
        ProtocolError: the topic is not one of ours.
    """
    prefix = ROOT + "/"
    if not text.startswith(prefix):
        raise ProtocolError(f"topic {text[:80]!r} does not start with {prefix}")
    fleet, _, rest = text[len(prefix) :].partition("/")
    try:
        if rest.startswith("d/"):
            device_id, _, channel = rest[2:].partition("/")
            return DeviceTopic(fleet, device_id, Channel(channel))
        return FleetTopic(fleet, Broadcast(rest))
    except ValueError as error:
        raise ProtocolError(f"unknown topic {text[:80]!r}") from error


def server_filters(fleet: str) -> list[str]:
    """Subscriptions of the server: everything that devices say."""
    return [f"{ROOT}/{check_name('fleet', fleet)}/d/+/up/#"]


def device_filters(fleet: str, device_id: str) -> list[str]:
    """Subscriptions of one device: what is meant for it or for all."""
    check_name("device id", device_id)
    return [
        f"{ROOT}/{check_name('fleet', fleet)}/d/{device_id}/down/#",
        f"{ROOT}/{fleet}/all/#",
    ]
