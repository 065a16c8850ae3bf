"""The trainer as the agent sees it: a warm child process whose deaths have names.

Knows how to start, feed and end the child. Must not import torch: the child may run under another
interpreter, and the kernel may kill it at any time without harm to the agent.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import anyio
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream

import edge_agent
import wire_protocol
from edge_agent.round_directory import ASSIGNMENT_FILE, BENCHMARK_RESULT_FILE, RESULT_FILE
from wire_protocol.errors import DeviceError, FailureCode

_MAX_LINE_BYTES = 64 * 1024
_MAX_LOG_BYTES = 1024 * 1024
_CLOSE_S = 5.0
_ABORT_SIGNS = ("memory allocation of", "bad_alloc")
"""Last words of Rust and C++ code that cannot get memory."""


@dataclass(frozen=True)
class TrainerProgress:
    """How far the trainer is.

    Attributes:
        step: done (training) or begun (benchmark), from 1.
        loss: of the step, while training.
        what: the part that runs, in a benchmark.
    """

    step: int
    steps: int
    loss: float | None = None
    what: str = ""


OnProgress = Callable[[TrainerProgress], object]


class Trainer:
    """Runs rounds and benchmarks in a child process, one at a time.

    Args:
        trainer_python: interpreter of the child; may be older than the agent's.
        log_file: where the child's stderr goes; started anew when it grows large.
        threads: computing threads of the child.
    """

    def __init__(self, trainer_python: str, *, log_file: Path, threads: int) -> None:
        self._python = trainer_python
        self._log_file = log_file
        self._threads = threads
        self._process: Process | None = None
        self._events: BufferedByteReceiveStream | None = None
        self._turn = anyio.Lock()
        self._starts = 0

    @property
    def pid(self) -> int | None:
        """Process id of the child; None while there is none."""
        return self._process.pid if self._alive() and self._process else None

    @property
    def starts(self) -> int:
        """How often a child was started."""
        return self._starts

    async def train(self, round_dir: Path, on_progress: OnProgress) -> dict[str, Any]:
        """Do the assignment in a round directory.

        Cancelling the caller kills the child; the next call starts another.

        Args:
            round_dir: holds ``assignment.json``.
            on_progress: called after every step.

        Returns:
            The content of ``result.json``; ``update.safetensors`` lies beside it.

        Raises:
            DeviceError: the child said no, or died: OUT_OF_MEMORY when killed by
                SIGKILL, TRAINER_DIED otherwise.
        """
        await self._request({"do": "train", "round_dir": str(round_dir)}, on_progress)
        result = _read_json(round_dir / RESULT_FILE)
        wanted = min(_read_json(round_dir / ASSIGNMENT_FILE)["batch_size"], result["examples"])
        if result["report"]["batch_size"] < wanted:
            await self._replace()
        return result

    async def benchmark(self, request_file: Path, on_progress: OnProgress) -> dict[str, Any]:
        """Measure a base model.

        Args:
            request_file: see ``warm_trainer.WarmTrainer.benchmark``.
            on_progress: called before every part.

        Returns:
            The content of ``benchmark_result.json``, which lies beside the request.

        Raises:
            DeviceError: as ``train``.
        """
        await self._request({"do": "benchmark", "request_file": str(request_file)}, on_progress)
        return _read_json(request_file.with_name(BENCHMARK_RESULT_FILE))

    async def cancel(self) -> None:
        """Stop what runs, between two steps; its caller gets DeviceError CANCELLED."""
        if self._turn.locked() and self._alive():
            with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
                await self._send({"do": "cancel"})

    async def close(self) -> None:
        """End the child: the end of its input ends it, even in the middle of a step."""
        process = self._process
        if process is None:
            return
        with anyio.CancelScope(shield=True):
            if process.stdin is not None:
                await process.stdin.aclose()
            with anyio.move_on_after(_CLOSE_S):
                await process.wait()
            await self._kill()

    async def _request(self, command: dict[str, str], on_progress: OnProgress) -> None:
        async with self._turn:
            if not self._alive():
                await self._start()
            finished = False
            try:
                end = await self._exchange(command, on_progress)
                finished = True
            finally:
                # Half an answer may be on its way: this child can take no other command.
                if not finished:
                    with anyio.CancelScope(shield=True):
                        await self._kill()
        if end["event"] == "failed":
            code = FailureCode(end["code"])
            if code is FailureCode.OUT_OF_MEMORY:
                await self._replace()
            raise DeviceError(code, str(end["detail"]))

    async def _exchange(self, command: dict[str, str], on_progress: OnProgress) -> dict[str, Any]:
        """Send a command and read its events up to the last one."""
        try:
            await self._send(command)
            while True:
                event = await self._receive()
                if event["event"] != "progress":
                    return event
                on_progress(
                    TrainerProgress(
                        event["step"], event["steps"], event.get("loss"), event.get("what", "")
                    )
                )
        except (anyio.BrokenResourceError, anyio.IncompleteRead, anyio.EndOfStream) as error:
            raise await self._death() from error

    async def _start(self) -> None:
        self._log_file.parent.mkdir(parents=True, exist_ok=True)
        large = self._log_file.exists() and self._log_file.stat().st_size > _MAX_LOG_BYTES
        mode: Literal["wb", "ab"] = "wb" if large else "ab"
        environment = self._environment()
        try:
            with self._log_file.open(mode) as log:
                self._process = await anyio.open_process(
                    [self._python, "-m", "edge_agent.trainer_child"],
                    stderr=log,
                    env=environment,
                    # A Ctrl-C is for the agent, which then ends the child in order.
                    start_new_session=True,
                )
        except OSError as error:
            line = f"cannot start {self._python}: {error.strerror}; correct trainer_python"
            raise DeviceError(FailureCode.TRAINER_DIED, line) from error
        if self._process.stdout is None:
            raise RuntimeError("the trainer has no standard output")
        self._events = BufferedByteReceiveStream(self._process.stdout)
        self._starts += 1

    def _environment(self) -> dict[str, str]:
        packages = _packages_folder(self._log_file.parent / "trainer_packages")
        path = os.pathsep.join(filter(None, [str(packages), os.environ.get("PYTHONPATH")]))
        return {
            **os.environ,
            "PYTHONPATH": path,
            "PYTHONUNBUFFERED": "1",
            "MALLOC_ARENA_MAX": "2",
            "OMP_NUM_THREADS": str(self._threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
        }

    async def _send(self, command: dict[str, str]) -> None:
        if self._process is None or self._process.stdin is None:
            raise anyio.BrokenResourceError
        await self._process.stdin.send(json.dumps(command).encode() + b"\n")

    async def _receive(self) -> dict[str, Any]:
        if self._events is None:
            raise anyio.EndOfStream
        line = await self._events.receive_until(b"\n", _MAX_LINE_BYTES)
        event: dict[str, Any] = json.loads(line)
        return event

    async def _death(self) -> DeviceError:
        """Name the death of the child."""
        code = await self._process.wait() if self._process else 0
        if code == -signal.SIGKILL:
            return DeviceError(
                FailureCode.OUT_OF_MEMORY,
                "the trainer was killed (signal 9), most likely by the kernel for lack of memory",
            )
        last_line = _last_line(self._log_file)
        aborted = any(sign in last_line for sign in _ABORT_SIGNS)
        return DeviceError(
            FailureCode.OUT_OF_MEMORY if aborted else FailureCode.TRAINER_DIED,
            f"the trainer ended with status {code}: {last_line}",
        )

    async def _replace(self) -> None:
        """Let the next request start a fresh child.

        Once memory has run out in a process, oneDNN refuses new primitives there
        for good ("could not create a primitive"), however much is free later.
        """
        async with self._turn:
            with anyio.CancelScope(shield=True):
                await self._kill()

    async def _kill(self) -> None:
        process, self._process, self._events = self._process, None, None
        if process is not None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.aclose()

    def _alive(self) -> bool:
        return self._process is not None and self._process.returncode is None


def _packages_folder(folder: Path) -> Path:
    """A folder with our packages only, for the child's PYTHONPATH.

    Another interpreter must not see the rest of this one's site-packages.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for package in (edge_agent, wire_protocol):
        target = Path(str(package.__file__)).resolve().parent
        link = folder / target.name
        if link.is_symlink() and link.resolve() == target:
            continue
        fresh = folder / (target.name + ".partial")
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(target)
        fresh.replace(link)
    return folder


def _last_line(log_file: Path) -> str:
    lines = log_file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "it said nothing"


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
