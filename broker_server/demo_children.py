"""The processes of a demonstration: started together, watched, stopped together.

Knows programs, log files and signals; knows nothing of fleets or training.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from wire_protocol.errors import LegendError

_STOP_PATIENCE_S = 10.0
_TAIL_LINES = 3
_TAIL_BYTES = 4096
_OUR_VARIABLES = ("EDGE_AGENT_", "BROKER_SERVER_", "LEGEND_")


@dataclass(frozen=True)
class Child:
    """One process and where it writes what it has to say."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path


@final
class Children:
    """Processes that live as long as a ``with`` block.

    Args:
        log_dir: one ``NAME.log`` per process goes here.
        stop_patience_s: between asking a process to end and killing it.
    """

    def __init__(self, log_dir: Path, *, stop_patience_s: float = _STOP_PATIENCE_S) -> None:
        self._log_dir = log_dir
        self._stop_patience_s = stop_patience_s
        self._children: list[Child] = []

    def __enter__(self) -> Children:
        self._log_dir.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()

    def start(self, name: str, arguments: Sequence[str]) -> Child:
        """Start a process; stdout and stderr go to its log.

        It gets a session of its own, so that Ctrl-C reaches us first and the
        end is in our order.
        """
        log = self._log_dir / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                list(arguments),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=child_environment(os.environ),
                start_new_session=True,
            )
        child = Child(name, process, log)
        self._children.append(child)
        return child

    def check(self) -> None:
        """Notice a process that ended by itself.

        Raises:
            LegendError: one did; says which and what it last said.
        """
        for child in self._children:
            code = child.process.poll()
            if code is not None:
                how = (
                    f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
                )
                raise LegendError(f"{child.name} {how}: {last_words(child.log)}; see {child.log}")

    def stop(self) -> None:
        """Ask every process to end, the last started first; kill those that do not."""
        running = [child.process for child in reversed(self._children)]
        for process in running:
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + self._stop_patience_s
        for process in running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._children.clear()


def child_environment(ours: Mapping[str, str]) -> dict[str, str]:
    """Our environment without settings meant for real agents and servers.

    Every process trains with one thread: they share this machine's cores.
    """
    kept = {key: value for key, value in ours.items() if not key.startswith(_OUR_VARIABLES)}
    quiet = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    return {**kept, **quiet, "PYTHONUNBUFFERED": "1"}


def last_words(log: Path) -> str:
    """The last lines of a log in one line."""
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        text = stream.read().decode(errors="replace")
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    return " / ".join(lines[-_TAIL_LINES:]) or "it said nothing"
