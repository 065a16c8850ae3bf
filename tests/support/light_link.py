"""An MQTT 3.1.1 connection of a few kilobytes: thousands of them in one process, no threads.

Speaks just enough of the protocol for devices of ours: CONNECT, SUBSCRIBE, PUBLISH at QoS 0 and 1.

Source: OASIS MQTT 3.1.1, chapters 2 and 3.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable, Sequence

from edge_agent.mqtt import BrokerLogin

_CONNECT, _CONNACK, _PUBLISH, _PUBACK = 0x10, 0x20, 0x30, 0x40
_SUBSCRIBE, _SUBACK, _PINGREQ, _PINGRESP = 0x82, 0x90, 0xC0, 0xD0

OnMessage = Callable[[str, bytes], None]


class LightLink(asyncio.Protocol):
    """One connection; made by ``connect``.

    Args:
        on_message: called with topic and payload of everything that arrives.
    """

    def __init__(self, on_message: OnMessage) -> None:
        self._on_message = on_message
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._next_mid = 0
        self._waiting: dict[tuple[int, int], asyncio.Future[int]] = {}
        self.closed = asyncio.get_running_loop().create_future()
        """Done once the connection is over."""

    @classmethod
    async def connect(
        cls, login: BrokerLogin, client_id: str, on_message: OnMessage, *, keepalive_s: int = 300
    ) -> LightLink:
        """Open a connection with a clean session.

        Raises:
            ConnectionError: the broker refuses it.
        """
        loop = asyncio.get_running_loop()
        _, link = await loop.create_connection(lambda: cls(on_message), login.host, login.port)
        flags, rest = 0x02, _text(client_id)
        if login.username:
            flags |= 0xC0
            rest += _text(login.username) + _text(login.password)
        answered = link._answer(_CONNACK, 0)
        link._write(_CONNECT, _text("MQTT") + bytes((4, flags)) + _u16(keepalive_s) + rest)
        code = await answered
        if code:
            link.close()
            raise ConnectionError(f"the broker refuses {client_id}: code {code}")
        return link

    async def subscribe(self, filters: Sequence[str]) -> None:
        """Subscribe at QoS 1 and wait for the broker's word."""
        mid = self._mid()
        answered = self._answer(_SUBACK, mid)
        topics = b"".join(_text(one) + b"\x01" for one in filters)
        self._write(_SUBSCRIBE, _u16(mid) + topics)
        await answered

    def publish(self, topic: str, payload: bytes) -> asyncio.Future[int]:
        """Send at QoS 1; the future is done at the broker's PUBACK."""
        mid = self._mid()
        answered = self._answer(_PUBACK, mid)
        self._write(_PUBLISH | 0x02, _text(topic) + _u16(mid) + payload)
        return answered

    def publish_qos0(self, topic: str, payload: bytes) -> None:
        """Send and forget."""
        self._write(_PUBLISH, _text(topic) + payload)

    def ping(self) -> None:
        """Keep the connection."""
        self._write(_PINGREQ, b"")

    def close(self) -> None:
        """End the connection."""
        if self._transport is not None:
            self._transport.close()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def connection_lost(self, exc: Exception | None) -> None:
        error = ConnectionError(f"the broker closed the connection: {exc}")
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(error)
                waiting.exception()  # whoever waits sees it; nobody must
        self._waiting.clear()
        if not self.closed.done():
            self.closed.set_result(None)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (packet := self._take_packet()) is not None:
            self._handle(*packet)

    def _take_packet(self) -> tuple[int, bytes] | None:
        length, shift, place = 0, 0, 1
        while True:
            if place >= len(self._buffer):
                return None
            byte = self._buffer[place]
            length |= (byte & 0x7F) << shift
            place, shift = place + 1, shift + 7
            if not byte & 0x80:
                break
        if len(self._buffer) < place + length:
            return None
        first, body = self._buffer[0], bytes(self._buffer[place : place + length])
        del self._buffer[: place + length]
        return first, body

    def _handle(self, first: int, body: bytes) -> None:
        kind = first & 0xF0
        if kind == _PUBLISH:
            size = struct.unpack_from(">H", body)[0]
            topic, rest = body[2 : 2 + size].decode(), body[2 + size :]
            if first & 0x06:
                self._write(_PUBACK, rest[:2])
                rest = rest[2:]
            self._on_message(topic, rest)
        elif kind == _CONNACK:
            self._answered(_CONNACK, 0, body[1])
        elif kind in (_PUBACK, _SUBACK):
            self._answered(kind, struct.unpack_from(">H", body)[0], 0)

    def _answer(self, kind: int, mid: int) -> asyncio.Future[int]:
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        if self.closed.done():
            future.set_exception(ConnectionError("the connection is closed"))
            future.exception()
        else:
            self._waiting[kind, mid] = future
        return future

    def _answered(self, kind: int, mid: int, code: int) -> None:
        future = self._waiting.pop((kind, mid), None)
        if future is not None and not future.done():
            future.set_result(code)

    def _mid(self) -> int:
        self._next_mid = self._next_mid % 65_535 + 1
        return self._next_mid

    def _write(self, first: int, body: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(bytes((first,)) + _length(len(body)) + body)


def _text(text: str) -> bytes:
    data = text.encode()
    return _u16(len(data)) + data


def _u16(number: int) -> bytes:
    return struct.pack(">H", number)


def _length(size: int) -> bytes:
    out = bytearray()
    while True:
        size, low = size >> 7, size & 0x7F
        out.append(low | (0x80 if size else 0))
        if not size:
            return bytes(out)
