"""What the machine is, how busy it is, and what a tree of processes took of it. Linux only."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def machine() -> str:
    """The machine in a few words."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    gibibytes = os.sysconf("SC_PHYS_PAGES") * _PAGE_BYTES / 2**30
    return f"{cpu}, {os.cpu_count()} cores, {gibibytes:.0f} GiB, Python {platform.python_version()}"


def peak_rss_bytes(work: Callable[[], object]) -> int:
    """Resident memory of this process at its highest while ``work`` ran.

    Source: ``VmHWM`` and ``clear_refs`` in proc(5).
    """
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    work()
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def load() -> float:
    """Processes that wanted a core, on average of the last minute."""
    return round(os.getloadavg()[0], 1)


@dataclass(frozen=True)
class Usage:
    """What processes have taken so far.

    Attributes:
        cpu_s: of them, and of children of theirs that have ended and were waited for.
        rss_bytes: of those that live; pages that several share count for each.
    """

    processes: int
    cpu_s: float
    rss_bytes: int


def tree_of(pid: int) -> list[int]:
    """A process and everything below it; empty when it has ended."""
    found, todo = [], [pid]
    while todo:
        one = todo.pop()
        try:
            children = [
                int(child)
                for file in Path(f"/proc/{one}/task").glob("*/children")
                for child in file.read_text().split()
            ]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if Path(f"/proc/{one}").exists():
            found.append(one)
        todo += children
    return found


def usage_of(pids: list[int]) -> Usage:
    """What these processes have taken so far; those that have just ended count as nothing."""
    cpu_s, rss_bytes, alive = 0.0, 0, 0
    for pid in pids:
        try:
            # Behind the name in brackets, which may hold anything. Source: proc(5).
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        alive += 1
        cpu_s += sum(int(field) for field in fields[11:15]) / _TICKS_PER_S
        rss_bytes += int(fields[21]) * _PAGE_BYTES
    return Usage(alive, cpu_s, rss_bytes)


def usage_of_trees(roots: list[int]) -> Usage:
    """The same for whole trees."""
    return usage_of([pid for root in roots for pid in tree_of(root)])
