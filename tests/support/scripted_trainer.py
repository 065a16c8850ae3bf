"""A trainer that answers by rule: same device, round and adapter, same bytes.

Runs in place of the trainer child, with the child's own loop, commands and files around it, so an
agent notices no difference; needs no torch and 15 MB instead of 500. ``write_program`` makes the
executable that goes into an agent's setting ``trainer_python``.

A device may be told to wait: round R of device D is finished only once ``<folder>/free-R`` exists,
if ``hold(folder, R, D)`` was called before.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import struct
import sys
import time
from array import array
from pathlib import Path
from typing import Any

from edge_agent import trainer_child
from edge_agent.round_directory import (
    BENCHMARK_RESULT_FILE,
    TrainingReport,
    TrainRequest,
    read_request,
    write_result,
)
from wire_protocol.durable import write_durably
from wire_protocol.errors import DeviceError, FailureCode

ROOT = Path(__file__).parents[2]
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


def write_program(folder: Path) -> Path:
    """An executable that an agent starts as if it were its trainer's Python."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "scripted-python"
    program.write_text(
        f'#!/bin/sh\nSCRIPT_FOLDER="{folder}" exec "{sys.executable}" -S "{Path(__file__)}"\n'
    )
    program.chmod(0o755)
    return program


def hold(folder: Path, round_number: int, device_id: str) -> None:
    """Let this device wait in this round until it is freed."""
    (folder / f"hold-{round_number}-{device_id}").touch()


def free(folder: Path, round_number: int) -> None:
    """Let the round's waiting device go on."""
    (folder / f"free-{round_number}").touch()


def scripted_update(
    device_id: str, round_number: int, adapter: bytes, ranks: tuple[int, ...]
) -> bytes:
    """What this device answers: every trained layer and the head, filled from a seed."""
    header_bytes = struct.unpack("<Q", adapter[:8])[0]
    header = json.loads(adapter[8 : 8 + header_bytes])
    base = hashlib.sha256(adapter).hexdigest()
    rng = random.Random(f"{device_id}/{round_number}/{base}")
    described: dict[str, Any] = {"__metadata__": {"codec": "fp32"}}
    values = array("f")
    for name in sorted(name for name in header if _is_trained(name, ranks)):
        shape = header[name]["shape"]
        begin = len(values) * 4
        count = 1
        for size in shape:
            count *= size
        values.extend(rng.uniform(-0.01, 0.01) for _ in range(count))
        offsets = [begin, len(values) * 4]
        described[name] = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + values.tobytes()


def _is_trained(name: str, ranks: tuple[int, ...]) -> bool:
    if name.startswith("layers."):
        return ranks[int(name.split(".")[1])] > 0
    return name.startswith("head.")


class ScriptedLoop(trainer_child.ChildLoop):
    """The trainer child's loop with other work in it."""

    def _do(self, command: trainer_child.Command) -> None:
        if command.fields["do"] == "train":
            self._train(command)
        else:
            target = Path(command.fields["request_file"]).with_name(BENCHMARK_RESULT_FILE)
            write_durably(target, json.dumps(MEASURED).encode(), site="trainer.benchmark")

    def _train(self, command: trainer_child.Command) -> None:
        round_dir = Path(command.fields["round_dir"])
        request = read_request(round_dir)
        assignment = json.loads((round_dir / "assignment.json").read_text(encoding="utf-8"))
        device_id = assignment["assignment_id"].rpartition(".")[2]
        round_number = int(assignment["round_number"])
        self._outbox.send("progress", step=1, steps=request.steps, loss=1.0)
        time.sleep(random.Random(f"{device_id}/{round_number}").uniform(0.0, 0.4))
        self._wait(round_number, device_id, command)
        adapter = request.adapter_file.read_bytes()
        update = scripted_update(device_id, round_number, adapter, request.ranks)
        write_result(
            round_dir,
            update,
            examples=int(hashlib.sha256(device_id.encode()).hexdigest()[:2], 16) + 1,
            ranks=request.ranks,
            report=_report(request),
        )

    def _wait(self, round_number: int, device_id: str, command: trainer_child.Command) -> None:
        folder = Path(os.environ["SCRIPT_FOLDER"])
        while (folder / f"hold-{round_number}-{device_id}").exists():
            if (folder / f"free-{round_number}").exists():
                return
            if command.cancelled.wait(0.05):
                raise DeviceError(FailureCode.CANCELLED, "the assignment was cancelled")


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
    trainer_child.ChildLoop = ScriptedLoop  # type: ignore[misc]
    trainer_child.main()
