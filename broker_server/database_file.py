"""The SQLite file below the store: made durable, checked for damage, copied while in use.

Knows the file and SQLite's own means; nothing of tables.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from sqlalchemy import Engine, event
from sqlalchemy.exc import DBAPIError

from broker_server.disk_space import DatabaseUnavailable
from wire_protocol.errors import ConfigError, LegendError

RESTORE_HINT = (
    "stop the server, put the last backup in its place with: broker-server restore FILE --force"
)
_DAMAGED = ("SQLITE_CORRUPT", "SQLITE_NOTADB", "malformed", "not a database", "file format")


class DatabaseDamaged(ConfigError):
    """The database file is not what was written; only a backup helps."""


def make_durable(engine: Engine) -> None:
    """WAL lets readers go on while a commit runs; FULL makes a commit survive power loss."""

    @event.listens_for(engine, "connect")
    def _set_pragmas(connection: object, _record: object) -> None:
        cursor = connection.cursor()  # type: ignore[attr-defined]
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=10000"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()


def damage_in(engine: Engine) -> str | None:
    """What SQLite's quick check finds wrong with the whole file; None when all is well.

    Reads every page, but compares no index with its table: a tenth of a second for 50 MB.

    Source: sqlite.org/pragma.html#pragma_quick_check.
    """
    with engine.connect() as connection:
        try:
            first = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar_one()
        except DBAPIError as error:
            return _first_line(error.orig or error)
    return None if first == "ok" else _first_line(first).removeprefix("*** in database main *** ")


def named(error: DBAPIError, database: str) -> LegendError:
    """Our error for one of the driver's: the file is damaged, or it cannot be used now.

    Args:
        error: what a statement, a commit or a connect raised.
        database: its URL without a password.
    """
    reason = _first_line(error.orig or error)
    code = getattr(error.orig, "sqlite_errorname", "")
    if any(sign in f"{code} {reason}" for sign in _DAMAGED):
        return DatabaseDamaged(f"database {database} is damaged ({reason}); {RESTORE_HINT}")
    if "disk is full" in reason:
        return DatabaseUnavailable(f"no space is left for {database}; free some on its disk")
    return DatabaseUnavailable(f"database {database} cannot be used now: {reason}")


def copy_database(source: Path, target: Path) -> None:
    """Copy a database that may be in use, as one committed state of it.

    Raises:
        DatabaseDamaged: it cannot be read.
        DatabaseUnavailable: there is no space for the copy.

    Source: sqlite.org/backup.html (online backup).
    """
    try:
        with (
            closing(sqlite3.connect(f"file:{source}?mode=ro", uri=True)) as old,
            closing(sqlite3.connect(target)) as new,
        ):
            # In one go: nobody of this process writes meanwhile, so it never starts again.
            old.backup(new, pages=-1)
    except sqlite3.Error as error:
        raise named(DBAPIError("backup", None, error), str(source)) from error


def damage_in_file(path: Path) -> str | None:
    """As ``damage_in``, for a file that no server uses."""
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
            (first,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.Error as error:
        return _first_line(error)
    return None if first == "ok" else _first_line(first)


def _first_line(text: object) -> str:
    return " ".join(str(text).split())[:200]
