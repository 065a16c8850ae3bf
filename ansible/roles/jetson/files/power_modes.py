"""Prints the power modes of a Jetson as JSON: ids by name, and the id that is on (-1: unknown).

Argument: the folder that holds etc/nvpmodel.conf and var/lib/nvpmodel/status, usually ``/``.
"""

# ruff: noqa: INP001 - Ansible sends this file to the host as it is

from __future__ import annotations

import json
import re
import sys
from pathlib import Path


def power_modes(root: Path) -> dict[str, object]:
    """Read what nvpmodel offers and what it recorded; its default counts until it has."""
    conf = (root / "etc/nvpmodel.conf").read_text(encoding="utf-8")
    lines = re.findall(r"^\s*<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>", conf, re.MULTILINE)
    status = root / "var/lib/nvpmodel/status"
    recorded = status.read_text(encoding="utf-8") if status.exists() else ""
    active = re.search(r"pmode:(\d+)", recorded) or re.search(
        r"^\s*<\s*PM_CONFIG\s+DEFAULT=(\d+)\s*>", conf, re.MULTILINE
    )
    return {
        "modes": {name: int(number) for number, name in lines},
        "active": int(active.group(1)) if active else -1,
    }


if __name__ == "__main__":
    sys.stdout.write(f"{json.dumps(power_modes(Path(sys.argv[1])))}\n")
