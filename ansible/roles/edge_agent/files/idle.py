"""Exit 0 as soon as the agent trains nothing, 1 if it still does after a time.

Arguments: its status file, how many seconds to wait, and a command to run at that moment, if any.
Standard library only.
"""

# ruff: noqa: INP001 - Ansible sends this file to the host as it is

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

LOOK_AGAIN_S = 0.5


def busy_with(status_file: Path) -> str:
    """The round in progress; empty when there is none, or no agent that could say so."""
    try:
        status = json.loads(status_file.read_text(encoding="utf-8"))
        Path(f"/proc/{status['pid']}/cmdline").read_bytes()
    except (OSError, ValueError, KeyError):
        return ""
    return str(status.get("busy_with") or "")


if __name__ == "__main__":
    give_up_at = time.monotonic() + float(sys.argv[2])
    while found := busy_with(Path(sys.argv[1])):
        if time.monotonic() >= give_up_at:
            sys.exit(f"it still trains: {found}")
        time.sleep(LOOK_AGAIN_S)
    if command := sys.argv[3:]:
        os.execvp(command[0], command)  # noqa: S606 - the role names the command, and no shell is needed
