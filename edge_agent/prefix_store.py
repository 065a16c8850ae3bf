"""Hidden states on disk: what the frozen layers make of each example, kept between rounds.

    <root>/<shelf>/states    the states, one example after the other, 2 bytes a value
    <root>/<shelf>/index     32 bytes an example: digest, offset, length, checksum

A shelf holds the states at one boundary of one base model under one prefix; its name is the digest
of all three. Nothing is overwritten: states are appended, then the index names them, so a process
that is killed leaves at most bytes that no record names. Pages that a power cut lost fail their
checksum and count as absent. Several processes may use one shelf. Files are read, not mapped: a
mapping's pages would count as the trainer's own memory.

Knows bytes and files; knows no torch and no model. Valid on Python 3.8, standard library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import struct
import zlib
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

DISK_SHARE = 0.25
"""Most of the disk that the cache may take, of what is free without it."""

_RECORD = struct.Struct("<16sQII")
_STATES = "states"
_INDEX = "index"


class PrefixStore:
    """All shelves of one device under one cap; the least recently used make room.

    Args:
        root: made when something is stored first.
        cap_bytes: most that the files may take together; 0 stores nothing.
    """

    def __init__(self, root: Path, cap_bytes: int) -> None:
        self._root = root
        self._cap_bytes = cap_bytes

    def shelf(self, name: str) -> Shelf:
        """Open a shelf, new or old; it is the most recently used from now on."""
        return Shelf(self, self._root / name)

    def used_bytes(self) -> int:
        """What the files of all shelves take."""
        return sum(_size_of(folder) for folder in self._shelves())

    def make_room(self, wanted_bytes: int, keep: Path) -> bool:
        """Whether so much more may be stored, after removing what was used longest ago.

        Args:
            wanted_bytes: about to be stored.
            keep: the shelf that they are for.
        """
        used = {folder: _size_of(folder) for folder in self._shelves()}
        total = sum(used.values())
        most = min(self._cap_bytes, int(DISK_SHARE * (_free_bytes(self._root) + total)))
        if used.get(keep, 0) + wanted_bytes > most:
            return False
        for folder in sorted(used, key=_used_at):
            if total + wanted_bytes <= most:
                break
            if folder != keep:
                shutil.rmtree(str(folder), ignore_errors=True)
                total -= used[folder]
        return True

    def _shelves(self) -> List[Path]:
        with contextlib.suppress(OSError):
            return [entry for entry in self._root.iterdir() if entry.is_dir()]
        return []


class Shelf:
    """The states of many examples at one boundary; a context manager that closes the files.

    Args:
        store: whose cap counts.
        folder: made with the first ``put``.
    """

    def __init__(self, store: PrefixStore, folder: Path) -> None:
        self._store = store
        self._folder = folder
        self._states: Optional[int] = None
        self._index: Optional[int] = None
        self._records: Dict[bytes, Tuple[int, int, int]] = {}
        self._index_read = 0
        if folder.is_dir():
            self._open()

    def __contains__(self, digest: bytes) -> bool:
        """Whether states of this example were stored; their bytes may still prove damaged."""
        if digest not in self._records:
            self._read_index()
        return digest in self._records

    def get(self, digest: bytes) -> Optional[bytes]:
        """The stored bytes of an example; None when absent or damaged."""
        if digest not in self or self._states is None:
            return None
        offset, length, checksum = self._records[digest]
        data = os.pread(self._states, length, offset)
        if len(data) == length and zlib.crc32(data) == checksum:
            return data
        del self._records[digest]
        return None

    def put(self, entries: Sequence[Tuple[bytes, bytes]]) -> bool:
        """Store the states of examples; False when there is no room for them.

        A full disk, too, is no error: training goes on without the cache.

        Args:
            entries: digest (16 bytes) and bytes of each example.
        """
        if not entries:
            return True
        wanted = sum(len(data) + _RECORD.size for _, data in entries)
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self._store.make_room(wanted, self._folder):
                return False
            if self._states is None:
                self._open()
            self._append(entries)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Close the files; harmless a second time."""
        for file in (self._states, self._index):
            if file is not None:
                os.close(file)
        self._states = self._index = None

    def __enter__(self) -> Shelf:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _open(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._states = os.open(str(self._folder / _STATES), flags, 0o600)
        self._index = os.open(str(self._folder / _INDEX), flags, 0o600)
        os.utime(str(self._folder))
        self._read_index()

    def _read_index(self) -> None:
        """Take in what was stored since, by whichever process; a torn last record waits."""
        if self._index is None:
            return
        size = os.fstat(self._index).st_size
        whole = size - size % _RECORD.size
        if whole <= self._index_read:
            return
        data = os.pread(self._index, whole - self._index_read, self._index_read)
        for digest, offset, length, checksum in _RECORD.iter_unpack(data):
            self._records[digest] = (offset, length, checksum)
        self._index_read = whole

    def _append(self, entries: Sequence[Tuple[bytes, bytes]]) -> None:
        if self._states is None or self._index is None:
            raise OSError("the shelf is closed")
        with _locked(self._index):
            offset = os.fstat(self._states).st_size
            records = []
            for digest, data in entries:
                _write_at(self._states, data, offset)
                records.append(_RECORD.pack(digest, offset, len(data), zlib.crc32(data)))
                offset += len(data)
            size = os.fstat(self._index).st_size
            # Over the torn record, if a writer was killed in the middle of one.
            _write_at(self._index, b"".join(records), size - size % _RECORD.size)
        self._read_index()


@contextlib.contextmanager
def _locked(file: int) -> Iterator[None]:
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


def _write_at(file: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


def _size_of(folder: Path) -> int:
    total = 0
    for name in (_STATES, _INDEX):
        with contextlib.suppress(OSError):
            total += (folder / name).stat().st_size
    return total


def _used_at(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0


def _free_bytes(folder: Path) -> int:
    state = os.statvfs(str(folder))
    return state.f_bavail * state.f_frsize
