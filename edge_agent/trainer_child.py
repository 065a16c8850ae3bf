"""The trainer's process: JSON lines in and out, one command at a time.

    -> {"do":"train","round_dir":"..."}
    -> {"do":"benchmark","request_file":"..."}
    -> {"do":"cancel"}
    -> {"do":"exit"}
    <- {"event":"progress","step":1,"steps":10,"loss":0.7}           while training
    <- {"event":"progress","step":1,"steps":5,"what":"inference"}    in a benchmark
    <- {"event":"done"}
    <- {"event":"failed","code":"out_of_memory","detail":"..."}

A thread reads commands, so that a cancel is seen between steps and the end of the input (the
agent is gone) ends this process at once, even in the middle of a step. torch is imported with the
first command. Valid on Python 3.8.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import IO, Any, Dict, Optional

from wire_protocol.errors import DeviceError, FailureCode

_KILL_ME_FIRST = "500"


class Command:
    """One command with the moment it came and its own cancel flag."""

    def __init__(self, fields: Dict[str, Any]) -> None:
        self.fields = fields
        self.cancelled = threading.Event()
        self._received = time.monotonic()

    def elapsed_s(self) -> float:
        """Seconds since the command came."""
        return time.monotonic() - self._received


class Inbox:
    """Commands from the agent, in order; a cancel goes to the newest one."""

    def __init__(self) -> None:
        self._commands: "queue.Queue[Optional[Command]]" = queue.Queue()
        self._newest: Optional[Command] = None

    def read(self, lines: IO[str]) -> None:
        """Read until the input ends, then end the process: the agent is gone."""
        for line in lines:
            fields = json.loads(line)
            if fields["do"] == "cancel":
                self._cancel()
            elif fields["do"] == "exit":
                self._cancel()
                self._commands.put(None)
            else:
                self._newest = Command(fields)
                self._commands.put(self._newest)
        os._exit(0)

    def next(self) -> Optional[Command]:
        """Wait for the next command; None to exit."""
        return self._commands.get()

    def _cancel(self) -> None:
        if self._newest is not None:
            self._newest.cancelled.set()


class Outbox:
    """Events to the agent."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def send(self, event: str, **fields: object) -> None:
        """Write one event."""
        self._stream.write(json.dumps({"event": event, **fields}) + "\n")
        self._stream.flush()


class ChildLoop:
    """Carries commands out and turns every way to fail into one event."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._trainer: Any = None

    def carry_out(self, command: Command) -> None:
        """Do one command; its last event is ``done`` or ``failed``."""
        try:
            self._do(command)
        except Exception as error:  # noqa: BLE001  # whatever happens, the agent gets one line
            failure = _failure_of(error)
            if not isinstance(error, DeviceError):
                traceback.print_exc()
            self._outbox.send("failed", code=failure.code.value, detail=str(failure))
        else:
            self._outbox.send("done")

    def _do(self, command: Command) -> None:
        if self._trainer is None:
            from edge_agent.warm_trainer import WarmTrainer  # noqa: PLC0415  # seconds, and torch

            self._trainer = WarmTrainer()
        if command.fields["do"] == "train":
            self._train(command)
        elif command.fields["do"] == "benchmark":
            self._benchmark(command)
        else:
            raise ValueError(f"unknown command {command.fields['do']!r}")

    def _train(self, command: Command) -> None:
        from edge_agent.finetune import Supervision  # noqa: PLC0415
        from edge_agent.round_directory import read_request  # noqa: PLC0415

        round_dir = Path(command.fields["round_dir"])
        steps = read_request(round_dir).steps
        supervision = Supervision(
            on_step=lambda step, loss: self._outbox.send(
                "progress", step=step, steps=steps, loss=loss
            ),
            cancelled=command.cancelled.is_set,
            elapsed_s=command.elapsed_s,
            sleep=command.cancelled.wait,
        )
        self._trainer.train(round_dir, supervision)

    def _benchmark(self, command: Command) -> None:
        from edge_agent.probe import PROGRESS_STEPS  # noqa: PLC0415

        def on_step(step: int, what: str) -> None:
            if command.cancelled.is_set():
                raise DeviceError(FailureCode.CANCELLED, "the benchmark was cancelled")
            self._outbox.send("progress", step=step, steps=PROGRESS_STEPS, what=what)

        self._trainer.benchmark(Path(command.fields["request_file"]), on_step)


def main() -> None:
    """Serve the agent until it says exit or goes away."""
    _be_the_one_to_kill()
    outbox = Outbox(_private_stdout())
    inbox = Inbox()
    threading.Thread(target=inbox.read, args=(sys.stdin,), daemon=True).start()
    worker = ChildLoop(outbox)
    while True:
        command = inbox.next()
        if command is None:
            return
        worker.carry_out(command)


def _failure_of(error: Exception) -> DeviceError:
    if isinstance(error, ImportError):
        line = (
            f"the trainer's Python lacks a package: {error}; set trainer_python to one that has it"
        )
        return DeviceError(FailureCode.INTERNAL, line)
    from edge_agent.warm_trainer import failure_of  # noqa: PLC0415

    return failure_of(error)


def _private_stdout() -> IO[str]:
    """Keep the real standard output for events; what libraries print goes to stderr."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return events


def _be_the_one_to_kill() -> None:
    """Ask the kernel to prefer this process to the agent when memory runs out."""
    try:
        Path("/proc/self/oom_score_adj").write_text(_KILL_ME_FIRST, encoding="ascii")
    except OSError as error:
        sys.stderr.write(f"oom_score_adj stays as it is: {error}\n")


if __name__ == "__main__":
    main()
