"""A TCP proxy of ours that cuts every connection through it on demand."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_RESET = struct.pack("ii", 1, 0)


class CuttingProxy:
    """Listens on loopback and passes bytes to another port there.

    Args:
        target_port: where the real service listens; it may come and go.
    """

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.port = 0
        self.cuts = 0
        self.connections = 0
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)
        self._ready = threading.Event()

    def start(self) -> None:
        """Return once connections are accepted."""
        self._thread.start()
        self._ready.wait(20)

    def cut(self) -> int:
        """Reset every open connection, both ends; returns how many."""
        done = asyncio.run_coroutine_threadsafe(self._cut(), self._loop)
        return done.result(20)

    def stop(self) -> None:
        """Cut everything and listen no more."""
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(20)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(
            asyncio.start_server(self._serve, "127.0.0.1", self.port)
        )
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        server.close()

    async def _cut(self) -> int:
        writers = list(self._open)
        for writer in writers:
            sock = writer.get_extra_info("socket")
            if sock is not None:
                # Not an orderly end: both sides see "connection reset".
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()
        self.cuts += 1
        return len(writers) // 2

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            upstream = await asyncio.open_connection("127.0.0.1", self.target_port)
        except OSError:
            writer.transport.abort()
            return
        self.connections += 1
        pair = (writer, upstream[1])
        self._open.update(pair)
        try:
            await asyncio.gather(_pass(reader, upstream[1]), _pass(upstream[0], writer))
        finally:
            self._open.difference_update(pair)
            for one in pair:
                one.transport.abort()


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.write_eof()


@contextmanager
def cutting_proxy(target_port: int) -> Iterator[CuttingProxy]:
    """A running proxy to this port."""
    proxy = CuttingProxy(target_port)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()
