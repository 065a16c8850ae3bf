"""The result folder of a run: what a person opens to see how it went.

Pure functions make the content; thin ones write it. The store is the truth:
``rewrite`` makes the folder say what the store says, so that no line can be
there twice or be missing. Knows no torch and no database.

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
    """One object a round; round 0 is the evaluation before any training.

    ``elapsed_s`` is the sum of the durations so far: time in rounds, without
    evaluation and without time that the server was down.
    """
    lines: list[dict[str, object]] = []
    if report.baseline is not None:
        lines.append({"round": 0, **asdict(report.baseline), "elapsed_s": 0.0})
    elapsed_s = 0.0
    for result in report.rounds:
        elapsed_s += result.duration_s
        figures = result.model_dump(mode="json", exclude={"devices"})
        updated = sum(device.status == "updated" for device in result.devices)
        counts = {"devices": len(result.devices), "updates": updated}
        lines.append({**figures, "elapsed_s": elapsed_s, **counts})
    return lines


def assignment_lines(result: RoundResult) -> list[dict[str, object]]:
    """One object a device of one round: what it was given and what came of it."""
    return [{"round": result.round, **device.model_dump(mode="json")} for device in result.devices]


def summary(report: RunReport) -> dict[str, object]:
    """How the run stands: its best and last accuracy and what it cost so far.

    Times in seconds; ``waiting_share`` is waiting time over completion plus
    waiting time, of all devices that sent updates.

    Source: arXiv:2412.20004, average waiting time.
    """
    rounds = report.rounds
    scores = [result.accuracy for result in rounds]
    if report.baseline is not None:
        scores.insert(0, report.baseline.accuracy)
    devices = [device for result in rounds for device in result.devices]
    waiting_s = sum(device.waiting_s or 0.0 for device in devices)
    busy_s = sum(device.completion_s or 0.0 for device in devices)
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
        "rounds_done": len(rounds),
        "accuracy_before": report.baseline.accuracy if report.baseline else None,
        "accuracy": scores[-1] if scores else None,
        "accuracy_best": max(scores, default=None),
        "loss": rounds[-1].loss if rounds else None,
        "duration_s": sum(result.duration_s for result in rounds),
        "waiting_s": sum(result.waiting_s for result in rounds) / len(rounds) if rounds else None,
        "waiting_share": waiting_s / (waiting_s + busy_s) if waiting_s + busy_s else None,
        "bytes_up": sum(result.bytes_up for result in rounds),
        "bytes_down": sum(result.bytes_down for result in rounds),
        "devices": len({device.device_id for device in devices}),
        "updates_clipped": sum(result.clipped for result in rounds),
        "updates_refused": sum(result.refused for result in rounds),
        "privacy": _privacy(report),
        "emulated_devices": len({one.device_id for one in devices if one.emulated}),
    }


def _privacy(report: RunReport) -> Mapping[str, object] | None:
    if report.privacy is None:
        return None
    # Reckoning needs NumPy and SciPy; runs without privacy must not wait for them.
    from broker_server.privacy import privacy_report  # noqa: PLC0415

    done, planned = len(report.rounds), report.rounds_planned
    return privacy_report(report.privacy, rounds_done=done, rounds_planned=planned)


def rewrite(folder: Path, report: RunReport) -> None:
    """Make the text files say exactly what the store says."""
    folder.mkdir(parents=True, exist_ok=True)
    assignments = [line for result in report.rounds for line in assignment_lines(result)]
    write_file(folder / METRICS_FILE, _json_lines(metrics_lines(report)))
    write_file(folder / ASSIGNMENTS_FILE, _json_lines(assignments))
    write_summary(folder, report)


def write_summary(folder: Path, report: RunReport) -> None:
    """Replace ``summary.json``."""
    text = json.dumps(summary(report), indent=2, ensure_ascii=False) + "\n"
    write_file(folder / SUMMARY_FILE, text.encode())


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


def write_file(path: Path, content: bytes) -> None:
    """Replace a file of results as a whole; anybody on this machine may read it."""
    durable.write_durably(path, content, site="server.results", mode=0o644)


def _json_lines(lines: Iterable[object]) -> bytes:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
