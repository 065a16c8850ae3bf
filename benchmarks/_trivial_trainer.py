"""A trainer child that trains nothing: it answers an adapter with as many bytes, at once.

Runs in place of the trainer child, with the child's own loop, commands and files around it, so that
an agent does all that it does in a round. Needs no torch. ``write_program`` makes the executable
for an agent's setting ``trainer_python``.
"""

from __future__ import annotations

import json
import struct
import sys
import zlib
from pathlib import Path

from edge_agent import trainer_child
from edge_agent.round_directory import (
    BENCHMARK_RESULT_FILE,
    TrainingReport,
    TrainRequest,
    read_request,
    write_result,
)
from wire_protocol.durable import write_durably

MEASURED = {
    "forward_seconds_per_token_layer": 1e-6,
    "backward_seconds_per_token_layer": 2e-6,
    "memory_base_bytes": 1_000_000,
    "memory_bytes_per_token": 10.0,
    "memory_bytes_per_token_layer": 10.0,
    "inference": None,
    "onnx_error": None,
    "steps_timed": 1,
}
CHANGE = 1e-4
"""Of every value, about: equal bytes of two devices would be sent and stored once."""


def write_program(folder: Path) -> Path:
    """An executable that an agent starts as if it were its trainer's Python."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "trivial-python"
    # Without the installed packages: it starts quicker, and needs none of them.
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{Path(__file__)}"\n')
    program.chmod(0o755)
    return program


def trivial_update(adapter: bytes, assignment_id: str) -> bytes:
    """The adapter's tensors, every value the same small number; another one each time."""
    begin: int = 8 + struct.unpack("<Q", adapter[:8])[0]
    share = zlib.crc32(assignment_id.encode()) / 2**32
    return adapter[:begin] + struct.pack("<f", CHANGE * (1 + share)) * ((len(adapter) - begin) // 4)


class TrivialLoop(trainer_child.ChildLoop):
    """The trainer child's loop with no work in it."""

    def _do(self, command: trainer_child.Command) -> None:
        if command.fields["do"] != "train":
            target = Path(command.fields["request_file"]).with_name(BENCHMARK_RESULT_FILE)
            write_durably(target, json.dumps(MEASURED).encode(), site="trainer.benchmark")
            return
        round_dir = Path(command.fields["round_dir"])
        request = read_request(round_dir)
        self._outbox.send("progress", step=1, steps=request.steps, loss=1.0)
        write_result(
            round_dir,
            trivial_update(request.adapter_file.read_bytes(), round_dir.name),
            examples=1,
            ranks=request.ranks,
            report=_report(request),
        )


def _report(request: TrainRequest) -> TrainingReport:
    return TrainingReport(
        steps_done=request.steps,
        tokens=request.steps * 16,
        forward_s=0.01,
        backward_s=0.02,
        training_s=0.03,
        peak_memory_bytes=2_000_000,
        batch_size=request.limits.batch_size,
        gradient_checkpointing=False,
        first_loss=1.0,
        last_loss=0.9,
    )


if __name__ == "__main__":
    trainer_child.ChildLoop = TrivialLoop  # type: ignore[misc]
    trainer_child.main()
