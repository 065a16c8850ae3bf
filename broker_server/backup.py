"""``POST /v1/backup``: everything that a server needs to go on elsewhere, while it runs.

The picture is taken between two steps of the event loop: the database is copied and every other
file gets a second name, so that what a run deletes a moment later is still there to be read.

Left out: uploads in progress (devices continue or repeat them), base models (they are built from
blobs), what the broker queues (devices send again what was not acknowledged), logs.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from datetime import datetime, timezone
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path

from broker_server.backup_archive import BackupManifest, Member, archive_pieces
from broker_server.database_file import copy_database
from broker_server.server import Server
from wire_protocol.errors import ConfigError, Refused

DATABASE_FILE = "server.db"
SNAPSHOT_PREFIX = ".backup-"
UNFINISHED = "restore-unfinished"
"""There while a restore exchanges old files and new ones."""
OUTSIDE_PKI = "pki-outside"
"""Folder of the archive for certificates that are not kept in the state directory."""
LEFT_OUT = (
    DATABASE_FILE,
    DATABASE_FILE + "-*",
    "lock",
    "server.json",
    "models/*",
    "*/parts/*",
    "uploads/*",
    "broker/mosquitto.db*",
    "broker/pid",
    "before-restore-*",
    "*.log",
)


class Snapshot:
    """The state of a server at one moment, for as long as it is being read.

    Args:
        server: is not changed.

    Raises:
        Refused: another backup is being made.
        DatabaseUnavailable: no space is left for the copy of the database.
    """

    def __init__(self, server: Server) -> None:
        root = server.state.root
        if any(root.glob(SNAPSHOT_PREFIX + "*/busy")):
            raise Refused("another backup is being made; wait for its end")
        self._folder = Path(tempfile.mkdtemp(prefix=SNAPSHOT_PREFIX, dir=root))
        # Nobody may ever read a piece: a client that is gone must not block all later backups.
        self._forget = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        try:
            (self._folder / "busy").touch()
            self._members = _linked(root, self._folder / "files")
            pki = server.settings.pki
            if pki is not None and not pki.resolve().is_relative_to(root.resolve()):
                self._members += _linked(pki, self._folder / "files", prefix=f"{OUTSIDE_PKI}/")
            if (file := server.store.file) is not None:
                copy = self._folder / DATABASE_FILE
                copy_database(file, copy)
                copy.chmod(0o600)
                self._members.append(Member(DATABASE_FILE, copy))
        except BaseException:
            self.close()
            raise
        self.about = BackupManifest(
            version=version("legend-edge"),
            fleet=server.settings.fleet,
            made_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            database=server.store.kind,
            start_number=server.voice.start_number,
            runs=server.store.statuses(),
        )

    def pieces(self) -> Iterator[bytes]:
        """The archive; the snapshot is gone when it ends, however it ends."""
        try:
            yield from archive_pieces(self._members, self.about)
        finally:
            self.close()

    def close(self) -> None:
        """Forget it."""
        self._forget()


def check_restored(root: Path) -> None:
    """Refuse a state directory of which a killed restore has exchanged a part.

    Raises:
        ConfigError: the restore must be run again.
    """
    if (root / UNFINISHED).exists():
        raise ConfigError(
            f"a restore into {root} was interrupted; run it again: "
            "broker-server restore FILE --force"
        )


def remove_stale_snapshots(root: Path) -> None:
    """Delete what a killed server left of a backup; called before anything is served."""
    for folder in root.glob(SNAPSHOT_PREFIX + "*"):
        shutil.rmtree(folder, ignore_errors=True)


def _linked(root: Path, folder: Path, *, prefix: str = "") -> list[Member]:
    """A second name for every file, so that its content outlives the first."""
    members = []
    for place, folders, names in os.walk(root):
        # Names that begin with a dot are half-written, or a snapshot.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(place) / name
            relative = prefix + path.relative_to(root).as_posix()
            if name.startswith(".") or any(fnmatch(relative, left) for left in LEFT_OUT):
                continue
            second = folder / relative
            second.parent.mkdir(parents=True, exist_ok=True)
            try:
                _link_or_copy(path, second)
            except FileNotFoundError:
                continue  # removed since it was listed, by a thread: nothing refers to it
            members.append(Member(relative, second))
    return members


def _link_or_copy(path: Path, second: Path) -> None:
    try:
        os.link(path, second)
    except (PermissionError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        shutil.copy2(path, second)
