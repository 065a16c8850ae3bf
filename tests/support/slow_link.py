"""A TCP proxy of ours that is as slow as a radio, in both directions, and breaks where told.

Every direction has one rate that all its connections share, as on a real link. Its buffers are
small, so that what it says it passed on is what the link carried.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from edge_agent.link import TokenBucket

_PIECE_BYTES = 4096
_BUFFER_BYTES = 16 * 1024
_RESET = struct.pack("ii", 1, 0)


@dataclass
class SlowLink:
    """Listens on loopback and passes bytes to another port there.

    Args:
        target_port: where the real service listens.
        bytes_per_s: of each direction.
        break_at: resets every connection once so many bytes went up, each once.
    """

    target_port: int
    bytes_per_s: float
    break_at: list[int] = field(default_factory=list)
    port: int = 0
    up_bytes: int = 0
    down_bytes: int = 0
    resets: int = 0

    def __post_init__(self) -> None:
        self._up = TokenBucket(self.bytes_per_s)
        self._down = TokenBucket(self.bytes_per_s)
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="slow link", daemon=True)
        self._ready = threading.Event()

    def share_with(self, other: SlowLink) -> None:
        """Be one radio with another link: both take from the same two rates."""
        self._up, self._down = other._up, other._down

    def start(self) -> None:
        """Return once connections are accepted."""
        self._thread.start()
        assert self._ready.wait(20)

    def stop(self) -> None:
        """Break everything and listen no more."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(20)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        serving = asyncio.start_server(self._serve, "127.0.0.1", 0, limit=_BUFFER_BYTES)
        server = self._loop.run_until_complete(serving)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        server.close()
        self._break()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there = await asyncio.open_connection(
                "127.0.0.1", self.target_port, limit=_BUFFER_BYTES
            )
        except OSError:
            writer.close()
            return
        for end in (writer, there[1]):
            sock = end.get_extra_info("socket")
            # Otherwise the kernel would take megabytes at once and the link would seem fast.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            end.transport.set_write_buffer_limits(high=_BUFFER_BYTES)
            self._open.add(end)
        await asyncio.gather(
            self._pass_on(reader, there[1], up=True), self._pass_on(there[0], writer, up=False)
        )
        for end in (writer, there[1]):
            end.close()
            self._open.discard(end)

    async def _pass_on(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, up: bool
    ) -> None:
        bucket = self._up if up else self._down
        try:
            while piece := await reader.read(_PIECE_BYTES):
                await asyncio.sleep(bucket.take(len(piece), self._loop.time()))
                if up:
                    self.up_bytes += len(piece)
                else:
                    self.down_bytes += len(piece)
                writer.write(piece)
                await writer.drain()
                if up and self.break_at and self.up_bytes >= self.break_at[0]:
                    self.break_at.pop(0)
                    self.resets += 1
                    self._break()
                    return
            writer.write_eof()
        except (ConnectionError, OSError, RuntimeError):
            self._abort(writer)

    def _break(self) -> None:
        for writer in list(self._open):
            self._abort(writer)

    def _abort(self, writer: asyncio.StreamWriter) -> None:
        sock = writer.get_extra_info("socket")
        if sock is not None and sock.fileno() >= 0:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        writer.transport.abort()
        self._open.discard(writer)


@contextmanager
def slow_link(
    target_port: int, bytes_per_s: float, *, break_at: tuple[int, ...] = ()
) -> Iterator[SlowLink]:
    """Run one for a test."""
    link = SlowLink(target_port, bytes_per_s, list(break_at))
    link.start()
    try:
        yield link
    finally:
        link.stop()
