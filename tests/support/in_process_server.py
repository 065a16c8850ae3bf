"""A whole server without broker and sockets, and a way to ask its API."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import uvicorn
from fastapi import FastAPI

from broker_server.api import make_api
from broker_server.blobs import BlobStore
from broker_server.broker_address import BrokerAddress
from broker_server.mqtt import ServerLink
from broker_server.server import Server
from broker_server.server_state import ServerState
from broker_server.settings import ServerSettings
from broker_server.store import Store
from broker_server.voice import ServerVoice
from wire_protocol.signed import Signer

BROKER = BrokerAddress("127.0.0.1", 1, loopback_only=True)


@contextmanager
def server_in(folder: Path, **settings: Any) -> Iterator[Server]:
    """A server of the fleet ``home``, started for the seventh time; nothing listens."""
    state = ServerState(folder)
    store = Store.in_folder(folder)
    chosen = ServerSettings(fleet="home", state_dir=folder, **settings)
    link = ServerLink(BROKER, fleet="home", start_number=7)
    voice = ServerVoice(Signer(bytes(32)), 7, 0.0)
    blobs = BlobStore(state.blobs)
    try:
        yield Server(chosen, state, store, blobs, BROKER, link, voice, voice.signer.public_key)
    finally:
        store.close()


def ask(server: Server, method: str, path: str, **request: Any) -> httpx.Response:
    """One request from this machine."""
    api = make_api(server)

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(api, client=("127.0.0.1", 5000))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.request(method, path, **request)

    return anyio.run(send)


@contextmanager
def served(api: FastAPI) -> Iterator[str]:
    """The same over a real socket of this machine; gives the address."""
    server = uvicorn.Server(uvicorn.Config(api, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
