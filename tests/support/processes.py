"""Programs of ours as processes of a test: started under a name, and ended by their pid."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

PATIENCE_S = 120.0


@dataclass
class Processes:
    """Starts processes whose output goes to ``<name>.log``; ends them when the test ends."""

    folder: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict, kw_only=True)
    patience_s: float = field(default=PATIENCE_S, kw_only=True)

    def spawn(
        self, name: str, command: list[str], environment: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        """Start one, or start it again; its log goes on."""
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **environment},
            )
        self.processes[name] = process
        return process

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Poll; fails with the logs when it does not come true."""
        give_up_at = time.monotonic() + self.patience_s
        while not condition():
            if time.monotonic() > give_up_at:
                logs = "\n".join(
                    f"--- {path.name}\n{path.read_text()[-3000:]}"
                    for path in self.folder.glob("*.log")
                )
                raise AssertionError(f"it did not happen that {what}\n{logs}")
            time.sleep(0.1)

    def log(self, name: str) -> str:
        """What a process has said so far."""
        return (self.folder / f"{name}.log").read_text()

    def close(self) -> None:
        """End everything."""
        end(*self.processes.values())


def end(*processes: subprocess.Popen[bytes]) -> None:
    """Ask all of them to end; kill those that do not."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(5)
