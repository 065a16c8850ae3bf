"""What a running agent says about itself, for ``edge-agent status`` and ``stop``."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from pathlib import Path

from wire_protocol.errors import Unavailable

STATUS_FILE = "status.json"


class StatusFile:
    """One small file, replaced whenever something in it changes.

    It lives in the state directory and is not worth an fsync: it describes a
    process, and a process does not survive what an fsync protects from.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / STATUS_FILE
        self._path.unlink(missing_ok=True)  # of an earlier life
        self._written: dict[str, object] = {}

    def write(self, status: dict[str, object]) -> None:
        """Replace the file if ``status`` is news."""
        if status == self._written:
            return
        partial = self._path.with_suffix(".partial")
        try:
            partial.write_text(json.dumps({"pid": os.getpid(), **status}), encoding="utf-8")
            partial.replace(self._path)
        except OSError:
            return  # a full disk must not end the agent; the server hears of it elsewhere
        self._written = dict(status)


def read_status(folder: Path) -> dict[str, object]:
    """Read the status of the agent that runs in this state directory.

    Raises:
        Unavailable: no agent runs there.
    """
    try:
        with (folder / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _running(folder)
    except OSError:
        pass  # no lock file: no agent ever ran here
    raise Unavailable(f"no agent runs in {folder}; start one with: edge-agent start")


def _running(folder: Path) -> dict[str, object]:
    """What the agent wrote; right after its start, only its process id."""
    try:
        status: dict[str, object] = json.loads((folder / STATUS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        pid = (folder / "lock").read_text(encoding="ascii").strip() or "0"
        status = {"pid": int(pid), "connected": False}
    return status


def stop_agent(folder: Path, *, patience_s: float = 30.0) -> int:
    """Ask the agent of this state directory to stop, and wait until it has.

    Returns:
        The process id that it had.

    Raises:
        Unavailable: no agent runs there, or it did not stop in time.
    """
    pid = int(str(read_status(folder)["pid"]))
    os.kill(pid, signal.SIGTERM)
    give_up_at = time.monotonic() + patience_s
    while time.monotonic() < give_up_at:
        time.sleep(0.1)
        try:
            read_status(folder)
        except Unavailable:
            return pid
    raise Unavailable(f"the agent (pid {pid}) did not stop within {patience_s:.0f} s")
