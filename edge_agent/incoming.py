"""Bytes from the broker become events of the session here, and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass

from edge_agent import session
from edge_agent.command_guard import CommandGuard
from wire_protocol.errors import ProtocolError, Refused
from wire_protocol.messages import Ack, CertificateIssued, Command, decode_message
from wire_protocol.topics import Broadcast, Channel, parse_topic
from wire_protocol.versions import WRONG_PROTOCOL


@dataclass(frozen=True)
class NewCertificate:
    """The server answered a request for this device's next certificate."""

    pem: str


def event_from(
    topic: str, payload: bytes, guard: CommandGuard, *, sid: int, now: float
) -> session.Event | NewCertificate | None:
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
        Refused: the server speaks another protocol.
    """
    channel = parse_topic(topic).channel
    if channel is Broadcast.SERVER_STATE:
        return None  # the link and the leases say what we need
    expected = (Channel.SERVER_ACK, Channel.COMMAND, Broadcast.COMMAND, Channel.CERTIFICATE)
    if channel not in expected:
        raise ProtocolError(f"{channel.value} is not meant for devices")
    text = guard.open(payload, sid=sid, now=now)
    if channel is Channel.SERVER_ACK:
        ack = decode_message(Ack, text)[1]
        if (ack.status, ack.code) == ("rejected", WRONG_PROTOCOL):
            raise Refused(f"the server refuses this agent: {ack.detail}")
        return session.AckArrived(ack)
    if channel is Channel.CERTIFICATE:
        return NewCertificate(decode_message(CertificateIssued, text)[1].certificate_pem)
    envelope, command = decode_message(Command, text)
    return session.CommandArrived(envelope.id, command)
