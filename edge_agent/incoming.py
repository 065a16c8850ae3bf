"""Bytes from the broker become events of the session here, and nowhere else."""

from __future__ import annotations

from edge_agent import session
from edge_agent.command_guard import CommandGuard
from wire_protocol.errors import ProtocolError
from wire_protocol.messages import Ack, Command, decode_message
from wire_protocol.topics import Broadcast, Channel, parse_topic


def event_from(
    topic: str, payload: bytes, guard: CommandGuard, *, sid: int, now: float
) -> session.Event | None:
    """Understand one message.

    Args:
        topic: where it came.
        payload: as it came.
        guard: knows whether the server said it.
        sid: this device's current session.
        now: monotonic seconds.

    Returns:
        None for what is meant for people.

    Raises:
        ProtocolError: not to be believed, or not understood.
    """
    channel = parse_topic(topic).channel
    if channel is Broadcast.SERVER_STATE:
        return None  # the link and the leases say what we need
    if channel not in (Channel.SERVER_ACK, Channel.COMMAND, Broadcast.COMMAND):
        raise ProtocolError(f"{channel.value} is not meant for devices")
    text = guard.open(payload, sid=sid, now=now)
    if channel is Channel.SERVER_ACK:
        return session.AckArrived(decode_message(Ack, text)[1])
    envelope, command = decode_message(Command, text)
    return session.CommandArrived(envelope.id, command)
