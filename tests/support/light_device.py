"""A device without a board: real messages over a real broker, real blobs over HTTP, no training.

What it "learned" depends on its name and the round alone, so two runs with the same devices must
end with the same adapter, whatever else happened.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edge_agent.blobs import BlobClient
from edge_agent.command_guard import CommandGuard
from edge_agent.mqtt import BrokerLogin
from tests.support.light_link import LightLink
from tests.support.messages import a_birth, a_capability, a_report
from wire_protocol.messages import (
    Ack,
    Birth,
    Body,
    Command,
    Heartbeat,
    Rebirth,
    RoundStart,
    UpdateManifest,
    decode_message,
    encode_message,
)
from wire_protocol.model_family import ModelShape, adapter_shapes
from wire_protocol.parts import ComputeReport
from wire_protocol.tensors import encode
from wire_protocol.topics import Channel, DeviceTopic, device_filters

RESEND_S = 5.0
"""As an agent's outbox does; the server must not mind."""


@dataclass
class Site:
    """What the devices of a test share.

    Attributes:
        shape: sizes of the run's base model.
        may_send: awaited before an update is uploaded, to hold a round open.
    """

    fleet: str
    login: BrokerLogin
    blobs: BlobClient
    folder: Path
    shape: ModelShape
    model_digest: str
    heartbeat_s: float = 30.0
    may_send: Callable[[RoundStart], Awaitable[None]] | None = None


@dataclass
class LightDevice:
    """One device. ``start`` it, then look at what it counted."""

    name: str
    site: Site
    sid: int = 1
    updates_acked: int = 0
    resends: int = 0
    rejected: list[str] = field(default_factory=list)
    ack_delays_s: list[float] = field(default_factory=list)

    async def start(self, birth: Birth | None = None) -> None:
        """Connect and introduce itself."""
        self._acks: dict[str, asyncio.Future[Ack]] = {}
        self._done: dict[str, str] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._sequence = 0
        self._guard = CommandGuard(self.site.fleet, self.name, None)
        self._birth = birth or self.birth()
        self.link = await LightLink.connect(self.site.login, self.name, self._on_message)
        await self.link.subscribe(device_filters(self.site.fleet, self.name))
        await self.say(Channel.BIRTH, self._birth, f"birth-{self.sid}")
        self.spawn(self._beat())

    def birth(self, **changes: Any) -> Birth:
        """Measured with the run's base model, and with its data."""
        compute = ComputeReport(
            model_digest=self.site.model_digest,
            forward_seconds_per_token_layer=1e-5,
            backward_seconds_per_token_layer=2e-5,
            memory_base_bytes=500_000_000,
            memory_bytes_per_token=1000.0,
            memory_bytes_per_token_layer=5000.0,
        )
        return a_birth(
            capability=a_capability(compute=compute),
            datasets={"reviews": {"examples": 100, "labels": ("negative", "positive")}},
            heartbeat_s=self.site.heartbeat_s,
            **changes,
        )

    async def stop(self) -> None:
        """Leave without a word."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.link.close()

    def spawn(self, work: Any) -> None:
        """Do something beside everything else."""
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def say(self, channel: Channel, body: Body, message_id: str) -> asyncio.Future[int]:
        """Publish a message."""
        payload = encode_message(body, message_id=message_id, sid=self.sid)
        return self.link.publish(self.topic(channel), payload)

    def topic(self, channel: Channel) -> str:
        """One of this device's topics."""
        return str(DeviceTopic(self.site.fleet, self.name, channel))

    async def asked(self, channel: Channel, body: Body, message_id: str) -> Ack:
        """Publish until the server's own ack is here."""
        answer = self._acks.setdefault(message_id, asyncio.get_running_loop().create_future())
        while True:
            with suppress(ConnectionError):
                await self.say(channel, body, message_id)
            with suppress(TimeoutError, asyncio.TimeoutError):
                return await asyncio.wait_for(asyncio.shield(answer), RESEND_S)
            self.resends += 1

    def _on_message(self, topic: str, payload: bytes) -> None:
        if topic.endswith("/all/server"):
            return
        text = self._guard.open(payload, sid=self.sid, now=time.monotonic())
        if topic.endswith(Channel.SERVER_ACK.value):
            ack = decode_message(Ack, text)[1]
            waiting = self._acks.pop(ack.re, None)
            if waiting is not None and not waiting.done():
                waiting.set_result(ack)
            return
        envelope, command = decode_message(Command, text)
        self.say(Channel.DEVICE_ACK, Ack(re=envelope.id, status="ok"), f"ack-{envelope.id}")
        self._obey(command)

    def _obey(self, command: Command) -> None:
        """Train and rebirth; its birth has said what a benchmark would."""
        match command.command:
            case RoundStart():
                start = command.command
                if start.assignment_id not in self._done:
                    self._done[start.assignment_id] = "working"
                    self.spawn(self._work(start))
            case Rebirth():
                self.say(Channel.BIRTH, self._birth, f"birth-again-{self._sequence}")

    async def _beat(self) -> None:
        # Spread evenly: a fleet that started together must not beat together.
        offset = int(hashlib.sha256(self.name.encode()).hexdigest()[:4], 16) / 0xFFFF
        await asyncio.sleep(self.site.heartbeat_s * offset)
        while True:
            self._sequence += 1
            beat = Heartbeat(sequence=self._sequence, rss_bytes=1)
            payload = encode_message(beat, message_id=f"hb-{self._sequence}", sid=self.sid)
            self.link.publish_qos0(self.topic(Channel.HEARTBEAT), payload)
            await asyncio.sleep(self.site.heartbeat_s)

    async def _work(self, start: RoundStart) -> None:
        data = update_bytes(self.name, start, self.site.shape)
        file = self.site.folder / f"{self.name}-{start.round_number}"
        file.write_bytes(data)
        if self.site.may_send is not None:
            await self.site.may_send(start)
        update = await self.site.blobs.upload(file)
        file.unlink()
        manifest = UpdateManifest(
            run_id=start.run_id,
            round_number=start.round_number,
            assignment_id=start.assignment_id,
            base_sha256=start.adapter.sha256,
            ranks=start.ranks,
            update=update,
            examples=100,
            report=a_report(upload_bytes=update.size_bytes, steps_done=start.steps),
        )
        began = time.monotonic()
        ack = await self.asked(Channel.UPDATE, manifest, f"update-{start.assignment_id}")
        self.ack_delays_s.append(time.monotonic() - began)
        if ack.status == "ok":
            self.updates_acked += 1
        else:
            self.rejected.append(f"{ack.code}: {ack.detail}")


def update_bytes(name: str, start: RoundStart, shape: ModelShape) -> bytes:
    """What this device learned in this round."""
    seed = hashlib.sha256(f"{name}/{start.round_number}".encode()).digest()
    generator = np.random.default_rng(int.from_bytes(seed[:8], "big"))
    shapes = adapter_shapes(shape, start.ranks, len(start.recipe.labels), factors=start.factors)
    tensors = {
        tensor: (generator.standard_normal(size, dtype=np.float32) * np.float32(0.01))
        for tensor, size in shapes.items()
    }
    return encode(tensors, start.recipe.codec)
