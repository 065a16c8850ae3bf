"""One picture of a simulated run: what quality cost, who waited, who got which depth.

Imports matplotlib inside the functions: it is slow to import.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker_server.run_folder import RunReport, metrics_lines, write_file

SIMULATION_FILE = "simulation.png"
_MEGABYTE = 1e6


def write_simulation_plot(folder: Path, report: RunReport, boards: Mapping[str, str]) -> None:
    """Draw ``simulation.png``, if there is a committed round.

    Args:
        folder: the run's.
        report: the run.
        boards: by device, its kind of board.
    """
    if report.rounds and report.baseline is not None:
        write_file(folder / SIMULATION_FILE, simulation_png(report, boards))


def simulation_png(report: RunReport, boards: Mapping[str, str]) -> bytes:
    """Accuracy over virtual time and traffic, waiting, and depth per board, as PNG bytes.

    Args:
        report: with a baseline and at least one committed round.
        boards: by device, its kind of board.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - slow to import
    from matplotlib.figure import Figure  # noqa: PLC0415 - as above

    figure = Figure(figsize=(11.0, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    (over_time, over_traffic), (waiting, depth) = figure.subplots(2, 2)
    lines = metrics_lines(report)
    accuracy = [float(str(line["accuracy"])) for line in lines]
    elapsed_s = [float(str(line["elapsed_s"])) for line in lines]
    rounds = [result.round for result in report.rounds]
    _curve(over_time, elapsed_s, accuracy, "virtual time (s)")
    _curve(over_traffic, traffic_megabytes(report), accuracy, "traffic up and down (MB)")
    waiting.plot(rounds, [result.duration_s for result in report.rounds], label="round")
    waiting.plot(rounds, [result.waiting_s for result in report.rounds], label="mean waiting")
    waiting.set(title="Time per round", xlabel="round", ylabel="seconds")
    for board, means in mean_depths(report, boards).items():
        depth.plot(rounds, means, marker=".", label=board)
    depth.set(title="Mean LoRA depth of the updates", xlabel="round", ylabel="layers")
    for axes in (waiting, depth):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.suptitle(f"{report.name} ({report.strategy}, simulated)", parse_math=False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120)
    return stream.getvalue()


def traffic_megabytes(report: RunReport) -> NDArray[np.float64]:
    """Bytes up and down until each evaluation, round 0 first, in MB."""
    spent = [0.0, *(float(result.bytes_up + result.bytes_down) for result in report.rounds)]
    return np.cumsum(spent) / _MEGABYTE


def mean_depths(report: RunReport, boards: Mapping[str, str]) -> dict[str, list[float]]:
    """Mean depth of each kind of board in every round; NaN where it sent no update."""
    table: dict[str, list[float]] = {}
    for board in sorted({boards[one.device_id] for r in report.rounds for one in r.devices}):
        table[board] = []
        for result in report.rounds:
            depths = [
                one.depth
                for one in result.devices
                if one.status == "updated" and boards[one.device_id] == board
            ]
            table[board].append(sum(depths) / len(depths) if depths else float("nan"))
    return table


def _curve(axes: Any, x: Any, accuracy: list[float], label: str) -> None:
    axes.plot(x, accuracy, marker=".")
    axes.set(title="Accuracy", xlabel=label, ylabel="held-out accuracy")
    axes.grid(alpha=0.3)
