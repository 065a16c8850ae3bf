"""A message that a full disk keeps the server from taking ends nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import cast

import anyio
import pytest

from broker_server.blobs import DiskFull
from broker_server.mqtt import Incoming, ServerLink
from tests.support.in_process_server import server_in
from tests.support.messages import a_birth
from wire_protocol.messages import encode_message
from wire_protocol.topics import Channel, DeviceTopic


class Link:
    """Brings two births and ends."""

    def __init__(self) -> None:
        self.acknowledged: list[str] = []

    def publish(self, *_args: object) -> None:
        """Nobody listens."""

    async def incoming(self) -> AsyncIterator[Incoming]:
        for name in ("first", "second"):
            payload = encode_message(a_birth(), message_id=name, sid=1)
            topic = str(DeviceTopic("home", name, Channel.BIRTH))
            yield Incoming(topic, payload, False, partial(self.acknowledged.append, name))


def test_a_message_that_does_not_fit_on_the_disk_is_left_to_be_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with server_in(tmp_path) as server:
        link = Link()
        server.link = cast("ServerLink", link)
        born = server.fleet.born

        def full_at_first(device_id: str, *rest: object) -> object:
            if device_id == "first":
                raise DiskFull("the server's disk is full")
            return born(device_id, *rest)  # type: ignore[arg-type]  # passed through

        monkeypatch.setattr(server.fleet, "born", full_at_first)
        anyio.run(server.pump)
        assert set(server.fleet.devices) == {"second"}
        assert link.acknowledged == ["first", "second"]
