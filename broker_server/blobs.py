"""Bytes by their SHA-256, on disk: adapters, updates, base models.

    <root>/ab/abcdef...             a complete, verified blob; never changes
    <root>/parts/abcdef....<size>   an upload; as long as what has arrived

An upload needs no state but its file, so it continues after the server was killed. Every piece
names its offset and is appended only there: two devices that send the same blob help each other,
and a connection that was thought dead can do no harm. Knows files, not HTTP.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from wire_protocol.durable import (
    DONE,
    move_into_place,
    reached,
    remove_file,
    sync,
    write_in_halves,
)
from wire_protocol.errors import ConfigError, ProtocolError, ServerUnavailable

LARGEST_BLOB_BYTES = 8 * 1024**3
_DIGEST = re.compile(r"[0-9a-f]{64}")
_READ_BYTES = 1024 * 1024


class WrongOffset(ProtocolError):
    """A piece of an upload does not continue what is there.

    Args:
        offset: where to continue.
    """

    def __init__(self, offset: int) -> None:
        super().__init__(f"the upload continues at offset {offset}")
        self.offset = offset


class WrongDigest(ProtocolError):
    """The bytes of an upload are not those that its digest names; they were dropped."""


class TooLarge(ProtocolError):
    """More bytes than a blob may have, or than were announced."""


class NoSuchBlob(ProtocolError):
    """No blob and no upload has this digest."""


class DiskFull(ServerUnavailable):
    """The server has no space left; what has arrived is kept."""


@dataclass(frozen=True)
class Upload:
    """How far an upload is: ``offset`` bytes of it are here; or it is complete."""

    complete: bool
    offset: int


class BlobStore:
    """A folder of blobs. Safe to use from several threads of one process.

    Args:
        root: the folder; made if needed.
        largest_bytes: no blob may be larger.

    Raises:
        ConfigError: the folder cannot be used.
    """

    def __init__(self, root: Path, *, largest_bytes: int = LARGEST_BLOB_BYTES) -> None:
        self._root = root
        self._parts = root / "parts"
        self._largest_bytes = largest_bytes
        self._locks: dict[str, _CountedLock] = {}
        self._locks_guard = threading.Lock()
        try:
            self._parts.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot keep blobs in {root}: {error.strerror}") from error

    def path(self, sha256: str) -> Path:
        """Where a blob lies, whether or not it is there.

        Raises:
            ProtocolError: not a digest.
        """
        if not _DIGEST.fullmatch(sha256):
            raise ProtocolError(f"{sha256[:80]!r} is not a SHA-256 in lower-case hexadecimal")
        return self._root / sha256[:2] / sha256

    def has(self, sha256: str) -> bool:
        """Whether the blob is complete."""
        return self.path(sha256).is_file()

    def size_bytes(self, sha256: str) -> int:
        """The size of a complete blob.

        Raises:
            NoSuchBlob: it is not here.
        """
        try:
            return self.path(sha256).stat().st_size
        except FileNotFoundError as error:
            raise NoSuchBlob(f"no blob {sha256}") from error

    def read(self, sha256: str) -> bytes:
        """The whole content; for blobs known to be small.

        Raises:
            NoSuchBlob: it is not here.
        """
        try:
            return self.path(sha256).read_bytes()
        except FileNotFoundError as error:
            raise NoSuchBlob(f"no blob {sha256}") from error

    def put(self, content: bytes) -> str:
        """Store bytes that this process made; they are on disk before this returns.

        Returns:
            Their digest.

        Raises:
            DiskFull: there is no space.
        """
        sha256 = hashlib.sha256(content).hexdigest()
        if self.has(sha256):
            return sha256
        with self._locked(sha256), _disk_errors():
            descriptor, name = tempfile.mkstemp(dir=self._parts, prefix="put-")
            temporary = Path(name)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    write_in_halves(file, content, site="server.blob")
                self._publish(temporary, sha256)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        return sha256

    def adopt(self, other: BlobStore, sha256: str) -> None:
        """Take a complete blob of another store on the same disk in, unless it is here.

        Raises:
            NoSuchBlob: the other store does not have it.
        """
        with self._locked(sha256), _disk_errors():
            if self.has(sha256):
                return
            link = self._parts / f"adopted-{sha256}"
            link.unlink(missing_ok=True)
            try:
                os.link(other.path(sha256), link)
            except FileNotFoundError as error:
                raise NoSuchBlob(f"no blob {sha256}") from error
            self._publish(link, sha256)

    def digests(self) -> set[str]:
        """Of everything that is here, complete or not; for small stores."""
        parts = {part.name.partition(".")[0] for part in self._parts.iterdir()}
        blobs = {path.name for path in self._root.glob("??/*")}
        return {name for name in parts | blobs if _DIGEST.fullmatch(name)}

    def open_upload(self, sha256: str, size_bytes: int) -> Upload:
        """Begin an upload, or find out where to continue it.

        Announcing another size than before starts again from nothing.

        Raises:
            ProtocolError: not a digest, or the digest of nothing with another size.
            TooLarge: larger than a blob may be.
            DiskFull: not even the rest of it fits on the disk now.
        """
        if not 0 <= size_bytes <= self._largest_bytes:
            raise TooLarge(f"a blob of {size_bytes} bytes; the limit is {self._largest_bytes}")
        with self._locked(sha256), _disk_errors():
            if self.has(sha256):
                return Upload(complete=True, offset=self.size_bytes(sha256))
            part = self._parts / f"{sha256}.{size_bytes}"
            for other in self._parts.glob(f"{sha256}.*"):
                if other != part:
                    other.unlink(missing_ok=True)
            part.touch(mode=0o600)
            offset = part.stat().st_size
            self._check_space(size_bytes - offset)
            if offset >= size_bytes:
                self._finish(part, sha256, size_bytes)
                return Upload(complete=True, offset=size_bytes)
            return Upload(complete=False, offset=offset)

    def append(self, sha256: str, offset: int, piece: bytes) -> Upload:
        """Add the next bytes of an upload; with the last ones the whole is verified.

        Raises:
            NoSuchBlob: the upload was never opened.
            WrongOffset: the bytes do not continue what is there; says where to continue.
            TooLarge: more bytes than were announced.
            WrongDigest: complete, but not what the digest names; starts again from nothing.
            DiskFull: there is no space; what was written counts.
        """
        with self._locked(sha256), _disk_errors():
            if self.has(sha256):
                return Upload(complete=True, offset=self.size_bytes(sha256))
            part, size_bytes = self._part(sha256)
            present = part.stat().st_size
            if offset != present:
                raise WrongOffset(present)
            if offset + len(piece) > size_bytes:
                raise TooLarge(f"upload of more than the announced {size_bytes} bytes")
            with part.open("ab") as file:
                write_in_halves(file, piece, site="server.upload")
            reached("server.upload", DONE)
            if offset + len(piece) == size_bytes:
                self._finish(part, sha256, size_bytes)
                return Upload(complete=True, offset=size_bytes)
            return Upload(complete=False, offset=offset + len(piece))

    def remove(self, sha256: str) -> None:
        """Drop a blob and its upload, if they are here."""
        with self._locked(sha256):
            remove_file(self.path(sha256), site="server.blob.spent")
            for part in self._parts.glob(f"{sha256}.*"):
                part.unlink(missing_ok=True)

    def remove_parts_older_than(self, age_s: float, *, now: float) -> int:
        """Drop uploads that nobody continued.

        Args:
            age_s: seconds since the last piece.
            now: seconds since 1970, as the file system counts.

        Returns:
            How many were dropped.
        """
        removed = 0
        for part in self._parts.iterdir():
            with suppress(FileNotFoundError):
                if now - part.stat().st_mtime > age_s:
                    part.unlink()
                    removed += 1
        return removed

    def _part(self, sha256: str) -> tuple[Path, int]:
        for part in self._parts.glob(f"{sha256}.*"):
            return part, int(part.suffix[1:])
        raise NoSuchBlob(f"no upload of {sha256} is open; announce it first")

    def _finish(self, part: Path, sha256: str, size_bytes: int) -> None:
        if part.stat().st_size != size_bytes or _digest_of(part) != sha256:
            part.unlink()
            raise WrongDigest(f"the uploaded bytes are not {sha256}; send them again from 0")
        self._publish(part, sha256)

    def _publish(self, temporary: Path, sha256: str) -> None:
        target = self.path(sha256)
        target.parent.mkdir(mode=0o700, exist_ok=True)
        sync(temporary)
        move_into_place(temporary, target, site="server.blob")

    def _check_space(self, missing_bytes: int) -> None:
        disk = os.statvfs(self._parts)
        if missing_bytes > disk.f_bavail * disk.f_frsize:
            raise DiskFull(f"the server has no space for {missing_bytes} bytes in {self._root}")

    @contextmanager
    def _locked(self, sha256: str) -> Iterator[None]:
        self.path(sha256)  # refuses what is no digest, before it becomes a file name
        with self._locks_guard:
            entry = self._locks.setdefault(sha256, _CountedLock())
            entry.users += 1
        try:
            with entry.lock:
                yield
        finally:
            with self._locks_guard:
                entry.users -= 1
                if entry.users == 0:
                    del self._locks[sha256]


class _CountedLock:
    """A lock that is forgotten when nobody wants it any more."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull("the server's disk is full; free some space and send again") from error
        raise


def _digest_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()
