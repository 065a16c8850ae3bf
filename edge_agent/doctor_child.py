"""A process that takes memory until a limit ends it: how the doctor proves that one bites.

Started by path, so it may use the standard library only. Takes no more than it was told to, and
then ends: a machine without any limit survives it. Says on stdout what ``doctor_limit`` reads:

    limit BYTES    what the memory cgroup of this process allows; 0: no limit, or none to be seen
    held BYTES     after every step
    swapped BYTES  once everything was taken: how much of it is in swap
    refused        the system gave no more: another limit than a cgroup's
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

STEP_BYTES = 2 * 2**20
_NO_LIMIT_BYTES = 2**60


def take(most_bytes: int, joined: list[str]) -> None:
    """Enter cgroups, then take memory step by step.

    Args:
        most_bytes: where to stop.
        joined: ``cgroup.procs`` files of the cgroups to enter.
    """
    for procs in joined:
        Path(procs).write_text("0", encoding="ascii")
    first_to_die()
    say(f"limit {own_limit_bytes()}")
    held = []
    try:
        for taken in range(STEP_BYTES, most_bytes + 1, STEP_BYTES):
            # Written to, or it would be a promise and not memory.
            held.append(b"\xa5" * STEP_BYTES)
            say(f"held {taken}")
    except MemoryError:
        held.clear()
        say("refused")
        return
    say(f"swapped {swapped_bytes()}")


def first_to_die() -> None:
    """If the whole machine runs out of memory, then not because of somebody else."""
    Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def own_limit_bytes() -> int:
    """The limit of the cgroup that this process is in; 0 without one."""
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        number, controllers, group = line.split(":", 2)
        if "memory" in controllers.split(","):
            places = [f"/sys/fs/cgroup/memory{group}/memory.limit_in_bytes"]
        elif number == "0":
            places = [f"/sys/fs/cgroup{mount}{group}/memory.max" for mount in ("", "/unified")]
        else:
            continue
        for place in places:
            try:
                text = Path(place).read_text(encoding="ascii").strip()
            except OSError:
                continue
            if text.isdecimal() and int(text) < _NO_LIMIT_BYTES:
                return int(text)
    return 0


def swapped_bytes() -> int:
    """How much of this process is in swap. Source: ``VmSwap`` in proc(5)."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    found = re.search(r"^VmSwap:\s+(\d+) kB", status, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0


def say(line: str) -> None:
    """At once: the next step may be the last."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    take(int(sys.argv[1]), sys.argv[2:])
