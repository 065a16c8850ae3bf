"""The server's end of central evaluation: a warm child process that scores adapters.

Knows processes and the line protocol of ``evaluate``; must not import torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import anyio
import anyio.abc
import structlog
from anyio.streams.buffered import BufferedByteReceiveStream

from wire_protocol.errors import ConfigError, Unavailable

_MAX_LINE_BYTES = 64 * 1024
_CLOSE_S = 5.0
_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    # The child must find this package wherever the server was started.
    "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
}

log = structlog.get_logger()


@dataclass(frozen=True)
class EvaluationSetup:
    """With what base model and on which examples adapters are scored.

    Attributes:
        labels: class names in the head's order; empty for instruction tuning.
        file: canonical JSON lines with the keys text, text_pair (if any), label.
        threads: of the child's arithmetic; 0 leaves it to torch.
    """

    model_dir: Path
    task: str
    file: Path
    labels: tuple[str, ...] = ()
    max_tokens: int = 64
    batch_size: int = 64
    threads: int = 0

    def request(self) -> dict[str, object]:
        """The ``prepare`` request of the line protocol."""
        return {
            "do": "prepare",
            "model_dir": str(self.model_dir.absolute()),
            "task": self.task,
            "labels": list(self.labels),
            "max_tokens": self.max_tokens,
            "file": str(self.file.absolute()),
            "batch_size": self.batch_size,
            "threads": self.threads,
        }


@dataclass(frozen=True)
class EvaluationResult:
    """How good one adapter is on the held-out examples.

    Attributes:
        accuracy: share of right classes, or of right response tokens.
        loss: mean cross entropy in nats, over the same.
        duration_s: time that scoring took.
    """

    accuracy: float
    loss: float
    examples: int
    duration_s: float


class _ChildDied(Exception):
    """The child ended or answered nonsense; the text is its last line, if any."""


@dataclass
class _Child:
    process: anyio.abc.Process
    answers: BufferedByteReceiveStream
    errors: IO[bytes]

    async def ask(self, request: Mapping[str, object]) -> Mapping[str, Any]:
        """Send one request and read its answer.

        Raises:
            _ChildDied: there is no answer to be had.
        """
        if self.process.stdin is None:
            raise _ChildDied("no stdin")
        try:
            await self.process.stdin.send(json.dumps(request).encode() + b"\n")
            line = await self.answers.receive_until(b"\n", _MAX_LINE_BYTES)
            answer = json.loads(line)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
            raise _ChildDied(self.last_words()) from error
        except (anyio.EndOfStream, anyio.IncompleteRead, anyio.DelimiterNotFound) as error:
            raise _ChildDied(self.last_words()) from error
        except ValueError as error:
            raise _ChildDied("it answered something that is not JSON") from error
        if not isinstance(answer, dict):
            raise _ChildDied("it answered something that is not an object")
        return answer

    def last_words(self) -> str:
        """The last line that the child wrote to stderr."""
        size = self.errors.seek(0, os.SEEK_END)
        self.errors.seek(max(0, size - 4096))
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        code = self.process.returncode
        return lines[-1][:300] if lines else f"exit status {code}"

    async def end(self, grace_s: float) -> None:
        """Close stdin, which ends the child, and kill it if it goes on."""
        with anyio.CancelScope(shield=True):
            if self.process.stdin is not None:
                await self.process.stdin.aclose()
            with anyio.move_on_after(grace_s):
                await self.process.wait()
            if self.process.returncode is None:
                self.process.kill()
            # aclose also waits for the process.
            await self.process.aclose()
            self.errors.close()


@dataclass
class Evaluator:
    """Scores PEFT folders in a child process that keeps the base model loaded.

    A child that dies is started again, prepared as before, and asked once more.
    Not for concurrent use by several runs: each call waits for the one before.

    Args:
        command: the child's program and arguments.
    """

    command: Sequence[str] = (sys.executable, "-m", "broker_server.evaluate")
    _lock: anyio.Lock = field(default_factory=anyio.Lock, init=False)
    _child: _Child | None = field(default=None, init=False)
    _setup: EvaluationSetup | None = field(default=None, init=False)

    async def prepare(self, setup: EvaluationSetup) -> int:
        """Load a base model and held-out examples; returns the number of examples.

        Raises:
            ConfigError: the base model or the held-out file is wrong.
            Unavailable: the child died twice.
        """
        async with self._lock:
            self._setup = setup
            answer = await self._ask_twice(setup.request())
            return int(answer["examples"])

    async def evaluate(self, adapter_dir: Path) -> EvaluationResult:
        """Score one PEFT folder on the prepared examples.

        Raises:
            ConfigError: the folder is not an adapter of the base model, or nothing is prepared.
            Unavailable: the child died twice, or ran out of memory.
        """
        async with self._lock:
            if self._setup is None:
                raise ConfigError("evaluation was asked for before it was prepared")
            answer = await self._ask_twice(_evaluate_request(adapter_dir))
        return EvaluationResult(
            accuracy=float(answer["accuracy"]),
            loss=float(answer["loss"]),
            examples=int(answer["examples"]),
            duration_s=float(answer["seconds"]),
        )

    async def close(self) -> None:
        """End the child; harmless when there is none."""
        child, self._child = self._child, None
        if child is not None:
            await child.end(_CLOSE_S)

    async def _ask_twice(self, request: Mapping[str, object]) -> Mapping[str, Any]:
        try:
            return await self._ask(request)
        except _ChildDied as death:
            log.warning("evaluator_died", detail=str(death))
        try:
            return await self._ask(request)
        except _ChildDied as death:
            raise Unavailable(
                f"evaluation died twice ({death}); check this server's free memory"
            ) from death

    async def _ask(self, request: Mapping[str, object]) -> Mapping[str, Any]:
        try:
            if self._child is None:
                self._child = await _start(self.command)
                if request["do"] != "prepare" and self._setup is not None:
                    _require(await self._child.ask(self._setup.request()))
            answer = await self._child.ask(request)
        except BaseException:
            # Also when cancelled: a late answer must not pass for the next request's.
            await self._abandon()
            raise
        if answer.get("event") == "failed":
            # Its base model may hold half an adapter.
            await self._abandon()
        return _require(answer)

    async def _abandon(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            await child.end(0.0)


def _evaluate_request(adapter_dir: Path) -> dict[str, object]:
    return {"do": "evaluate", "adapter_dir": str(adapter_dir.absolute())}


async def _start(command: Sequence[str]) -> _Child:
    errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
    process = await anyio.open_process(
        list(command),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        env={**os.environ, **_QUIET},
    )
    if process.stdout is None:
        raise _ChildDied("no stdout")
    return _Child(process, BufferedByteReceiveStream(process.stdout), errors)


def _require(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Pass an answer on, or raise what it says.

    Raises:
        ConfigError: a file that the child was given is wrong.
        Unavailable: the child could not do it for another reason.
    """
    if answer.get("event") != "failed":
        return answer
    detail = str(answer.get("detail"))
    raise ConfigError(detail) if answer.get("cause") == "config" else Unavailable(detail)
