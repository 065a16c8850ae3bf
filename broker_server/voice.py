"""How the server's words are signed, and how those of devices are believed.

Sequence numbers, ages and vouchers on the way down; certificates on the way up. Pure but for the
certificate check that is handed in: time and randomness are arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from wire_protocol.errors import LegendError, ProtocolError
from wire_protocol.messages import (
    EVERY_DEVICE,
    Ack,
    CertificateIssued,
    Command,
    Delivery,
    encode_message,
)
from wire_protocol.signed import Signer, read_signed
from wire_protocol.topics import Channel

MESSAGE_TTL_S = 60.0
"""Resends come sooner: whatever is older was held back by somebody."""

_START_BITS = 32
_UNSIGNED = frozenset({Channel.STATE, Channel.HEARTBEAT})
"""Nothing of value hangs on these: leases renew by heartbeats, a forged one delays a timeout."""

CertificateCheck = Callable[[str], tuple[str, str]]
"""Certificate in PEM to (device id, public key in hex); raises a ``LegendError``."""


@dataclass
class ServerVoice:
    """Signs what the server says.

    Attributes:
        signer: the server's key.
        start_number: how often this server has started; numbers of a later start are larger.
        started_at: monotonic seconds.
    """

    signer: Signer
    start_number: int
    started_at: float
    _count: int = field(default=0, init=False)

    def say(
        self,
        body: Command | Ack | CertificateIssued,
        *,
        message_id: str,
        now: float,
        to: str = EVERY_DEVICE,
        sid: int = 0,
    ) -> bytes:
        """Write one message for one device and session, or for all.

        Raises:
            ProtocolError: it is larger than a message may be.
        """
        self._count += 1
        delivery = Delivery(
            to=to,
            seq=(self.start_number << _START_BITS) + self._count,
            at_s=now - self.started_at,
            ttl_s=MESSAGE_TTL_S,
        )
        return self.signer.sign(
            encode_message(body, message_id=message_id, sid=sid, delivery=delivery)
        )


@dataclass(frozen=True)
class DeviceVoices:
    """Opens what devices say.

    Attributes:
        check: knows certificates; None in a fleet without identities, where nothing is signed.
    """

    check: CertificateCheck | None = None

    def open(self, device_id: str, channel: Channel, payload: bytes) -> bytes:
        """Return the message inside.

        Raises:
            ProtocolError: it must be signed and is not, or not by this device.
        """
        if self.check is None or channel in _UNSIGNED:
            return payload
        signed = read_signed(payload)
        try:
            name, key = self.check(signed.voucher)
        except LegendError as error:
            raise ProtocolError(f"certificate not accepted: {error}") from error
        if name != device_id:
            raise ProtocolError(f"signed by {name!r}")
        if key != signed.key:
            raise ProtocolError("signed by another key than the certificate's")
        return signed.text.encode()
