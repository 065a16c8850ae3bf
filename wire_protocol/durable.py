"""Files that a crash leaves whole, and the points where a test may end the process.

Everything that this product writes and will read again goes through here, under the name of its
write site. After a crash a reader finds the old content or the new one, never a part.

To test that, the environment variable ``LEGEND_DIE_AT`` names one point: ``SITE/STEP``, or
``SITE/STEP#N`` for the N-th time it is reached. The process then ends itself as ``kill -9`` would.
Not set, it costs one comparison. Valid on Python 3.8; standard library only.
"""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path
from typing import IO

DIE_AT = "LEGEND_DIE_AT"

BEGIN = "begin"
"""Nothing is written yet."""
HALF = "half"
"""Half of the bytes are in a file that nobody reads."""
WRITTEN = "written"
"""All bytes are on the disk, under a name that nobody reads."""
DONE = "done"
"""The new content is in its place; what should follow it has not happened."""

_point, _, _times = os.environ.get(DIE_AT, "").partition("#")
_times_left = int(_times) if _times.isdigit() else 1


def reached(site: str, step: str) -> None:
    """Mark a point between two effects; ends the process here if ``LEGEND_DIE_AT`` names it."""
    global _times_left  # noqa: PLW0603  # a process dies once, wherever in it the point lies
    if _point and _point == f"{site}/{step}":
        _times_left -= 1
        if _times_left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def write_durably(
    path: Path, data: bytes, *, site: str, mode: int = 0o600, flush: bool = True
) -> None:
    """Replace a file so that after power loss the old or the new content is there.

    Args:
        path: in a folder that exists.
        data: the whole content.
        site: what is written.
        mode: who may read it.
        flush: False for what can be made again: a killed process still leaves it whole, power loss
            may not; saves two waits for the disk.

    Raises:
        OSError: the disk is full or failed; the old file stays.
    """
    reached(site, BEGIN)
    descriptor, name = tempfile.mkstemp(
        dir=str(path.parent), prefix=f".{path.name}.", suffix=".tmp"
    )
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            write_in_halves(file, data, site=site)
            if flush:
                file.flush()
                os.fsync(file.fileno())
        temporary.chmod(mode)
        move_into_place(temporary, path, site=site, flush=flush)
    except BaseException:
        if temporary.exists():
            temporary.unlink()
        raise


def write_in_halves(file: IO[bytes], data: bytes, *, site: str) -> None:
    """Write all bytes, with the point in the middle where the file holds half of them."""
    view = memoryview(data)
    file.write(view[: len(view) // 2])
    if _point:
        file.flush()
    reached(site, HALF)
    file.write(view[len(view) // 2 :])


def move_into_place(finished: Path, target: Path, *, site: str, flush: bool = True) -> None:
    """Give a file or folder whose content is on the disk its name, for good.

    Args:
        finished: file or folder on the same disk.
        target: is replaced; a folder can only take the place of an empty one.
        site: what is written.
        flush: see ``write_durably``.

    Raises:
        OSError: it cannot be renamed.
    """
    reached(site, WRITTEN)
    finished.replace(target)
    if flush:
        sync(target.parent)
    reached(site, DONE)


def remove_file(path: Path, *, site: str) -> None:
    """Delete a file, if it is there.

    Not flushed: what comes back after power loss is only deleted, or sent, once more.
    """
    reached(site, BEGIN)
    try:
        path.unlink()
    except FileNotFoundError:
        return
    reached(site, DONE)


def sync(path: Path) -> None:
    """Bring the content of a file, or the names in a folder, to the disk."""
    descriptor = os.open(str(path), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
