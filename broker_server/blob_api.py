"""Blobs and the link probe over HTTP. Knows requests and the blob store, nothing of rounds.

Bodies stream in both directions: no blob is ever held in memory as a whole.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial

import structlog
from anyio import to_thread
from fastapi import APIRouter, Request, Response, params
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from broker_server.access import IDENTITY, Identity, Refusal
from broker_server.blob_rights import BlobRights
from broker_server.blobs import (
    BlobStore,
    DiskFull,
    NoSuchBlob,
    TooLarge,
    Upload,
    WrongDigest,
    WrongOffset,
)
from broker_server.device_uploads import TooManyUploads
from wire_protocol.errors import LegendError, ProtocolError, one_line
from wire_protocol.parts import BlobRef

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
    rights: BlobRights | None = None,
    on_refused: Callable[[Refusal, Request], Response] | None = None,
) -> APIRouter:
    """The routes below ``/v1``.

    Args:
        store: where blobs are kept.
        dependencies: checks that run before every route, e.g. of the token.
        on_complete: told the digest of every upload that became complete.
        rights: of devices, for their uploads; None: uploads have no owners.
        on_refused: answers a device that has no right to its request.
    """
    routes = _BlobRoutes(
        store, on_complete or (lambda _sha256: None), rights, on_refused or _plain_refusal
    )
    router = APIRouter(prefix="/v1", dependencies=list(dependencies))
    router.add_api_route("/blobs", routes.announce, methods=["POST"])
    router.add_api_route("/blobs/{sha256}", routes.append, methods=["PATCH"])
    router.add_api_route("/blobs/{sha256}", routes.fetch, methods=["GET"])
    router.add_api_route("/blobs/{sha256}", routes.fetch, methods=["HEAD"], include_in_schema=False)
    router.add_api_route("/probe", probe_down, methods=["GET"])
    router.add_api_route("/probe", probe_up, methods=["POST"])
    return router


@dataclass(frozen=True)
class _Uploads:
    """One of the places that uploads go to."""

    open: Callable[[str, int], Upload]
    append: Callable[[str, int, bytes], Upload]


class _BlobRoutes:
    """The handlers and what they share."""

    def __init__(
        self,
        store: BlobStore,
        on_complete: Callable[[str], None],
        rights: BlobRights | None,
        on_refused: Callable[[Refusal, Request], Response],
    ) -> None:
        self._store = store
        self._on_complete = on_complete
        self._rights = rights
        self._on_refused = on_refused

    def _uploads_for(self, request: Request, size_bytes: int = 0) -> _Uploads | Refusal:
        """Where this request's uploads go: to the asking device's own place, or the server's."""
        identity = request.scope.get(IDENTITY)
        owner = identity.owner if isinstance(identity, Identity) else None
        if owner is None or self._rights is None:
            return _Uploads(self._store.open_upload, self._store.append)
        refusal = self._rights.may_send(owner, size_bytes)
        if refusal is not None:
            return refusal
        uploads = self._rights.uploads
        return _Uploads(partial(uploads.open_upload, owner), partial(uploads.append, owner))

    async def announce(self, request: Request) -> Response:
        """Say what will be uploaded; the answer says from which offset."""
        try:
            body = await _small_body(request)
            wanted = BlobRef.model_validate_json(body)
            uploads = self._uploads_for(request, wanted.size_bytes)
            if isinstance(uploads, Refusal):
                return self._on_refused(uploads, request)
            upload = await to_thread.run_sync(uploads.open, wanted.sha256, wanted.size_bytes)
        except ValidationError as error:
            return _error(400, "bad_request", _first_line(error))
        except TooManyUploads as error:
            return self._on_refused(Refusal(403, "too_many_uploads", str(error)), request)
        except LegendError as error:
            return _answer_to(error)
        if upload.complete:
            return JSONResponse({"state": "exists"})
        return JSONResponse({"state": "open", "offset": upload.offset}, status_code=201)

    async def append(self, sha256: str, request: Request) -> Response:
        """Add the body to an upload at ``Upload-Offset``."""
        text = request.headers.get("upload-offset", "")
        offset = _number_of_bytes(text)
        if offset is None:
            return _error(400, "bad_request", "the header Upload-Offset must be a number of bytes")
        upload = Upload(complete=False, offset=offset)
        uploads = self._uploads_for(request)
        if isinstance(uploads, Refusal):
            return self._on_refused(uploads, request)
        try:
            async for piece in _pieces(request):
                upload = await to_thread.run_sync(uploads.append, sha256, upload.offset, piece)
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
        return _BlobResponse(
            path,
            media_type="application/octet-stream",
            stat_result=status,
            # A digest names one content for ever.
            headers={"ETag": f'"{sha256}"', "Cache-Control": "public, max-age=31536000, immutable"},
        )


class _BlobResponse(FileResponse):
    """A file in pieces large enough to be worth a trip to a thread each; at most one waits."""

    chunk_size = _PIECE_BYTES


async def probe_down(request: Request) -> Response:
    """Random bytes, which no link can compress, to measure the way down."""
    text = request.query_params.get("bytes", "0")
    size_bytes = _number_of_bytes(text)
    if size_bytes is None or size_bytes > LARGEST_PROBE_BYTES:
        return _error(400, "bad_request", f"bytes must be 0 to {LARGEST_PROBE_BYTES}")
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


def _number_of_bytes(text: str) -> int | None:
    """Read a count; Python refuses to convert thousands of digits with an error of its own."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 20 else None


def _plain_refusal(refusal: Refusal, _request: Request) -> Response:
    return _error(refusal.status, refusal.reason, refusal.detail)


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
    return one_line(f"{place}: {first['msg']}")
