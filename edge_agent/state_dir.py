"""The state directory: what an agent keeps on disk, and who may use it.

    <root>/lock                  held while an agent runs; contains its process id
    <root>/counters/<name>       numbers that only ever grow
    <root>/identity/             key and certificate of an enrolled device
    <root>/outbox/               messages that the server has not acknowledged
    <root>/rounds/<assignment>/  one round directory per assignment
    <root>/residuals/            what a coarse codec left out so far
    <root>/cache/blobs/          adapters by digest
    <root>/cache/models/         base models by digest

Knows paths and durable files; knows nothing of messages, rounds or the network.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

from wire_protocol import durable
from wire_protocol.errors import AlreadyRunning, ConfigError, DeviceError, FailureCode
from wire_protocol.parts import Identifier

log = structlog.get_logger()


class StateDir:
    """The agent's directory, made on construction and readable by its owner only.

    Args:
        root: where it lies; parents are made as needed.

    Raises:
        ConfigError: it cannot be made or written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for folder in (
                self.outbox,
                self.rounds,
                self.blobs,
                self.models,
                self.root / "counters",
            ):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot use {root} as state directory: {error.strerror}") from error
        if not os.access(root, os.W_OK | os.X_OK):
            raise ConfigError(f"cannot write to the state directory {root}: change its owner")

    @property
    def outbox(self) -> Path:
        """Messages that wait for the server's acknowledgement."""
        return self.root / "outbox"

    @property
    def rounds(self) -> Path:
        """Round directories, one per assignment."""
        return self.root / "rounds"

    @property
    def cache(self) -> Path:
        """What can be fetched again; safe to delete while no agent runs."""
        return self.root / "cache"

    def residual_file(self, run_id: str) -> Path:
        """What a coarse codec left out of a run's updates; those of other runs are deleted."""
        folder = self.root / "residuals"
        folder.mkdir(exist_ok=True)
        path = folder / f"{run_id}.safetensors"
        for other in folder.iterdir():
            if other != path:
                other.unlink(missing_ok=True)
        return path

    @property
    def blobs(self) -> Path:
        """Fetched blobs, named by digest."""
        return self.cache / "blobs"

    @property
    def models(self) -> Path:
        """Base models, one folder per digest."""
        return self.cache / "models"

    def round_dir(self, assignment_id: Identifier) -> Path:
        """The folder of one assignment; its parent exists, the folder may not."""
        return self.rounds / assignment_id

    def forget_round(self, assignment_id: Identifier) -> None:
        """Delete what an assignment left behind; nobody will ask for it again."""
        shutil.rmtree(self.round_dir(assignment_id), ignore_errors=True)

    def trim_blobs(self, largest_bytes: int) -> int:
        """Remove the adapters that were used longest ago until the rest is small enough.

        Every round brings a new global adapter; kept for ever they would fill the disk.

        Args:
            largest_bytes: what may stay.

        Returns:
            How many bytes were removed.
        """
        files = [(path, path.stat()) for path in self.blobs.iterdir() if path.is_file()]
        files.sort(key=lambda entry: entry[1].st_mtime_ns, reverse=True)
        kept_bytes = removed_bytes = 0
        for path, status in files:
            if kept_bytes + status.st_size <= largest_bytes:
                kept_bytes += status.st_size
            else:
                path.unlink(missing_ok=True)
                removed_bytes += status.st_size
        return removed_bytes

    def keep_rounds(self, wanted: Collection[Identifier]) -> None:
        """Delete the round directories of all other assignments, left by an earlier life."""
        for folder in self.rounds.iterdir():
            if folder.name not in wanted:
                shutil.rmtree(folder, ignore_errors=True)

    def counter(self, name: str) -> Counter:
        """The persisted counter of this name, e.g. ``sid``."""
        return Counter(self.root / "counters" / name)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other agents out of this directory.

        The kernel releases the lock when the process ends, however it ends.

        Raises:
            AlreadyRunning: another process holds it.
        """
        descriptor = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
                raise AlreadyRunning(
                    f"an agent (pid {holder}) already uses {self.root}; "
                    "stop it or choose another state directory"
                ) from error
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            yield
        finally:
            os.close(descriptor)


class Counter:
    """A number that only grows and survives power loss."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def value(self) -> int:
        """The last number handed out; 0 when there was none."""
        try:
            return int(self._path.read_text(encoding="ascii"))
        except FileNotFoundError:
            return 0
        except ValueError:
            log.warning("counter_was_unreadable", path=str(self._path))
            return 0

    def increment(self) -> int:
        """Hand out the next number; it is on disk before this returns.

        Raises:
            DeviceError: the disk is full or failed.
        """
        following = self.value + 1
        self.raise_to(following)
        return following

    def raise_to(self, number: int) -> None:
        """Remember ``number``, which is larger than the last; on disk before this returns.

        Raises:
            DeviceError: the disk is full or failed.
        """
        write_durably(self._path, f"{number}\n".encode(), site="agent.counter")


def write_durably(path: Path, data: bytes, *, site: str, flush: bool = True) -> None:
    """``durable.write_durably``, which see, with the agent's own error.

    Raises:
        DeviceError: the disk is full or failed.
    """
    try:
        durable.write_durably(path, data, site=site, flush=flush)
    except OSError as error:
        raise disk_error(path, error) from error


def disk_error(path: Path, error: OSError) -> DeviceError:
    """Name what went wrong when ``path`` was written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DeviceError(
            FailureCode.DISK_FULL, f"no space left for {path}; free some space on this device"
        )
    return DeviceError(
        FailureCode.INTERNAL, f"cannot write {path}: {error.strerror or error}; check the disk"
    )
