"""A real HTTP server with the blob routes, in a process of its own.

python -m tests.support.blob_server PORT BLOB_ROOT [TOKEN]
"""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import uvicorn
from fastapi import Depends, FastAPI, Header, HTTPException
from fastapi.responses import FileResponse

from broker_server.blob_api import blob_router
from broker_server.blobs import BlobStore
from tests.support.ports import answers, wait_until

CONTENT = random.Random(3).randbytes(6_000_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class BlobServer:
    """The child process; may be killed and started again on the same port and folder."""

    def __init__(self, port: int, root: Path, token: str = "") -> None:
        self._arguments = [str(port), str(root), token]
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"http://127.0.0.1:{port}"

    def start(self) -> None:
        """Return once it accepts connections."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.blob_server", *self._arguments]
        )
        wait_until(lambda: answers(self._port))

    def kill(self) -> None:
        """As a power cut would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def app(root: Path, token: str) -> FastAPI:
    """The blob routes, and base models that are described by a file next to the blobs."""

    def check(authorization: Annotated[str, Header()] = "") -> None:
        if token and authorization != f"Bearer {token}":
            raise HTTPException(403, "this token is not known")

    application = FastAPI()

    @application.get("/v1/models/{digest}")
    def describe(digest: str) -> FileResponse:
        return FileResponse(root / f"{digest}.json")

    application.include_router(blob_router(BlobStore(root), dependencies=[Depends(check)]))
    return application


if __name__ == "__main__":
    uvicorn.run(
        app(Path(sys.argv[2]), sys.argv[3]),
        host="127.0.0.1",
        port=int(sys.argv[1]),
        log_level="warning",
    )
