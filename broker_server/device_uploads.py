"""Uploads of devices that are told apart: a small blob store of its own for each of them.

    <root>/<device id>/...          see ``blobs``

A device learns nothing about what others sent or the server has, and can disturb none of it. Its
update becomes a blob of the server when its manifest names it; the rest is dropped with the end of
the assignment. Safe to use from several threads of one process.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Collection
from pathlib import Path

from broker_server.blobs import BlobStore, NoSuchBlob, Upload
from wire_protocol.errors import ProtocolError
from wire_protocol.topics import check_name


class TooManyUploads(ProtocolError):
    """A device has as many uploads as its assignment can need."""


class DeviceUploads:
    """The upload folders of all devices.

    Args:
        root: on the same disk as ``blobs``.
        blobs: the server's store.
        most: so many uploads may one device have at a time, finished or not.
    """

    def __init__(self, root: Path, blobs: BlobStore, *, most: int) -> None:
        self._root = root
        self._blobs = blobs
        self._most = most
        self._stores: dict[str, BlobStore] = {}
        self._lock = threading.RLock()

    def open_upload(self, device_id: str, sha256: str, size_bytes: int) -> Upload:
        """Begin an upload of a device, or find out where to continue it.

        Raises:
            TooManyUploads: it has begun too many others.
            ProtocolError, DiskFull: see ``BlobStore.open_upload``.
        """
        with self._lock:
            store = self._store(device_id)
            others = store.digests() - {sha256}
            if len(others) >= self._most:
                raise TooManyUploads(f"{len(others)} uploads are more than an assignment needs")
            return store.open_upload(sha256, size_bytes)

    def append(self, device_id: str, sha256: str, offset: int, piece: bytes) -> Upload:
        """Add the next bytes of a device's upload.

        Raises:
            NoSuchBlob: this device has not opened it, or its assignment has ended.
            ProtocolError, DiskFull: see ``BlobStore.append``.
        """
        try:
            if self._folder(device_id).is_dir():
                return self._store(device_id).append(sha256, offset, piece)
        except FileNotFoundError:
            pass  # dropped a moment ago
        raise NoSuchBlob(f"no upload of {sha256} is open; announce it first")

    def adopt(self, device_id: str, sha256: str) -> bool:
        """Make a device's finished upload a blob of the server; false when there is none."""
        if not self._folder(device_id).is_dir():
            return False
        try:
            self._blobs.adopt(self._store(device_id), sha256)
        except NoSuchBlob:
            return False
        return True

    def drop(self, device_id: str) -> None:
        """Delete what a device has sent and nobody will ask for."""
        with self._lock:
            self._stores.pop(device_id, None)
            shutil.rmtree(self._folder(device_id), ignore_errors=True)

    def keep_only(self, device_ids: Collection[str]) -> None:
        """Delete the uploads of every other device."""
        if self._root.is_dir():
            for folder in self._root.iterdir():
                if folder.name not in device_ids:
                    shutil.rmtree(folder, ignore_errors=True)

    def _folder(self, device_id: str) -> Path:
        return self._root / check_name("device id", device_id)

    def _store(self, device_id: str) -> BlobStore:
        with self._lock:
            store = self._stores.get(device_id)
            if store is None:
                store = self._stores[device_id] = BlobStore(self._folder(device_id))
            return store
