"""What every integration test shares."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from broker_server.blobs import BlobStore
from tests.support.blob_server import DIGEST, BlobServer
from tests.support.ports import free_port


@pytest.fixture
def anyio_backend() -> str:
    """The links hand over to asyncio."""
    return "asyncio"


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[BlobServer, Path]]:
    root = tmp_path_factory.mktemp("blobs")
    server = BlobServer(free_port(), root)
    server.start()
    yield server, root
    server.kill()


@pytest.fixture
def server(shared_server: tuple[BlobServer, Path]) -> BlobServer:
    return shared_server[0]


@pytest.fixture
def store(shared_server: tuple[BlobServer, Path]) -> BlobStore:
    """The server's folder, seen from here; empty of the test's blob."""
    store = BlobStore(shared_server[1])
    store.remove(DIGEST)
    return store
