"""Blobs and the link probe over HTTP. Knows requests and the blob store, nothing of rounds.

Bodies stream in both directions: no blob is ever held in memory as a whole.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial

import structlog
from anyio import to_thread
from fastapi import APIRouter, Request, Response, params
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from broker_server.blobs import (
    BlobStore,
    DiskFull,
    NoSuchBlob,
    TooLarge,
    Upload,
    WrongDigest,
    WrongOffset,
)
from wire_protocol.errors import LegendError, ProtocolError
from wire_protocol.messages import BlobRef

log = structlog.get_logger()

LARGEST_PROBE_BYTES = 4 * 1024**2
_PIECE_BYTES = 256 * 1024
_LARGEST_ANNOUNCEMENT_BYTES = 4096

_ANSWERS: dict[type[LegendError], tuple[int, str]] = {
    WrongOffset: (409, "wrong_offset"),
    WrongDigest: (422, "wrong_digest"),
    TooLarge: (413, "too_large"),
    NoSuchBlob: (404, "not_found"),
    DiskFull: (507, "disk_full"),
    ProtocolError: (400, "bad_request"),
}


def blob_router(
    store: BlobStore,
    *,
    dependencies: Sequence[params.Depends] = (),
    on_complete: Callable[[str], None] | None = None,
) -> APIRouter:
    """The routes below ``/v1``.

    Args:
        store: where blobs are kept.
        dependencies: checks that run before every route, e.g. of the token.
        on_complete: told the digest of every upload that became complete.
    """
    routes = _BlobRoutes(store, on_complete or (lambda _sha256: None))
    router = APIRouter(prefix="/v1", dependencies=list(dependencies))
    router.add_api_route("/blobs", routes.announce, methods=["POST"])
    router.add_api_route("/blobs/{sha256}", routes.append, methods=["PATCH"])
    router.add_api_route("/blobs/{sha256}", routes.fetch, methods=["GET"])
    router.add_api_route("/blobs/{sha256}", routes.fetch, methods=["HEAD"], include_in_schema=False)
    router.add_api_route("/probe", probe_down, methods=["GET"])
    router.add_api_route("/probe", probe_up, methods=["POST"])
    return router


class _BlobRoutes:
    """The handlers and what they share."""

    def __init__(self, store: BlobStore, on_complete: Callable[[str], None]) -> None:
        self._store = store
        self._on_complete = on_complete

    async def announce(self, request: Request) -> Response:
        """Say what will be uploaded; the answer says from which offset."""
        try:
            body = await _small_body(request)
            wanted = BlobRef.model_validate_json(body)
            upload = await to_thread.run_sync(
                self._store.open_upload, wanted.sha256, wanted.size_bytes
            )
        except ValidationError as error:
            return _error(400, "bad_request", _first_line(error))
        except LegendError as error:
            return _answer_to(error)
        if upload.complete:
            return JSONResponse({"state": "exists"})
        return JSONResponse({"state": "open", "offset": upload.offset}, status_code=201)

    async def append(self, sha256: str, request: Request) -> Response:
        """Add the body to an upload at ``Upload-Offset``."""
        text = request.headers.get("upload-offset", "")
        if not text.isdecimal():
            return _error(400, "bad_request", "the header Upload-Offset must be a number of bytes")
        upload = Upload(complete=False, offset=int(text))
        try:
            async for piece in _pieces(request):
                upload = await to_thread.run_sync(self._store.append, sha256, upload.offset, piece)
        except ClientDisconnect:
            # What arrived is kept; nobody is there to read an answer.
            return Response(status_code=400)
        except LegendError as error:
            return _answer_to(error)
        if upload.complete:
            log.info("blob_received", sha256=sha256, size_bytes=upload.offset)
            self._on_complete(sha256)
        return Response(status_code=204, headers={"Upload-Offset": str(upload.offset)})

    async def fetch(self, sha256: str) -> Response:
        """The content, or the range of it that is asked for."""
        try:
            path = self._store.path(sha256)
            status = await to_thread.run_sync(partial(os.stat, path))
        except FileNotFoundError:
            return _error(404, "not_found", f"no blob {sha256}")
        except LegendError as error:
            return _answer_to(error)
        return FileResponse(
            path,
            media_type="application/octet-stream",
            stat_result=status,
            # A digest names one content for ever.
            headers={"ETag": f'"{sha256}"', "Cache-Control": "public, max-age=31536000, immutable"},
        )


async def probe_down(request: Request) -> Response:
    """Random bytes, which no link can compress, to measure the way down."""
    text = request.query_params.get("bytes", "0")
    if not text.isdecimal() or int(text) > LARGEST_PROBE_BYTES:
        return _error(400, "bad_request", f"bytes must be 0 to {LARGEST_PROBE_BYTES}")
    size_bytes = int(text)
    return StreamingResponse(
        _random_bytes(size_bytes),
        media_type="application/octet-stream",
        headers={"Content-Length": str(size_bytes), "Cache-Control": "no-store"},
    )


async def probe_up(request: Request) -> Response:
    """Count what arrives, to measure the way up."""
    received = 0
    async for piece in request.stream():
        received += len(piece)
        if received > LARGEST_PROBE_BYTES:
            return _error(413, "too_large", f"a probe has at most {LARGEST_PROBE_BYTES} bytes")
    return JSONResponse({"bytes": received})


async def _random_bytes(size_bytes: int) -> AsyncIterator[bytes]:
    while size_bytes > 0:
        piece = os.urandom(min(size_bytes, 64 * 1024))
        size_bytes -= len(piece)
        yield piece


async def _pieces(request: Request) -> AsyncIterator[bytes]:
    """The body in pieces large enough to be worth a trip to a thread."""
    waiting = bytearray()
    try:
        async for piece in request.stream():
            waiting += piece
            if len(waiting) >= _PIECE_BYTES:
                yield bytes(waiting)
                waiting.clear()
    except ClientDisconnect:
        if waiting:
            yield bytes(waiting)
        raise
    if waiting:
        yield bytes(waiting)


async def _small_body(request: Request) -> bytes:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > _LARGEST_ANNOUNCEMENT_BYTES:
            raise TooLarge("the announcement of an upload is a few hundred bytes")
    return bytes(body)


def _answer_to(error: LegendError) -> Response:
    for kind, (status, code) in _ANSWERS.items():
        if isinstance(error, kind):
            more = {"offset": error.offset} if isinstance(error, WrongOffset) else {}
            return _error(status, code, str(error), more)
    return _error(503, "unavailable", str(error))


def _error(status: int, code: str, detail: str, more: dict[str, int] | None = None) -> JSONResponse:
    return JSONResponse({"error": code, "detail": detail, **(more or {})}, status_code=status)


def _first_line(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"]) or "body"
    return f"{place}: {first['msg']}"
