"""Files of the certificate folder: private ones stay private, and what was written stays written.

Knows files, not certificates.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wire_protocol.durable import BEGIN, DONE, reached, sync, write_durably, write_in_halves
from wire_protocol.errors import ConfigError

PRIVATE = 0o600
PUBLIC = 0o644


def make_private_folder(folder: Path) -> None:
    """Make a folder that only its owner may enter.

    Raises:
        ConfigError: it cannot be made.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
    except OSError as error:
        raise ConfigError(f"cannot use {folder}: {error.strerror}") from error


def replace_file(path: Path, text: str, *, site: str, mode: int = PRIVATE) -> None:
    """Write a file as a whole, on disk when this returns.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        write_durably(path, text.encode(), site=site, mode=mode)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def read_file(path: Path, *, or_else: str) -> str:
    """Read a text file.

    Args:
        path: which.
        or_else: what to do when it is not there, for the error.

    Raises:
        ConfigError: it is missing or unreadable.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist; {or_else}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def stamp(path: Path) -> tuple[int, int, int] | None:
    """Changes whenever the file does; None when it is missing."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other threads and processes from writing here; the kernel lets go after a kill.

    Raises:
        ConfigError: the folder cannot be written.
    """
    try:
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE)
    except OSError as error:
        raise ConfigError(f"cannot write in {folder}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class Journal:
    """A file of JSON lines that only grows. Hold the folder's lock to append.

    Args:
        path: may be missing.
        site: its name in crash tests.
    """

    def __init__(self, path: Path, *, site: str) -> None:
        self.path = path
        self._site = site

    def read(self) -> list[dict[str, Any]]:
        """Every line. An unfinished last one was never acknowledged, and is left out.

        Raises:
            ConfigError: a line is damaged.
        """
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be read: {error.strerror}") from error
        entries = []
        for number, line in enumerate(content.split(b"\n")[:-1], 1):
            try:
                entry = json.loads(line)
            except ValueError:
                entry = None
            if not isinstance(entry, dict):
                raise ConfigError(f"{self.path}, line {number} is damaged; restore it from backup")
            entries.append(entry)
        return entries

    def append(self, *entries: Mapping[str, object]) -> None:
        """Add lines; they are on disk when this returns.

        Raises:
            ConfigError: they cannot be written.
        """
        text = "".join(json.dumps(entry, sort_keys=True) + "\n" for entry in entries)
        created = not self.path.exists()
        reached(self._site, BEGIN)
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE)
            with os.fdopen(descriptor, "r+b") as file:
                # The rest of a line whose writer was killed would damage ours.
                file.truncate(file.read().rfind(b"\n") + 1)
                file.seek(0, os.SEEK_END)
                write_in_halves(file, text.encode(), site=self._site)
                file.flush()
                os.fsync(file.fileno())
            if created:
                sync(self.path.parent)
        except OSError as error:
            raise ConfigError(f"cannot write {self.path}: {error.strerror}") from error
        reached(self._site, DONE)
