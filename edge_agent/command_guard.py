"""Whether a message really comes from this fleet's server, for this device, now.

The broker is trusted to carry messages, not to write or repeat them: every message of
the server is signed, names its receiver and the receiver's session, has a number of its own and
an age. No wall clock is read: boards boot with a wrong date, and the server counts the seconds
since its own start.

Pure: bytes, session and time are arguments.
"""

from __future__ import annotations

from collections.abc import Callable

from wire_protocol.errors import ProtocolError
from wire_protocol.messages import EVERY_DEVICE, Delivery, read_envelope
from wire_protocol.signed import read_signed, read_statement

START_BITS = 32
"""A sequence number is the server's start in the upper bits and a counter in the lower ones."""

_WINDOW = 1024
_DRIFT = 0.001
"""Two clocks may drift apart by this much, far more than any quartz: weeks of one connection."""


class CommandGuard:
    """Opens what the server sent, or says why it is not to be believed.

    Args:
        fleet: whose server may speak.
        device_id: who listens.
        operator_key: Ed25519 public key in hex; None believes everything (a broker that the
            settings name, without an identity of this device).
        key_number: number of the newest server key seen before.
        on_new_key: told the number of a newer server key, to be remembered.
    """

    def __init__(
        self,
        fleet: str,
        device_id: str,
        operator_key: str | None,
        *,
        key_number: int = 0,
        on_new_key: Callable[[int], object] = lambda _number: None,
    ) -> None:
        self._fleet = fleet
        self._device_id = device_id
        self._operator_key = operator_key
        self._key_number = key_number
        self._on_new_key = on_new_key
        self._vouched: tuple[str, str] | None = None
        self._seen: set[int] = set()
        self._highest = -1
        # Server seconds minus ours, for the server start that spoke last.
        self._offset_s: float | None = None
        self._offset_known_at = 0.0

    def open(self, data: bytes, *, sid: int, now: float) -> bytes:
        """Return the message inside.

        Args:
            data: as it came from the broker.
            sid: this device's current session.
            now: monotonic seconds.

        Raises:
            ProtocolError: not signed by this fleet's server, for somebody else, for another
                session, seen before, or too old.
        """
        if self._operator_key is None:
            return _unwrapped(data)
        signed = read_signed(data)
        self._check_key(signed.key, signed.voucher, self._operator_key)
        text = signed.text.encode()
        envelope = read_envelope(text)
        delivery = envelope.delivery
        if delivery is None:
            raise ProtocolError("the message does not say for whom and when")
        self._check_receiver(delivery, envelope.sid, sid)
        self._check_number_and_age(delivery, now)
        return text

    def _check_key(self, key: str, voucher: str, operator_key: str) -> None:
        if self._vouched == (key, voucher):
            return
        statement = read_statement(voucher, operator_key=operator_key)
        if statement.server_key != key:
            raise ProtocolError("the operator's statement is about another key")
        if statement.fleet != self._fleet:
            raise ProtocolError(f"the key is for the server of fleet {statement.fleet!r}")
        if statement.number < self._key_number:
            raise ProtocolError("the server's key was replaced by a newer one")
        if statement.number > self._key_number:
            self._on_new_key(statement.number)
            self._key_number = statement.number
        self._vouched = (key, voucher)

    def _check_receiver(self, delivery: Delivery, meant_sid: int, sid: int) -> None:
        if delivery.to == EVERY_DEVICE:
            return
        if delivery.to != self._device_id:
            raise ProtocolError(f"the message is for {delivery.to!r}")
        if meant_sid != sid:
            raise ProtocolError(f"the message is for session {meant_sid}, this is {sid}")

    def _check_number_and_age(self, delivery: Delivery, now: float) -> None:
        number, sent_at_s, ttl_s = delivery.seq, delivery.at_s, delivery.ttl_s
        if number in self._seen or number <= self._highest - _WINDOW:
            raise ProtocolError(f"message number {number} was used before")
        new_start = number >> START_BITS != self._highest >> START_BITS
        if new_start and number < self._highest:
            raise ProtocolError(f"message number {number} is of an earlier start of the server")
        # The message that took least time tells best how the two clocks relate.
        offset_s = sent_at_s - now
        if not new_start and self._offset_s is not None:
            drifted_s = _DRIFT * (now - self._offset_known_at)
            offset_s = max(offset_s, self._offset_s - drifted_s)
        if now + offset_s > sent_at_s + ttl_s:
            raise ProtocolError(f"the message is older than {ttl_s:.0f} s")
        self._offset_s, self._offset_known_at = offset_s, now
        self._highest = max(self._highest, number)
        self._seen.add(number)
        if len(self._seen) > 2 * _WINDOW:
            self._seen = {seen for seen in self._seen if seen > self._highest - _WINDOW}


def _unwrapped(data: bytes) -> bytes:
    """What is inside, verified by nobody."""
    try:
        return read_signed(data).text.encode()
    except ProtocolError:
        return data
