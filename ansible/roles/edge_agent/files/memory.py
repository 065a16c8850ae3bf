"""Prints the memory of this board in bytes: the smaller of the kernel's and the cgroup's."""

# ruff: noqa: INP001 - Ansible sends this file to the host as it is

from __future__ import annotations

import sys
from pathlib import Path


def limits(root: Path) -> list[int]:
    """Every figure that bounds the memory below ``root``, in bytes."""
    found = []
    for name in ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes"):
        path = root / name
        text = path.read_text(encoding="ascii").strip() if path.exists() else ""
        if text.isdecimal():
            found.append(int(text))
    lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
    found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:")]
    return found


if __name__ == "__main__":
    sys.stdout.write(f"{min(limits(Path('/')))}\n")
