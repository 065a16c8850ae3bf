"""What a demonstration brought: the result for programs and the closing table for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from broker_server.tables import (
    as_bytes,
    as_percent,
    as_seconds,
    depths_table,
    rounds_table,
)

Json = Mapping[str, Any]


@dataclass(frozen=True)
class DemoRound:
    """Cost and outcome of one round."""

    round: int
    accuracy: float
    duration_s: float
    waiting_s: float
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True)
class DemoDevice:
    """One device; ``depths`` has one entry per round, 0 where it took no part."""

    device_id: str
    board: str
    depths: tuple[int, ...]


@dataclass(frozen=True)
class DemoResult:
    """What the demonstration measured; ``wall_s`` counts from its first step."""

    accuracy_before: float
    accuracy_after: float
    rounds: tuple[DemoRound, ...]
    devices: tuple[DemoDevice, ...]
    adapter_dir: str
    wall_s: float

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return asdict(self)


def result_of(
    run: Json, boards: Mapping[str, str], adapter_dir: Path, *, wall_s: float
) -> DemoResult:
    """Pick the result out of a finished run's JSON."""
    rounds = tuple(
        DemoRound(
            round=one["round"],
            accuracy=one["accuracy"],
            duration_s=one["duration_s"],
            waiting_s=one["waiting_s"],
            bytes_up=one["bytes_up"],
            bytes_down=one["bytes_down"],
        )
        for one in run["rounds"]
    )
    depths = [{d["device_id"]: int(d["depth"]) for d in one["devices"]} for one in run["rounds"]]
    devices = tuple(
        DemoDevice(device_id, board, tuple(row.get(device_id, 0) for row in depths))
        for device_id, board in boards.items()
    )
    before, after = run["accuracy_before"], rounds[-1].accuracy
    return DemoResult(before, after, rounds, devices, str(adapter_dir), wall_s)


def show_summary(console: Console, run: Json, result: DemoResult, *, model_dir: Path) -> None:
    """Print the closing tables and how to use the adapter."""
    up = sum(one.bytes_up for one in result.rounds)
    down = sum(one.bytes_down for one in result.rounds)
    before, after = as_percent(result.accuracy_before), as_percent(result.accuracy_after)
    base_model = f"{str(model_dir)!r}, num_labels={len(run['spec']['labels'])}"
    console.print(rounds_table(run))
    console.print(depths_table(run))
    lines = (
        f"accuracy  {before} before training, {after} after {len(result.rounds)} rounds",
        f"traffic   {as_bytes(up)} up, {as_bytes(down)} down",
        f"time      {as_seconds(result.wall_s)}",
        f"adapter   {result.adapter_dir}",
        "load it with",
        "  from transformers import AutoModelForSequenceClassification; from peft import PeftModel",
        f"  base = AutoModelForSequenceClassification.from_pretrained({base_model})",
        f"  model = PeftModel.from_pretrained(base, {result.adapter_dir!r}).eval()",
    )
    for line in lines:
        console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)
