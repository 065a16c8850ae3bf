"""Trains the assignments of a simulated round, here or in several processes.

Knows processes and pipes; the training itself is ``simulated_training``'s.
"""

from __future__ import annotations

import queue
import signal
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Protocol

from typing_extensions import Self

from broker_server.simulated_training import (
    SimulatedTrainer,
    TrainedUpdate,
    TrainingData,
    VirtualAssignment,
)
from wire_protocol.errors import DeviceError, FailureCode, LegendError


class Trainers(Protocol):
    """Whoever trains; a context manager, because processes must end."""

    def train(self, assignments: Sequence[VirtualAssignment]) -> list[TrainedUpdate]:
        """Train each assignment; results come in the order of the assignments.

        Raises:
            LegendError: the base model or the training file cannot be used.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_error: object) -> None: ...


def hire(data: TrainingData, *, processes: int) -> Trainers:
    """One trainer in this process, or several in processes of their own.

    Raises:
        LegendError: the base model or the training file cannot be used.
    """
    return TrainerHere(data) if processes == 1 else TrainerProcesses(data, processes)


class TrainerHere:
    """Trains one assignment after the other in this process."""

    def __init__(self, data: TrainingData) -> None:
        self._trainer = SimulatedTrainer(data)

    def train(self, assignments: Sequence[VirtualAssignment]) -> list[TrainedUpdate]:
        """See ``Trainers``."""
        return [self._trainer.train(assignment) for assignment in assignments]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        return None


class TrainerProcesses:
    """Several processes that share the assignments; whoever is free takes the next.

    Args:
        data: what to train on.
        count: processes; each holds a base model.
    """

    def __init__(self, data: TrainingData, count: int) -> None:
        # Not fork: torch's threads do not survive it.
        context = get_context("spawn")
        self._count = count
        self._free: queue.Queue[Connection] = queue.Queue()
        self._processes = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, data), daemon=True)
            process.start()
            # Ours alone now: the end of the process must show as the end of the pipe.
            theirs.close()
            self._processes.append(process)
            self._free.put(ours)

    def train(self, assignments: Sequence[VirtualAssignment]) -> list[TrainedUpdate]:
        """See ``Trainers``."""
        with ThreadPoolExecutor(self._count) as threads:
            return list(threads.map(self._ask, assignments))

    def _ask(self, assignment: VirtualAssignment) -> TrainedUpdate:
        pipe = self._free.get()
        try:
            pipe.send(assignment)
            answer: TrainedUpdate | str = pipe.recv()
        except (EOFError, OSError) as error:
            line = "a trainer process died; use fewer of them if memory ran out"
            raise DeviceError(FailureCode.TRAINER_DIED, line) from error
        finally:
            self._free.put(pipe)
        if isinstance(answer, str):
            raise DeviceError(FailureCode.INTERNAL, answer)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        while not self._free.empty():
            self._free.get().close()
        for process in self._processes:
            process.join(timeout=5.0)
            process.kill()
            process.join()


class WillingTrainer:
    """A trainer in a process of its own, which answers whatever goes wrong.

    Args:
        data: what to train on; read at the first assignment.
    """

    def __init__(self, data: TrainingData) -> None:
        self._data = data
        self._trainer: SimulatedTrainer | None = None

    def train(self, assignment: VirtualAssignment) -> TrainedUpdate | str:
        """What came of it, or in one line why the data cannot be used."""
        try:
            self._trainer = self._trainer or SimulatedTrainer(self._data)
            return self._trainer.train(assignment)
        except LegendError as error:
            return str(error)


def serve(pipe: Connection, data: TrainingData) -> None:
    """A trainer process: answer assignments until the pipe ends."""
    # Ctrl-C reaches the whole group; the parent decides, and closes the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    trainer = WillingTrainer(data)
    while True:
        try:
            assignment: VirtualAssignment = pipe.recv()
        except (EOFError, OSError):
            return
        pipe.send(trainer.train(assignment))
