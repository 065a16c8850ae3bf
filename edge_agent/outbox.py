"""Messages that must reach the server, kept on disk until it says that it has them.

An MQTT acknowledgement comes from the broker and proves nothing: brokers drop
acknowledged messages when queues are full or when they are killed. So a message stays
here and is sent again until the server's own ack arrives.

``ResendSchedule`` decides when (pure); ``Outbox`` keeps the files. Neither knows MQTT,
and neither reads a clock.
"""

from __future__ import annotations

import base64
import binascii
import json
import random
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import structlog

from edge_agent.backoff import full_jitter
from edge_agent.state_dir import write_durably
from wire_protocol.durable import remove_file, sync
from wire_protocol.errors import DeviceError, ProtocolError
from wire_protocol.messages import MAX_WIRE_BYTES

log = structlog.get_logger()

FIRST_RESEND_S = 2.0
LONGEST_RESEND_S = 60.0


@dataclass(frozen=True)
class OutgoingMessage:
    """One message; not signed yet, and the same bytes at every resend."""

    message_id: str
    topic: str
    payload: bytes


class ResendSchedule:
    """When each message is to be sent again.

    A new message is due at once. After it was handed out, it rests for a random time of at most
    ``FIRST_RESEND_S``, doubled at every further send up to ``LONGEST_RESEND_S``.

    Args:
        rng: the source of the jitter.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._due_at: dict[str, float] = {}
        self._sends: dict[str, int] = {}

    def add(self, message_id: str, now: float) -> None:
        """Make a message due at once; one that is known already keeps its time."""
        self._due_at.setdefault(message_id, now)
        self._sends.setdefault(message_id, 0)

    def remove(self, message_id: str) -> None:
        """Forget a message; unknown ones are ignored."""
        self._due_at.pop(message_id, None)
        self._sends.pop(message_id, None)

    def take_due(self, now: float) -> list[str]:
        """Ids to send now, oldest first; each is put off to its next resend.

        Args:
            now: seconds on the caller's monotonic clock.
        """
        due = [message_id for message_id, when in self._due_at.items() if when <= now]
        for message_id in due:
            self._postpone(message_id, now, FIRST_RESEND_S)
        return due

    def postpone(self, message_id: str, now: float, *, at_least_s: float) -> None:
        """Wait longer, because the server said that it is busy."""
        if message_id in self._due_at:
            self._due_at[message_id] = now + at_least_s + self._rng.uniform(0.0, FIRST_RESEND_S)

    def make_all_due(self, now: float) -> None:
        """Send everything now: the connection is new and backoff counts from here."""
        for message_id in self._due_at:
            self._due_at[message_id] = now
            self._sends[message_id] = 0

    def next_deadline(self) -> float | None:
        """When ``take_due`` will next return something; None while nothing waits."""
        return min(self._due_at.values(), default=None)

    def _postpone(self, message_id: str, now: float, base_s: float) -> None:
        delay_s = full_jitter(
            self._sends[message_id], base_s=base_s, cap_s=LONGEST_RESEND_S, rng=self._rng
        )
        # A draw near zero would resend before an ack can possibly be back.
        self._due_at[message_id] = now + max(delay_s, base_s / 4)
        self._sends[message_id] += 1


class Outbox:
    """The durable queue: one file per message, ``<message id>.json``.

    Files that cannot be read are moved to ``<name>.corrupt`` and reported in the log.

    Args:
        folder: an existing directory that belongs to this outbox.
        rng: the source of the resend jitter.
        now: seconds on the caller's monotonic clock; messages from before are due at once.
    """

    def __init__(self, folder: Path, *, rng: random.Random, now: float) -> None:
        self._folder = folder
        self._schedule = ResendSchedule(rng)
        self._messages: dict[str, OutgoingMessage] = {}
        self._unwritten: set[str] = set()
        self._load(now)

    def __len__(self) -> int:
        return len(self._messages)

    def __contains__(self, message_id: object) -> bool:
        return message_id in self._messages

    @property
    def message_ids(self) -> tuple[str, ...]:
        """What waits for an acknowledgement, oldest first."""
        return tuple(self._messages)

    def add(self, message: OutgoingMessage, *, now: float) -> None:
        """Keep a message until it is acknowledged; it is on disk before this returns.

        On a full disk it is kept in memory, sent all the same, and written once there is space.

        Adding the same id twice keeps the first.

        Raises:
            ProtocolError: the payload is larger than a message may be, or the id is no file name.
            DeviceError: the disk is full.
        """
        if len(message.payload) > MAX_WIRE_BYTES:
            raise ProtocolError(f"message of {len(message.payload)} bytes exceeds {MAX_WIRE_BYTES}")
        if message.message_id in self._messages:
            return
        self._path(message.message_id)
        self._messages[message.message_id] = message
        self._schedule.add(message.message_id, now)
        self._unwritten.add(message.message_id)
        self._write(message)

    def due(self, now: float) -> list[OutgoingMessage]:
        """Messages to publish now, oldest first; each rests afterwards until its resend."""
        messages = [self._messages[message_id] for message_id in self._schedule.take_due(now)]
        for message in messages:
            if message.message_id in self._unwritten:
                with suppress(DeviceError):  # still no space; it was said when it began
                    self._write(message)
        return messages

    def next_deadline(self) -> float | None:
        """When ``due`` will next return something; None while nothing waits."""
        return self._schedule.next_deadline()

    def reconnected(self, now: float) -> None:
        """Make everything due: what was sent before may be lost."""
        self._schedule.make_all_due(now)

    def postpone(self, message_id: str, *, now: float, at_least_s: float) -> None:
        """Wait at least so long before the next resend, because the server is busy."""
        self._schedule.postpone(message_id, now, at_least_s=at_least_s)

    def acknowledged(self, message_id: str) -> bool:
        """Drop a message that the server has.

        Returns:
            Whether it was waiting; a second ack of the same message is harmless.
        """
        if self._messages.pop(message_id, None) is None:
            return False
        self._schedule.remove(message_id)
        self._unwritten.discard(message_id)
        remove_file(self._path(message_id), site="agent.outbox.acknowledged")
        return True

    def _write(self, message: OutgoingMessage) -> None:
        path = self._path(message.message_id)
        write_durably(path, _to_json(message), site="agent.outbox")
        self._unwritten.discard(message.message_id)

    def _path(self, message_id: str) -> Path:
        if not message_id or "/" in message_id or message_id.startswith("."):
            raise ProtocolError(f"message id {message_id[:60]!r} cannot be a file name")
        return self._folder / f"{message_id}.json"

    def _load(self, now: float) -> None:
        for leftover in self._folder.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        found = sorted(self._folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        for path in found:
            try:
                message = _from_json(path.stem, path.read_bytes())
            except (OSError, ProtocolError) as error:
                path.rename(path.with_name(path.name + ".corrupt"))
                sync(self._folder)
                log.warning("outbox_file_moved_aside", path=str(path), error=str(error))
                continue
            self._messages[message.message_id] = message
            self._schedule.add(message.message_id, now)


def _to_json(message: OutgoingMessage) -> bytes:
    return json.dumps(
        {"topic": message.topic, "payload": base64.b64encode(message.payload).decode()}
    ).encode()


def _from_json(message_id: str, data: bytes) -> OutgoingMessage:
    try:
        content = json.loads(data)
        payload = base64.b64decode(content["payload"], validate=True)
        return OutgoingMessage(message_id, str(content["topic"]), payload)
    except (ValueError, KeyError, TypeError, binascii.Error) as error:
        raise ProtocolError(f"not an outbox file: {error}") from error
