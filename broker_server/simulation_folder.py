"""The folder of a simulated run: its settings, its figures, and where it can go on.

    config.yaml         the specification, complete
    checkpoint.json     everything a killed simulation needs to go on
    metrics.jsonl, assignments.jsonl, summary.json, adapter/, *.png     see ``run_folder``
    blobs/              the present global adapter and the held-out examples

The checkpoint is the truth; the other files are written from it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from broker_server.run_folder import (
    ASSIGNMENTS_FILE,
    METRICS_FILE,
    SUMMARY_FILE,
    Baseline,
    RunReport,
    assignment_lines,
    metrics_lines,
    summary,
    write_file,
)
from broker_server.run_state import RoundResult, RunCheckpoint, RunStatus
from broker_server.simulation_spec import SimulationSpec
from broker_server.strategies import CapacityEstimate
from broker_server.virtual_cache import VirtualCache
from wire_protocol.errors import ConfigError
from wire_protocol.parts import BlobRef
from wire_protocol.plain_yaml import read_yaml

CONFIG_FILE = "config.yaml"
CHECKPOINT_FILE = "checkpoint.json"


class Score(BaseModel):
    """How good one adapter is: accuracy 0 to 1, loss in nats."""

    model_config = ConfigDict(frozen=True)

    accuracy: float
    loss: float


class SimulationState(BaseModel):
    """A simulation between two rounds.

    Attributes:
        now: of the virtual clock, in seconds.
        checkpoint: of the coordinator.
        rounds: committed rounds in order.
        test_scores: of round 0, 1, ..., None where the test file was not scored;
            empty without a separate validation file.
        estimates: what the server learned of each device.
        strategy_state: tensors that the strategy keeps between rounds.
        caches: what each virtual device has cached.
        residuals: what a coarse codec left out of each virtual device's updates.
    """

    model_config = ConfigDict(frozen=True)

    now: float
    checkpoint: RunCheckpoint
    baseline: Score | None = None
    rounds: tuple[RoundResult, ...] = ()
    test_scores: tuple[Score | None, ...] = ()
    estimates: dict[str, CapacityEstimate] = {}
    strategy_state: BlobRef | None = None
    caches: dict[str, VirtualCache] = {}
    residuals: dict[str, BlobRef] = {}
    status: RunStatus = RunStatus.RUNNING
    reason: str = ""


@dataclass(frozen=True)
class SimulationFolder:
    """One folder on disk.

    Attributes:
        root: made by ``prepare``.
    """

    root: Path

    def prepare(self, spec: SimulationSpec) -> SimulationState | None:
        """Claim the folder for a simulation.

        Returns:
            Where an interrupted simulation of the same settings stands; None
            for a new one.

        Raises:
            ConfigError: the folder holds another simulation, or cannot be used.
        """
        wanted = spec.model_dump(mode="json")
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            if not (self.root / CONFIG_FILE).exists():
                text = yaml.safe_dump(wanted, sort_keys=False, allow_unicode=True)
                write_file(self.root / CONFIG_FILE, text.encode())
        except OSError as error:
            raise ConfigError(f"cannot write to {self.root}: {error.strerror}") from error
        held = read_config(self.root)
        different = sorted(key for key in wanted if wanted[key] != held.get(key))
        if different:
            raise ConfigError(
                f"{self.root} holds a simulation with other settings "
                f"({', '.join(different)}); choose another folder with --out"
            )
        return self._read_checkpoint()

    def disclaim(self) -> None:
        """Give up a folder in which nothing was done: whoever mends a typo may use it again."""
        (self.root / CONFIG_FILE).unlink(missing_ok=True)

    def write(self, state: SimulationState, report: RunReport) -> None:
        """Commit a state, then make the files for people say the same."""
        write_file(self.root / CHECKPOINT_FILE, state.model_dump_json().encode())
        lines = [
            {**line, **_test_columns(state, number)}
            for number, line in enumerate(metrics_lines(report))
        ]
        assignments = [line for result in report.rounds for line in assignment_lines(result)]
        write_file(self.root / METRICS_FILE, _json_lines(lines))
        write_file(self.root / ASSIGNMENTS_FILE, _json_lines(assignments))
        write_file(
            self.root / SUMMARY_FILE, (json.dumps(summary(report), indent=2) + "\n").encode()
        )

    def _read_checkpoint(self) -> SimulationState | None:
        path = self.root / CHECKPOINT_FILE
        try:
            return SimulationState.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            raise ConfigError(f"{path} cannot be read; remove the folder to begin anew") from error


def report_of(spec: SimulationSpec, state: SimulationState, labels: tuple[str, ...]) -> RunReport:
    """What the files for people say about a simulation."""
    baseline = state.baseline
    return RunReport(
        run_id=spec.name,
        name=spec.name,
        strategy=spec.strategy,
        base_model=spec.model_name,
        task=spec.task,
        labels=labels,
        status=state.status.value,
        reason=state.reason,
        rounds_planned=spec.rounds,
        baseline=Baseline(baseline.accuracy, baseline.loss) if baseline else None,
        rounds=state.rounds,
        privacy=spec.privacy,
    )


def read_config(root: Path) -> Mapping[str, Any]:
    """The specification of a simulated run, as plain values.

    Raises:
        ConfigError: the folder holds none.
    """
    path = root / CONFIG_FILE
    try:
        value = read_yaml(path.read_text(encoding="utf-8"), source=str(path))
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        raise ConfigError(f"{root} is not the folder of a simulation: no {CONFIG_FILE}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} does not hold the keys of a simulation")
    return value


def _test_columns(state: SimulationState, number: int) -> dict[str, float]:
    if number >= len(state.test_scores):
        return {}
    score = state.test_scores[number]
    if score is None:
        return {}
    return {"test_accuracy": score.accuracy, "test_loss": score.loss}


def _json_lines(lines: list[dict[str, object]]) -> bytes:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
