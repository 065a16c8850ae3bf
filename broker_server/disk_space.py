"""What the server does when its disk is full: wait, say so once, go on when there is space.

Nothing is acknowledged before it is stored, so waiting loses nothing: devices send again.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import anyio
import structlog

from broker_server.blobs import DiskFull
from wire_protocol.errors import ServerUnavailable

log = structlog.get_logger()

RETRY_S = 2.0
"""How long to wait before the same is tried again."""

Result = TypeVar("Result")


class DatabaseUnavailable(ServerUnavailable):
    """The database cannot take anything now: the disk is full, or it does not answer."""


async def until_stored(work: Callable[[], Awaitable[Result]], *, what: str) -> Result:
    """Repeat ``work`` until this server's disk and database take it.

    Args:
        work: may be repeated without harm.
        what: named in the log.
    """
    waiting = False
    while True:
        try:
            result = await work()
        except (DiskFull, DatabaseUnavailable, OSError) as error:
            if isinstance(error, OSError) and not lacks_space(error):
                raise
            if not waiting:
                log.error("waiting_for_disk_space", what=what, error=str(error))
            waiting = True
        else:
            if waiting:
                log.info("disk_space_again", what=what)
            return result
        await anyio.sleep(RETRY_S)


@contextmanager
def one_line_when_full() -> Iterator[None]:
    """Turn a full disk at the start of the server into an error of one line.

    Raises:
        DiskFull: no space is left; starting again later may work.
    """
    try:
        yield
    except OSError as error:
        if not lacks_space(error):
            raise
        place = f" for {error.filename}" if error.filename else ""
        raise DiskFull(f"no space is left{place}; free some and start again") from error


def lacks_space(error: OSError) -> bool:
    """Whether the disk, or this user's share of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
