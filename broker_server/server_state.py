"""The server's state directory: one server each, and a count of its starts."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wire_protocol.durable import write_durably
from wire_protocol.errors import AlreadyRunning, ConfigError


class ServerState:
    """Paths below the state directory.

    Raises:
        ConfigError: it cannot be made or written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for folder in (self.blobs, self.models, self.runs):
                folder.mkdir(exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot use {root} as state directory: {error.strerror}") from error

    @property
    def blobs(self) -> Path:
        """The blob store."""
        return self.root / "blobs"

    @property
    def uploads(self) -> Path:
        """What devices send, until it is an update; on the disk of the blob store."""
        return self.root / "uploads"

    @property
    def models(self) -> Path:
        """Base models, one folder per digest."""
        return self.root / "models"

    @property
    def runs(self) -> Path:
        """Result folders, one per run."""
        return self.root / "runs"

    @property
    def signing(self) -> Path:
        """The server's signing key and the operator's word for it."""
        return self.root / "signing"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other servers out; the kernel lets go when the process ends.

        Raises:
            AlreadyRunning: another server holds it.
        """
        descriptor = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError as error:
            raise AlreadyRunning(
                f"a server already uses {self.root}; stop it or choose another state_dir"
            ) from error
        finally:
            os.close(descriptor)

    def count_start(self) -> int:
        """Count this start; survives restarts."""
        path = self.root / "start_number"
        start_number = int(path.read_text()) + 1 if path.exists() else 1
        write_durably(path, f"{start_number}\n".encode(), site="server.start_number")
        return start_number

    @property
    def life(self) -> str:
        """Names this life of the state: empty until it was restored from a backup."""
        path = self.root / "restores"
        return f"r{int(path.read_text())}" if path.exists() else ""

    def announce(self, url: str) -> None:
        """Say where the API is, once it answers."""
        content = json.dumps({"url": url, "pid": os.getpid()})
        write_durably(
            self.root / "server.json", content.encode(), site="server.announce", mode=0o644
        )
