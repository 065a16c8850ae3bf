"""What the server counts while it runs: everything it drops, refuses, sends and moves.

Plain numbers, changed where things happen; whoever shows them reads them. They begin at zero with
every start of the server.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from wire_protocol.drop_reason import drop_reason
from wire_protocol.errors import ProtocolError
from wire_protocol.messages import Ack, Command, RoundStart

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"})


@dataclass
class ServerCounters:
    """Counts since the start of this process.

    Attributes:
        dropped: messages that were not understood or not believed, by channel and reason.
        acks: answers to devices, by status and code; ``rejected`` ones are refused updates.
        commands: sent to devices, by type.
        resent: assignments that were sent to a device more than once.
        unsaved: births that the database did not take, and that live in memory only.
        answers: HTTP answers by method and status.
        received_bytes: of HTTP bodies.
        sent_bytes: of HTTP bodies.
        uploads: blobs that arrived whole.
    """

    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)
    acks: Counter[tuple[str, str]] = field(default_factory=Counter)
    commands: Counter[str] = field(default_factory=Counter)
    resent: int = 0
    unsaved: int = 0
    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    received_bytes: int = 0
    sent_bytes: int = 0
    uploads: int = 0

    def __post_init__(self) -> None:
        self._assigned: dict[str, str] = {}

    def drop(self, channel: str, error: ProtocolError) -> str:
        """Count a dropped message; returns the word for the reason.

        Args:
            channel: one of ours, or a fixed word; strangers must not invent counters.
            error: why it was dropped.
        """
        reason = drop_reason(error)
        self.dropped[channel, reason] += 1
        return reason

    @property
    def dropped_by_channel(self) -> dict[str, int]:
        """The same without the reasons."""
        sums: Counter[str] = Counter()
        for (channel, _reason), count in self.dropped.items():
            sums[channel] += count
        return dict(sums)

    def command(self, device_id: str, command: Command) -> None:
        """Count a command."""
        self.commands[command.command.type] += 1
        if isinstance(command.command, RoundStart):
            assignment_id = command.command.assignment_id
            self.resent += self._assigned.get(device_id) == assignment_id
            self._assigned[device_id] = assignment_id

    def ack(self, ack: Ack) -> None:
        """Count an answer to a device."""
        self.acks[ack.status, ack.code] += 1

    def uploaded(self, _sha256: str) -> None:
        """Count a blob that arrived whole."""
        self.uploads += 1


class TrafficMeter:
    """ASGI middleware that counts what goes through, refused requests included.

    Args:
        app: what is measured.
        counters: where it is written down.
    """

    def __init__(self, app: ASGIApp, counters: ServerCounters) -> None:
        self._app = app
        self._counters = counters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        counters = self._counters
        # A stranger chooses the method: it must not become a name of its own.
        method = scope["method"] if scope["method"] in _METHODS else "other"

        async def counted_receive() -> Message:
            message = await receive()
            counters.received_bytes += len(message.get("body", b""))
            return message

        async def counted_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                counters.answers[method, message["status"]] += 1
            counters.sent_bytes += len(message.get("body", b""))
            await send(message)

        await self._app(scope, counted_receive, counted_send)
