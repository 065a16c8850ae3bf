"""Operators' tokens for the HTTP API: named, with a role, kept as digests.

``tokens.json`` in the state directory; a running server notices changes of it at once. A revoked
token stays listed: who revokes the last one must not thereby open the server to everybody.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from broker_server.access import Role
from wire_protocol.durable import write_durably
from wire_protocol.errors import ConfigError

FILE_NAME = "tokens.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,47}")
_SECRET_BYTES = 32


@dataclass(frozen=True)
class TokenRecord:
    """One token. Times in seconds since 1970.

    Attributes:
        digest: SHA-256 of the token. The token has 32 random bytes, so that nothing is won by a
            slower hash.
    """

    name: str
    role: Role
    digest: str
    created_at: float
    revoked_at: float | None = None

    @property
    def active(self) -> bool:
        """Whether it is accepted."""
        return self.revoked_at is None


class TokenStore:
    """The tokens of one server; several processes may use the same folder.

    Args:
        state_dir: where ``tokens.json`` lies; may be missing as long as nothing is written.
    """

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / FILE_NAME
        self._seen: tuple[int, int, int] | None = None
        self._records: tuple[TokenRecord, ...] = ()

    def records(self) -> tuple[TokenRecord, ...]:
        """Every token that was ever made, oldest first.

        Raises:
            ConfigError: the file is damaged or cannot be read.
        """
        stamp = _stamp(self._path)
        if stamp != self._seen:
            self._records = _read(self._path)
            self._seen = stamp
        return self._records

    def find(self, token: str) -> TokenRecord | None:
        """The active record of a token; takes the same time whichever it is.

        Raises:
            ConfigError: the file is damaged or cannot be read.
        """
        digest = _digest(token)
        found = None
        for record in self.records():
            if hmac.compare_digest(record.digest, digest) and record.active:
                found = record
        return found

    def create(self, name: str, role: Role, now: float) -> str:
        """Make a token; the only time that it is shown.

        Args:
            name: of the person or program that will use it.
            role: what it may do.
            now: seconds since 1970.

        Raises:
            ConfigError: the name is taken or no name, or the file cannot be written.
        """
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"token name {name[:60]!r} must be 1 to 48 letters, digits and . _ @ -"
            )
        token = secrets.token_urlsafe(_SECRET_BYTES)
        with self._locked():
            records = self.records()
            if any(record.name == name and record.active for record in records):
                raise ConfigError(f"there is a token {name!r} already; revoke it first")
            self._write((*records, TokenRecord(name, role, _digest(token), now)))
        return token

    def revoke(self, name: str, now: float) -> None:
        """Accept a token no more, from the next request on.

        Raises:
            ConfigError: no active token has this name.
        """
        with self._locked():
            records = self.records()
            if not any(record.name == name and record.active for record in records):
                known = ", ".join(record.name for record in records if record.active) or "none"
                raise ConfigError(f"there is no active token {name[:60]!r} (active: {known})")
            self._write(
                tuple(
                    replace(record, revoked_at=now)
                    if record.name == name and record.active
                    else record
                    for record in records
                )
            )

    def _write(self, records: tuple[TokenRecord, ...]) -> None:
        content = json.dumps({"tokens": [asdict(record) for record in records]}, indent=1) + "\n"
        try:
            write_durably(self._path, content.encode(), site="server.tokens")
        except OSError as error:
            raise ConfigError(f"cannot write {self._path}: {error.strerror}") from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other processes from writing; the kernel lets go when one is killed."""
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = self._path.with_name(".tokens.lock")
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"cannot write in {self._path.parent}: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    return status.st_ino, status.st_size, status.st_mtime_ns


def _read(path: Path) -> tuple[TokenRecord, ...]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return tuple(
            TokenRecord(
                name=str(entry["name"]),
                role=Role(entry["role"]),
                digest=str(entry["digest"]),
                created_at=float(entry["created_at"]),
                revoked_at=None if entry["revoked_at"] is None else float(entry["revoked_at"]),
            )
            for entry in content["tokens"]
        )
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged; restore it, or delete it and its tokens") from error
