"""The result folder of a run: what a person opens to see how it went.

Pure functions make the content; thin ones write it. The store is the truth:
whoever begins with a folder writes all of it, so that no line can be there
twice or be missing. Knows no torch and no database.

    metrics.jsonl       one line a round, from round 0 (before any training)
    assignments.jsonl   one line a device and round
    summary.json        how the run stands
    adapter/            the latest global adapter as a PEFT folder
    accuracy.png, devices.png
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from broker_server.run_figures import RunFigures
from broker_server.run_spec import PrivacySettings
from broker_server.run_state import RoundResult
from wire_protocol import durable

METRICS_FILE = "metrics.jsonl"
ASSIGNMENTS_FILE = "assignments.jsonl"
SUMMARY_FILE = "summary.json"
ADAPTER_FOLDER = "adapter"


@dataclass(frozen=True)
class Baseline:
    """The base model with the untrained adapter: round 0."""

    accuracy: float
    loss: float


@dataclass(frozen=True)
class RunReport:
    """Everything that the result folder says about a run.

    Attributes:
        status: queued, running, finished, cancelled or failed.
        reason: why it ended, if there is more to say.
        baseline: None until round 0 was evaluated.
        rounds: committed rounds in order.
        privacy: what the run promises its devices; None for nothing.
    """

    run_id: str
    name: str
    strategy: str
    base_model: str
    task: str
    labels: tuple[str, ...]
    status: str
    reason: str
    rounds_planned: int
    baseline: Baseline | None
    rounds: tuple[RoundResult, ...]
    privacy: PrivacySettings | None = None


def metrics_lines(report: RunReport) -> list[dict[str, object]]:
    """One object a round; round 0 is the evaluation before any training."""
    figures = RunFigures()
    return baseline_line(report) + [figures.add(result) for result in report.rounds]


def baseline_line(report: RunReport) -> list[dict[str, object]]:
    """The line of round 0, if that was evaluated."""
    if report.baseline is None:
        return []
    return [{"round": 0, **asdict(report.baseline), "elapsed_s": 0.0}]


def assignment_lines(result: RoundResult) -> list[dict[str, object]]:
    """One object a device of one round: what it was given and what came of it."""
    return [{"round": result.round, **device.model_dump(mode="json")} for device in result.devices]


def summary(report: RunReport, figures: RunFigures | None = None) -> dict[str, object]:
    """How the run stands: its best and last accuracy and what it cost so far.

    Times in seconds; ``waiting_share`` is waiting time over completion plus
    waiting time, of all devices that sent updates.

    Args:
        report: the run.
        figures: of its rounds; default: they are taken from the report.

    Source: arXiv:2412.20004, average waiting time.
    """
    if figures is None:
        figures = RunFigures()
        for result in report.rounds:
            figures.add(result)
    before = report.baseline.accuracy if report.baseline else None
    scores = [score for score in (before, figures.accuracy_best) if score is not None]
    known_s = figures.idle_s + figures.busy_s
    return {
        "run_id": report.run_id,
        "name": report.name,
        "strategy": report.strategy,
        "base_model": report.base_model,
        "task": report.task,
        "labels": list(report.labels),
        "status": report.status,
        "reason": report.reason,
        "rounds_planned": report.rounds_planned,
        "rounds_done": figures.rounds,
        "accuracy_before": before,
        "accuracy": before if figures.accuracy is None else figures.accuracy,
        "accuracy_best": max(scores, default=None),
        "loss": figures.loss,
        "duration_s": figures.duration_s,
        "waiting_s": figures.waiting_s / figures.rounds if figures.rounds else None,
        "waiting_share": figures.idle_s / known_s if known_s else None,
        "bytes_up": figures.bytes_up,
        "bytes_down": figures.bytes_down,
        "devices": len(figures.devices),
        "updates_clipped": figures.clipped,
        "updates_refused": figures.refused,
        "privacy": _privacy(report, figures.rounds),
        "emulated_devices": len(figures.emulated),
    }


def _privacy(report: RunReport, done: int) -> Mapping[str, object] | None:
    if report.privacy is None:
        return None
    # Reckoning needs NumPy and SciPy; runs without privacy must not wait for them.
    from broker_server.privacy import privacy_report  # noqa: PLC0415

    return privacy_report(report.privacy, rounds_done=done, rounds_planned=report.rounds_planned)


class RunFolder:
    """The text files of one run, one round after another.

    The first rounds given to it replace what lies there; later ones are added to that, so that a
    round costs the same however many there were. A server that starts again begins anew.

    Args:
        root: the run's folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.figures = RunFigures()

    def add(self, report: RunReport) -> None:
        """Write the rounds of a report, all of which must come after those that are there.

        Raises:
            OSError: the disk is full or failed; write everything anew with another ``RunFolder``.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        first = self.figures.rounds == 0
        metrics = baseline_line(report) if first else []
        metrics += [self.figures.add(result) for result in report.rounds]
        assignments = (line for result in report.rounds for line in assignment_lines(result))
        write = write_file if first else _append
        write(self.root / METRICS_FILE, _json_lines(metrics))
        write(self.root / ASSIGNMENTS_FILE, _json_lines(assignments))
        text = json.dumps(summary(report, self.figures), indent=2, ensure_ascii=False) + "\n"
        # A summary that is written again with the next round is not worth a wait for the disk.
        write_file(self.root / SUMMARY_FILE, text.encode(), flush=report.status != "running")


def _append(path: Path, lines: bytes) -> None:
    with path.open("ab") as file:
        file.write(lines)


def list_files(folder: Path) -> Sequence[str]:
    """Finished files below a run's folder, as sorted relative paths with slashes.

    Files that are being written carry names that begin with a dot; left out.
    """
    if not folder.is_dir():
        return []
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(
        path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts)
    )


def says(folder: Path, status: str) -> bool:
    """Whether ``summary.json`` gives this status."""
    try:
        summary_now = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(summary_now, dict) and summary_now.get("status") == status


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed server had not finished; nobody may be writing there now."""
    for path in folder.glob(".*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_file(path: Path, content: bytes, *, flush: bool = True) -> None:
    """Replace a file of results as a whole; anybody on this machine may read it."""
    durable.write_durably(path, content, site="server.results", mode=0o644, flush=flush)


def _json_lines(lines: Iterable[object]) -> bytes:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
