"""Exit 0 once the agent of this release runs and the broker has it; otherwise says why not.

Arguments: the release's folder, and the settings file. Standard library only.
"""

# ruff: noqa: INP001 - Ansible sends this file to the host as it is

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def main_pid() -> int:
    """The process that systemd watches; 0 when the service does not run."""
    command = ["systemctl", "show", "--property=MainPID", "--value", "edge-agent"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def problem(release: str, settings: str) -> str:
    """What keeps the agent from being healthy; empty if nothing does."""
    pid = main_pid()
    if not pid:
        return "the service does not run: journalctl -u edge-agent"
    words = Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8").split("\0")
    # A restart that has not happened yet leaves the old release's interpreter here.
    if not words[0].startswith(f"{release}/bin/"):
        return f"another release runs: {words[0]}"
    command = [f"{release}/bin/edge-agent", "--settings", settings, "status", "--json"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        return (answer.stderr.strip().splitlines() or ["no status"])[-1]
    status = json.loads(answer.stdout)
    # A status file outlives an agent that was killed.
    if status["pid"] != pid:
        return "the status is that of an agent that has ended"
    if not status["connected"]:
        return "the broker does not have this agent yet"
    sys.stdout.write(f"{json.dumps(status)}\n")
    return ""


if __name__ == "__main__":
    sys.exit(problem(sys.argv[1], sys.argv[2]) or 0)
