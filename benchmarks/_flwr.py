"""The same work done by flwr, which lives in an environment of its own.

``flwr_peer`` is the app. Deployed: a SuperLink with its database on disk and one SuperNode a
client, with their defaults. Simulated: flwr's own engine, on ray.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks._machine import Usage, tree_of, usage_of_trees
from benchmarks._measured import Measured, gaps
from tests.support.ports import free_port

APP = Path(__file__).with_name("flwr_peer")
REQUIREMENT = "flwr[simulation]"
PATIENCE_S = 900.0


@dataclass(frozen=True)
class Work:
    """What is to be done.

    Attributes:
        rounds: in all; the first is not counted.
    """

    nodes: int
    tensors: int
    payload_bytes: int
    rounds: int


@dataclass(frozen=True)
class FlwrEnvironment:
    """An installed flwr."""

    folder: Path

    @property
    def version(self) -> str:
        """Of flwr."""
        line = "import importlib.metadata as m; print(m.version('flwr'), m.version('ray'))"
        flwr, ray = subprocess.check_output([self.program("python"), "-c", line], text=True).split()
        return f"flwr {flwr}, ray {ray}"

    def program(self, name: str) -> str:
        """One of its executables."""
        return str(self.folder / "bin" / name)


def installed(folder: Path) -> FlwrEnvironment:
    """Make the environment, unless it is there.

    Raises:
        SystemExit: it cannot be installed; the last line says why.
    """
    ready = folder / "ready"
    if not ready.exists():
        print(f"installing {REQUIREMENT} into {folder}, once", file=sys.stderr, flush=True)
        venv.create(folder, with_pip=True)
        pip = [str(folder / "bin" / "pip"), "install", "--quiet", REQUIREMENT]
        done = subprocess.run(pip, check=False, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{REQUIREMENT} cannot be installed: {done.stderr.strip().splitlines()[-1]}")
        ready.touch()
    return FlwrEnvironment(folder)


def deployed(flwr: FlwrEnvironment, work: Work, folder: Path) -> Measured:
    """A SuperLink, SuperNodes and one run, all of them processes on this machine."""
    times, port = folder / "times.jsonl", free_port()
    began = time.time()
    with _processes(flwr, work, folder, times) as start:
        # flwr's own default: apps may not need anything that is not installed.
        start("flower-superlink", "--insecure", "--port", str(port), "--database",
              str(folder / "state.db"), "--disable-runtime-dependency-installation")  # fmt: skip
        _until(lambda: _answers(port), start.roots, "the SuperLink answers")
        for _ in range(work.nodes):
            start("flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}",
                  "--port", str(free_port()))  # fmt: skip
        (folder / "home" / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n\n[superlink.here]\ninsecure = true\n'
            f'address = "127.0.0.1:{port}"\n'
        )
        subprocess.run(
            [flwr.program("flwr"), "run", str(APP), "here"],
            env=start.environment, check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        before = _usage_after(times, 1, start.roots, work)
        after = _usage_after(times, work.rounds, start.roots, work)
    return Measured(
        round_s=gaps(_ends(times)),
        cpu_s=(after.cpu_s - before.cpu_s) / (work.rounds - 1),
        rss_bytes=after.rss_bytes,
        total_s=time.time() - began,
    )


def simulated(flwr: FlwrEnvironment, work: Work, folder: Path) -> Measured:
    """The same in flwr's simulation engine, with its defaults."""
    times = folder / "times.jsonl"
    began = time.time()
    with _processes(flwr, work, folder, times) as start:
        start("python", "-m", "flwr_peer.apps")
        before = _usage_after(times, 1, start.roots, work)
        after = _usage_after(times, work.rounds, start.roots, work)
        rounds_over = time.time()
    return Measured(
        round_s=gaps(_ends(times)),
        cpu_s=(after.cpu_s - before.cpu_s) / (work.rounds - 1),
        rss_bytes=after.rss_bytes,
        total_s=rounds_over - began,
    )


class _Starter:
    """Starts programs of the environment; what it started is ended with it."""

    def __init__(self, flwr: FlwrEnvironment, folder: Path, environment: Mapping[str, str]) -> None:
        self._flwr = flwr
        self._folder = folder
        self.environment = environment
        self.roots: list[int] = []
        self._children: list[subprocess.Popen[bytes]] = []

    def __call__(self, program: str, *arguments: str) -> None:
        log = self._folder / f"{len(self.roots)}-{program}.log"
        with log.open("wb") as output:
            child = subprocess.Popen(
                [self._flwr.program(program), *arguments],
                cwd=APP,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self._children.append(child)
        self.roots.append(child.pid)

    def end(self) -> None:
        """Kill every tree; stopping politely takes these programs long."""
        for pid in [pid for root in self.roots for pid in tree_of(root)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for child in self._children:
            child.wait()


@contextmanager
def _processes(flwr: FlwrEnvironment, work: Work, folder: Path, times: Path) -> Iterator[_Starter]:
    (folder / "home").mkdir(parents=True)
    path = f"{flwr.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {
        **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        "PATH": path,
        "FLWR_HOME": str(folder / "home"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_PEER": json.dumps({**asdict(work), "times": str(times)}),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    starter = _Starter(flwr, folder, environment)
    try:
        yield starter
    finally:
        starter.end()


def _usage_after(times: Path, number: int, roots: list[int], work: Work) -> Usage:
    def over() -> bool:
        return any(line["round"] >= number for line in rounds_that_ended(times))

    _until(over, roots, f"round {number} ends")
    answered = [line["nodes"] for line in rounds_that_ended(times)]
    if set(answered) != {work.nodes}:
        sys.exit(f"flwr: {answered} of {work.nodes} nodes answered; its logs: {times.parent}")
    return usage_of_trees(roots)


def rounds_that_ended(times: Path) -> list[dict[str, Any]]:
    """What the app wrote down at the end of each round so far."""
    if not times.exists():
        return []
    lines = [json.loads(line) for line in times.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["what"] == "ended"]


def _ends(times: Path) -> list[float]:
    return [float(line["at"]) for line in rounds_that_ended(times)]


def _until(condition: Callable[[], bool], roots: list[int], what: str) -> None:
    give_up_at = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > give_up_at or not any(map(tree_of, roots)):
            sys.exit(f"flwr: it did not happen that {what}")
        time.sleep(0.1)


def _answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
        return True
    return False
