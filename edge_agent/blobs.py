"""The device's side of the server's HTTP API: blobs, base models, the link probe.

Every transfer continues where it broke, is verified against its digest before anybody sees it, and
gives up only when nothing came through for a long time. Knows blobs; nothing of rounds.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import structlog
from anyio import to_thread
from typing_extensions import Self

from edge_agent.link import ShapedLink
from edge_agent.model_cache import ModelCheck, remove_strangers, set_aside
from edge_agent.model_manifest import ModelFile, model_files
from edge_agent.server_connection import Patience, Rejected, Retries, ServerConnection
from edge_agent.state_dir import disk_error
from wire_protocol.durable import DONE, move_into_place, reached, sync
from wire_protocol.errors import DeviceError, FailureCode, ProtocolError, Refused, ServerUnavailable
from wire_protocol.parts import BlobRef

log = structlog.get_logger()

OnProgress = Callable[[int, int], None]
"""Told how many bytes came through, or are on their way up, and the total."""

_PIECE_BYTES = 1024 * 1024
_CHUNK_BYTES = 64 * 1024
_WRITE_BYTES = 256 * 1024
"""Worth a trip to a thread: a slow card may make a write wait."""

_REQUEST_BYTES = 16 * 1024 * 1024
"""Most bytes that one request sends; the server keeps what arrived of a broken one."""

# The server forgot the upload, or another device that sends the same blob was faster.
_ASK_AGAIN = frozenset({404, 409})
_DAMAGED = 422


class BlobClient:
    """Fetches and sends blobs; use it as an async context manager.

    Args:
        server_url: e.g. ``http://server:8080``.
        token: sent as bearer token; None sends none.
        link: paces every transfer, for emulated boards.
        patience: how long transfers are tried.
        tls: for https: whom to believe and what to present; None trusts the system's authorities.
    """

    def __init__(
        self,
        server_url: str,
        *,
        token: str | None = None,
        link: ShapedLink | None = None,
        patience: Patience | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._link = link or ShapedLink()
        self._patience = patience or Patience()
        self._server = ServerConnection(
            server_url, token=token, answer_s=self._patience.answer_s, tls=tls
        )
        self._one_model_at_a_time = anyio.Lock()
        self._models = ModelCheck()
        self.sent_bytes = 0
        """Blob bytes that went up so far, whatever became of them."""
        self.received_bytes = 0
        """Blob bytes that came down so far."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self._server.close()

    async def get_json(self, path: str) -> dict[str, Any]:
        """Ask once.

        Raises:
            ServerUnavailable: no answer, or the server is in trouble.
            Refused: the server says no, and why.
            ProtocolError: the answer is not a JSON object.
        """
        try:
            answer = await self._server.ask("GET", path)
        except Rejected as error:
            raise Refused(str(error)) from error
        await self._link.asked()
        return answer

    async def probe_down(self, size_bytes: int) -> None:
        """Fetch random bytes; see ``edge_agent.link.measure_link``."""
        async with self._server.stream("GET", f"/v1/probe?bytes={size_bytes}") as response:
            await self._link.asked()
            async for chunk in response.aiter_raw(_CHUNK_BYTES):
                await self._link.received(len(chunk))

    async def probe_up(self, size_bytes: int) -> None:
        """Send bytes that no link can compress."""
        await self._send("POST", "/v1/probe", _noise(size_bytes), size_bytes, {})

    async def download(
        self,
        sha256: str,
        size_bytes: int,
        target: Path,
        *,
        flush: bool = True,
        on_progress: OnProgress | None = None,
    ) -> Path:
        """Bring a blob to ``target``, unless it is there already.

        What arrived of it before is in ``<target>.part`` and is continued.

        Args:
            sha256: its name.
            size_bytes: its size.
            target: where to put it.
            flush: False where its digest is looked at again before it is used again.
            on_progress: told about every chunk.

        Raises:
            DeviceError: DOWNLOAD_FAILED, WRONG_DIGEST (twice, the second time from nothing) or
                DISK_FULL.
            Refused: the server says no.
        """
        ref = BlobRef(sha256=sha256, size_bytes=size_bytes)
        if await to_thread.run_sync(_holds, target, ref):
            os.utime(target)  # used just now: the cache drops what was used longest ago
            return target
        part = target.with_name(target.name + ".part")
        for _ in range(2):
            await self._fetch(ref, part, on_progress or (lambda _done, _total: None))
            if await to_thread.run_sync(_holds, part, ref):
                await to_thread.run_sync(partial(_publish, part, target, flush=flush))
                return target
            log.warning("download_was_corrupt", sha256=sha256)
            part.unlink(missing_ok=True)
        raise DeviceError(
            FailureCode.WRONG_DIGEST, f"blob {sha256[:12]} arrives damaged; check the server's disk"
        )

    async def upload(self, path: Path, *, on_progress: OnProgress | None = None) -> BlobRef:
        """Send a file; continues at the server's offset after every loss.

        Returns:
            How to name it in a message.

        Raises:
            DeviceError: UPLOAD_FAILED, or MISSING_FILE.
            Refused: the server says no.
        """
        try:
            ref = await to_thread.run_sync(_ref_of, path)
        except OSError as error:
            raise DeviceError(
                FailureCode.MISSING_FILE, f"cannot read {path}: {error.strerror}"
            ) from error
        retries = Retries(self._patience, FailureCode.UPLOAD_FAILED)
        try:
            return await retries.run(partial(self._upload_once, ref, path, retries, on_progress))
        except Rejected as error:
            if error.status != _DAMAGED:
                raise DeviceError(FailureCode.UPLOAD_FAILED, f"upload: {error}") from error
            log.warning("upload_was_damaged", sha256=ref.sha256)
        retries = Retries(self._patience, FailureCode.UPLOAD_FAILED)
        try:
            return await retries.run(partial(self._upload_once, ref, path, retries, on_progress))
        except Rejected as error:
            raise DeviceError(FailureCode.UPLOAD_FAILED, f"upload: {error}") from error

    async def fetch_model(self, digest: str, cache_dir: Path) -> Path:
        """Bring a base model to ``<cache_dir>/models/<digest>``, unless it is there already.

        The folder appears only when every file in it is complete and verified; one that was
        changed since is put right.

        Raises:
            DeviceError: DOWNLOAD_FAILED, WRONG_DIGEST, DISK_FULL.
            Refused: the server says no.
        """
        target = cache_dir / "models" / digest
        async with self._one_model_at_a_time:
            folder = target.with_name(f"{digest}.part")
            if target.is_dir():
                if await to_thread.run_sync(self._models.holds, target, digest):
                    return target
                log.error("base_model_was_changed", model=digest, folder=str(target))
                await to_thread.run_sync(set_aside, target, folder)
            files = await self._describe(digest)
            await to_thread.run_sync(remove_strangers, folder, files)
            _check_space(folder, files)
            for file in files:
                place = folder / file.path
                place.parent.mkdir(parents=True, exist_ok=True)
                await self.download(file.sha256, file.size_bytes, place)
            await to_thread.run_sync(_put_in_place, folder, target)
        log.info("base_model_fetched", model=digest, files=len(files))
        return target

    async def _describe(self, digest: str) -> list[ModelFile]:
        async def attempt() -> list[ModelFile]:
            await self._link.asked()
            return model_files(await self._server.ask("GET", f"/v1/models/{digest}"), digest)

        try:
            return await Retries(self._patience, FailureCode.DOWNLOAD_FAILED).run(attempt)
        except ProtocolError as error:
            raise DeviceError(FailureCode.DOWNLOAD_FAILED, str(error)) from error

    async def _fetch(self, ref: BlobRef, part: Path, on_progress: OnProgress) -> None:
        """Append to ``part`` until it is as long as the blob."""
        retries = Retries(self._patience, FailureCode.DOWNLOAD_FAILED)
        attempt = partial(self._fetch_once, ref, part, retries, on_progress)
        try:
            await retries.run(attempt)
        except OSError as error:
            raise disk_error(part, error) from error
        except Rejected as error:
            raise DeviceError(FailureCode.DOWNLOAD_FAILED, f"download: {error}") from error

    async def _fetch_once(
        self, ref: BlobRef, part: Path, retries: Retries, on_progress: OnProgress
    ) -> None:
        offset = _size_bytes(part)
        if offset > ref.size_bytes:
            part.unlink()
            offset = 0
        if offset == ref.size_bytes > 0:
            return
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        url = f"/v1/blobs/{ref.sha256}"
        async with self._server.stream("GET", url, headers=headers) as response:
            await self._link.asked()
            done = offset if response.status_code == 206 else 0
            with part.open("ab" if done else "wb") as file:
                waiting = bytearray()
                try:
                    async for chunk in response.aiter_raw(_CHUNK_BYTES):
                        done += len(chunk)
                        self.received_bytes += len(chunk)
                        if done > ref.size_bytes:
                            raise Rejected(response.status_code, "it is longer than announced")
                        waiting += chunk
                        if len(waiting) >= _WRITE_BYTES or done == ref.size_bytes:
                            piece, waiting = bytes(waiting), bytearray()
                            await to_thread.run_sync(file.write, piece)
                            reached("agent.download_chunk", DONE)
                        retries.progressed()
                        await self._link.received(len(chunk))
                        on_progress(done, ref.size_bytes)
                finally:
                    # Nothing waits here unless the transfer broke, which is what is to be reported.
                    with suppress(OSError):
                        file.write(waiting)

    async def _upload_once(
        self, ref: BlobRef, path: Path, retries: Retries, on_progress: OnProgress | None
    ) -> BlobRef:
        try:
            return await self._upload_from_offset(ref, path, retries, on_progress)
        except Rejected as error:
            if error.status in _ASK_AGAIN:
                raise ServerUnavailable(str(error)) from error
            raise

    async def _upload_from_offset(
        self, ref: BlobRef, path: Path, retries: Retries, on_progress: OnProgress | None
    ) -> BlobRef:
        await self._link.asked()
        announced = ref.model_dump(mode="json")
        answer = await self._server.ask("POST", "/v1/blobs", json=announced)
        offset = ref.size_bytes if answer.get("state") == "exists" else _offset_in(answer)

        def sent(end: int) -> None:
            retries.arrived(end)
            if on_progress is not None:
                on_progress(end, ref.size_bytes)

        while offset < ref.size_bytes:
            end = min(offset + _REQUEST_BYTES, ref.size_bytes)
            body = self._part_of(path, offset, end, sent)
            headers = {"Upload-Offset": str(offset)}
            await self._send("PATCH", f"/v1/blobs/{ref.sha256}", body, end - offset, headers)
            offset = end
        return ref

    async def _part_of(
        self, path: Path, begin: int, end: int, sent: Callable[[int], None]
    ) -> AsyncIterator[bytes]:
        """The bytes of a file from ``begin`` to ``end``; ``sent`` hears how far it is."""
        with path.open("rb") as file:
            file.seek(begin)
            while begin < end:
                piece = await to_thread.run_sync(file.read, min(_PIECE_BYTES, end - begin))
                if not piece:
                    raise Rejected(_DAMAGED, f"{path} became shorter while it was sent")
                for start in range(0, len(piece), _CHUNK_BYTES):
                    chunk = piece[start : start + _CHUNK_BYTES]
                    yield chunk
                    begin += len(chunk)
                    self.sent_bytes += len(chunk)
                    sent(begin)

    async def _send(
        self,
        method: str,
        url: str,
        body: AsyncIterator[bytes],
        size_bytes: int,
        headers: dict[str, str],
    ) -> None:
        async def paced() -> AsyncIterator[bytes]:
            async for chunk in body:
                yield chunk
                await self._link.sent(len(chunk))

        length = {"Content-Length": str(size_bytes)}
        async with self._server.stream(
            method, url, content=paced(), headers={**headers, **length}
        ) as response:
            await response.aread()
        await self._link.asked()


def _size_bytes(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _offset_in(answer: dict[str, Any]) -> int:
    offset = answer.get("offset")
    if not isinstance(offset, int) or offset < 0:
        raise Rejected(200, "the server's answer to the announcement has no offset")
    return offset


async def _noise(size_bytes: int) -> AsyncIterator[bytes]:
    for begin in range(0, size_bytes, _CHUNK_BYTES):
        yield os.urandom(min(_CHUNK_BYTES, size_bytes - begin))


def _ref_of(path: Path) -> BlobRef:
    digest, size_bytes = hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
            size_bytes += len(piece)
    return BlobRef(sha256=digest.hexdigest(), size_bytes=size_bytes)


def _holds(path: Path, ref: BlobRef) -> bool:
    try:
        return path.stat().st_size == ref.size_bytes and _ref_of(path) == ref
    except FileNotFoundError:
        return False


def _publish(part: Path, target: Path, *, flush: bool) -> None:
    try:
        if flush:
            sync(part)
        move_into_place(part, target, site="agent.blob", flush=flush)
    except OSError as error:
        raise disk_error(target, error) from error


def _put_in_place(folder: Path, target: Path) -> None:
    try:
        # Its files are on the disk; here the names in its folders follow.
        for inner in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
            sync(inner)
        move_into_place(folder, target, site="agent.base_model")
    except OSError as error:
        raise disk_error(target, error) from error


def _check_space(folder: Path, files: list[ModelFile]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    present_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    missing_bytes = sum(file.size_bytes for file in files) - present_bytes
    free_bytes = shutil.disk_usage(folder).free
    if missing_bytes > free_bytes:
        raise DeviceError(
            FailureCode.DISK_FULL,
            f"the base model needs {missing_bytes} more bytes, {folder} has {free_bytes} free",
        )
