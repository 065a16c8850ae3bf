"""A device behind a slow, breaking uplink: its update arrives whole, and commands get through.

The requirement is a time, so one test compares with one: half of the round trips of a command
and its answer take less than a second while the update goes up the same link.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import anyio
import pytest

from broker_server.blobs import BlobStore
from broker_server.mqtt import Incoming, ServerLink
from edge_agent.blobs import BlobClient
from edge_agent.mqtt import Connected, DeviceLink, Received
from edge_agent.server_connection import Patience
from tests.support.blob_server import BlobServer
from tests.support.brokers import (
    device_link,
    next_message,
    next_of,
    running_broker,
    server_link,
    topic,
)
from tests.support.ports import free_port
from tests.support.slow_link import SlowLink, slow_link
from wire_protocol.messages import Ack, Command, Rebirth, decode_message, encode_message
from wire_protocol.topics import Channel

pytestmark = [pytest.mark.integration, pytest.mark.anyio]

PATIENT = Patience(total_s=240.0, first_retry_s=0.05, longest_retry_s=0.5, answer_s=60.0)
MOST_SENT_AGAIN = 0.05
COMMAND_S = 1.0


@dataclass(frozen=True)
class Radio:
    """A link and what goes up on it."""

    size_bytes: int
    bytes_per_s: float

    @property
    def breaks(self) -> tuple[int, ...]:
        """Where the connection is reset: at 30 % and 70 %."""
        return (int(0.3 * self.size_bytes), int(0.7 * self.size_bytes))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def send_up(link: SlowLink, file: Path) -> None:
    """Upload as an agent does."""
    async with BlobClient(f"http://127.0.0.1:{link.port}", patience=PATIENT) as client:
        await client.upload(file)


async def answer_commands(device: DeviceLink) -> None:
    """As an agent's session does: an acknowledgement for every command."""
    while True:
        received = await next_of(device, Received)
        if not received.topic.endswith(Channel.COMMAND.value):
            continue
        envelope, _command = decode_message(Command, received.payload)
        ack = Ack(re=envelope.id, status="ok")
        payload = encode_message(ack, message_id=f"ack-{envelope.id}", sid=device.sid)
        device.publish(topic("nano-1", Channel.DEVICE_ACK), payload)


async def round_trip_s(server: ServerLink, number: int) -> float:
    """From a command to its acknowledgement."""
    command_id = f"command-{number}"
    payload = encode_message(Command(command=Rebirth()), message_id=command_id, sid=1)
    began = time.monotonic()
    assert server.publish(topic("nano-1", Channel.COMMAND), payload)
    with anyio.fail_after(60):
        while True:
            item = await server.receive()
            if not isinstance(item, Incoming):
                continue
            item.acknowledge()
            if item.topic == topic("nano-1", Channel.DEVICE_ACK):
                _, ack = decode_message(Ack, item.payload)
                if ack.re == command_id:
                    return time.monotonic() - began


def figures_of(
    radio: Radio, up_bytes: int, took_s: float, delays_s: list[float]
) -> dict[str, float]:
    """What the experiments' page says about one upload and the commands meanwhile."""
    return {
        "size_bytes": radio.size_bytes,
        "bytes_per_s": radio.bytes_per_s,
        "took_s": round(took_s, 2),
        "up_bytes": up_bytes,
        "sent_again": round(up_bytes / radio.size_bytes - 1, 4),
        "commands": len(delays_s),
        "median_s": round(statistics.median(delays_s), 3),
        "max_s": round(max(delays_s), 3),
    }


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "radio",
    [
        pytest.param(Radio(2_000_000, 1_000_000.0), id="short"),
        pytest.param(Radio(8_000_000, 500_000.0), id="long", marks=pytest.mark.trust),
    ],
)
async def test_an_update_crosses_a_slow_link_that_breaks_twice_while_commands_get_through(
    radio: Radio, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    content = random.Random(5).randbytes(radio.size_bytes)
    (tmp_path / "update").write_bytes(content)
    blob_server = BlobServer(free_port(), tmp_path / "blobs")
    blob_server.start()
    delays_s: list[float] = []
    try:
        with (
            running_broker("mosquitto", tmp_path / "server") as broker,
            slow_link(int(blob_server.url.rpartition(":")[2]), radio.bytes_per_s) as http_link,
            slow_link(broker.login.port, radio.bytes_per_s) as mqtt_link,
        ):
            http_link.break_at = list(radio.breaks)
            # One radio carries both: what HTTP takes, MQTT waits for.
            mqtt_link.share_with(http_link)
            login = replace(broker.login, port=mqtt_link.port)
            async with (
                server_link(broker.address) as server,
                device_link(login, "nano-1", tmp_path) as device,
            ):
                await next_of(device, Connected)
                # Said after the subscriptions: from here on the device hears commands.
                state = await next_message(server, lambda item: item.topic.endswith("up/state"))
                state.acknowledge()
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(answer_commands, device)
                    await round_trip_s(server, 0)
                    began = time.monotonic()
                    upload = asyncio.create_task(send_up(http_link, tmp_path / "update"))
                    number = 0
                    while not upload.done():
                        number += 1
                        delays_s.append(await round_trip_s(server, number))
                        await anyio.sleep(0.05)
                    await upload
                    took_s = time.monotonic() - began
                    tasks.cancel_scope.cancel()
                assert device.connected
    finally:
        blob_server.kill()

    digest = hashlib.sha256(content).hexdigest()
    assert BlobStore(tmp_path / "blobs").read(digest) == content
    figures = figures_of(radio, http_link.up_bytes, took_s, delays_s)
    print(json.dumps(figures))  # noqa: T201 - the figures for the experiments' page
    record_property("figures", figures)
    assert http_link.resets == 2
    # The link really was slow: nobody can send faster than its rate.
    assert took_s >= radio.size_bytes / radio.bytes_per_s
    assert http_link.up_bytes >= radio.size_bytes
    assert http_link.up_bytes < radio.size_bytes * (1 + MOST_SENT_AGAIN)
    assert statistics.median(delays_s) < COMMAND_S
