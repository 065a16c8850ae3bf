"""Real brokers for tests, and links to them with short tempers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeVar

import anyio
import pytest

from broker_server.broker import ChildBroker, open_broker
from broker_server.broker_address import BrokerAddress
from broker_server.mqtt import Incoming, ServerEvent, ServerLink
from edge_agent.mqtt import BrokerLogin, DeviceLink, LinkEvent
from edge_agent.reconnect import LinkTiming
from edge_agent.state_dir import Counter
from wire_protocol.topics import Channel, DeviceTopic

Kind = Literal["embedded", "mosquitto"]
FLEET = "lab"
IMPATIENT = LinkTiming(first_retry_s=0.05, longest_retry_s=0.2, refused_retry_s=0.2, stop_s=5.0)

Event = TypeVar("Event")


class RunningBroker:
    """A started broker that a test may kill and start again."""

    def __init__(self, launcher: ChildBroker) -> None:
        self.launcher = launcher
        self.address = launcher.start()

    @property
    def login(self) -> BrokerLogin:
        """What a device is given."""
        user = self.address.device_credentials
        assert user is not None
        return BrokerLogin(self.address.host, self.address.port, user.username, user.password)


def require(kind: Kind) -> None:
    """Skip the test where this broker is not installed."""
    if kind == "mosquitto" and shutil.which("mosquitto", path="/usr/sbin:/usr/bin") is None:
        pytest.skip("mosquitto is not installed (apt install mosquitto)")


@contextmanager
def running_broker(kind: Kind, state_dir: Path) -> Iterator[RunningBroker]:
    """A broker of this kind; skips the test where mosquitto is not installed."""
    require(kind)
    launcher = open_broker(kind, state_dir=state_dir)
    assert isinstance(launcher, ChildBroker)
    try:
        yield RunningBroker(launcher)
    finally:
        launcher.stop()


def device_link(
    login: BrokerLogin, device_id: str, folder: Path, *, queue_size: int = 256
) -> DeviceLink:
    """A link whose session number lives in ``folder``."""
    return DeviceLink(
        login,
        DeviceTopic(FLEET, device_id, Channel.STATE),
        next_sid=Counter(folder / f"{device_id}.sid").increment,
        timing=IMPATIENT,
        queue_size=queue_size,
    )


def server_link(address: BrokerAddress, *, start_number: int = 1) -> ServerLink:
    """The server's link to the test fleet."""
    return ServerLink(address, fleet=FLEET, start_number=start_number, longest_retry_s=0.2)


def topic(device_id: str, channel: Channel) -> str:
    """A topic of the test fleet."""
    return str(DeviceTopic(FLEET, device_id, channel))


async def next_of(link: DeviceLink, kind: type[Event]) -> Event:
    """The link's next event of this kind; others are passed over."""
    with anyio.fail_after(20):
        while True:
            event: LinkEvent = await link.receive()
            if isinstance(event, kind):
                return event


async def next_message(
    link: ServerLink, wanted: Callable[[Incoming], bool] = lambda _message: True
) -> Incoming:
    """The server's next wanted message; others are acknowledged and passed over."""
    with anyio.fail_after(20):
        while True:
            event: ServerEvent = await link.receive()
            if isinstance(event, Incoming):
                if wanted(event):
                    return event
                event.acknowledge()


async def settled(link: ServerLink, kind: type[object]) -> None:
    """Pass over the server's events until one of this kind."""
    with anyio.fail_after(20):
        while not isinstance(await link.receive(), kind):
            pass
