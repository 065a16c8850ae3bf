"""Pictures of a run: how accuracy grew, and what each device was given and took.

Imports matplotlib inside the functions: it is slow and the server draws rarely.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker_server.run_folder import RunReport, metrics_lines, write_file
from broker_server.run_state import RoundResult

ACCURACY_FILE = "accuracy.png"
DEVICES_FILE = "devices.png"

_BLUE, _ORANGE, _GREY = "#1f5fa8", "#e08a1e", "#8a8f98"
_DPI = 120
_MOST_NUMBERED_CELLS = 400
_MOST_ROWS = 80


def write_plots(folder: Path, report: RunReport) -> None:
    """Draw ``accuracy.png`` and ``devices.png`` into a run's folder.

    Draws what there is: without an evaluation no accuracy, without a committed
    round no devices.
    """
    if metrics_lines(report):
        write_file(folder / ACCURACY_FILE, accuracy_png(report))
    if report.rounds:
        write_file(folder / DEVICES_FILE, devices_png(report))


def accuracy_png(report: RunReport) -> bytes:
    """Held-out accuracy over time and over rounds, as PNG bytes.

    Args:
        report: with at least one evaluation.
    """
    lines = metrics_lines(report)
    accuracy = _column(lines, "accuracy")
    elapsed, unit = _in_unit(_column(lines, "elapsed_s"))
    figure = _figure(10.0, 4.2)
    left, right = figure.subplots(1, 2, sharey=True)
    _accuracy_panel(left, elapsed, accuracy)
    left.set(
        title="Over time in rounds", xlabel=f"time ({unit})", ylabel=_accuracy_name(report.task)
    )
    _accuracy_panel(right, _column(lines, "round"), accuracy)
    right.set(title="Over rounds", xlabel="round (0 = before training)")
    right.xaxis.get_major_locator().set_params(integer=True)
    right.legend(loc="lower right")
    figure.suptitle(f"{report.name} ({report.strategy}, {report.base_model})", parse_math=False)
    return _png(figure)


def devices_png(report: RunReport) -> bytes:
    """LoRA depth per device and round, and mean times per device, as PNG bytes.

    Args:
        report: with at least one committed round.
    """
    everyone = _device_names(report.rounds)
    names = everyone[:_MOST_ROWS]
    figure = _figure(12.0, max(3.6, 1.8 + 0.32 * len(names)))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    depths = depth_table(report.rounds, names)
    image = _depth_panel(left, depths, report.rounds)
    # The bar's width is its height over ``aspect``: kept narrow in tall figures.
    figure.colorbar(image, ax=left, label="layers", pad=0.02, aspect=18 + 2.2 * len(names))
    _time_panel(right, report.rounds, names)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower right", ncols=2)
    left.set_yticks(range(len(names)), names)
    shown = "slowest first" if names == everyone else f"the {_MOST_ROWS} slowest of {len(everyone)}"
    left.set_ylabel(f"device, {shown}")
    title = f"{report.name} ({report.strategy}): what each device was given and took"
    figure.suptitle(title, parse_math=False)
    return _png(figure)


def depth_table(rounds: Sequence[RoundResult], names: Sequence[str]) -> NDArray[np.float64]:
    """LoRA depth, (devices, rounds); NaN where a device sent no update."""
    table = np.full((len(names), len(rounds)), np.nan)
    row_of = {name: row for row, name in enumerate(names)}
    for column, result in enumerate(rounds):
        for device in result.devices:
            if device.status == "updated" and device.device_id in row_of:
                table[row_of[device.device_id], column] = device.depth
    return table


def mean_times(rounds: Sequence[RoundResult]) -> Mapping[str, tuple[float, float]]:
    """Mean completion and waiting time of each device in seconds, over its updates."""
    times: dict[str, list[tuple[float, float]]] = {}
    for result in rounds:
        for device in result.devices:
            if device.completion_s is not None:
                pair = (device.completion_s, device.waiting_s or 0.0)
                times.setdefault(device.device_id, []).append(pair)
    return {
        name: (sum(pair[0] for pair in pairs) / len(pairs), sum(p[1] for p in pairs) / len(pairs))
        for name, pairs in times.items()
    }


def _device_names(rounds: Sequence[RoundResult]) -> list[str]:
    """Every device, the slowest first: it is the one that the others wait for."""
    times = mean_times(rounds)
    names = {device.device_id for result in rounds for device in result.devices}
    return sorted(names, key=lambda name: (-times.get(name, (0.0, 0.0))[0], name))


def _accuracy_panel(axes: Any, x: NDArray[np.float64], accuracy: NDArray[np.float64]) -> None:
    best = int(np.argmax(accuracy))
    axes.plot(x, accuracy, marker="o", markersize=4, color=_BLUE, label="global adapter")
    if x[0] == 0:  # begins with round 0
        axes.axhline(accuracy[0], color=_GREY, linestyle="--", label="before training")
    axes.plot(x[best], accuracy[best], "o", markersize=9, mfc="none", color=_ORANGE, label="best")
    axes.annotate(
        f"{accuracy[best]:.3f}",
        (x[best], accuracy[best]),
        textcoords="offset points",
        xytext=(0, 9),
        ha="center",
        color=_ORANGE,
    )
    axes.margins(y=0.18)
    axes.grid(alpha=0.3)


def _depth_panel(axes: Any, depths: NDArray[np.float64], rounds: Sequence[RoundResult]) -> Any:
    from matplotlib import colormaps  # noqa: PLC0415 - slow to import

    deepest = max(len(device.ranks) for result in rounds for device in result.devices)
    image = axes.imshow(
        depths,
        aspect="auto",
        cmap=colormaps["viridis"].resampled(deepest),
        vmin=0.5,
        vmax=deepest + 0.5,
        interpolation="nearest",
    )
    axes.set_facecolor("#eceef1")
    ticks = range(0, len(rounds), -(-len(rounds) // 20))
    axes.set_xticks(ticks, [rounds[tick].round for tick in ticks])
    axes.set(title="LoRA depth (grey: no update)", xlabel="round")
    if depths.size <= _MOST_NUMBERED_CELLS:
        for row, column in np.argwhere(~np.isnan(depths)):
            depth = depths[row, column]
            color = "white" if depth <= 0.6 * deepest else "black"
            style = {"ha": "center", "va": "center", "fontsize": 8, "color": color}
            axes.text(column, row, f"{depth:.0f}", **style)
    return image


def _time_panel(axes: Any, rounds: Sequence[RoundResult], names: Sequence[str]) -> None:
    times = mean_times(rounds)
    pairs = np.array([times.get(name, (0.0, 0.0)) for name in names])
    rows = np.arange(len(names))
    waits = float(np.mean([result.waiting_s for result in rounds]))
    axes.barh(rows, pairs[:, 0], color=_BLUE, label="completion time")
    axes.barh(rows, pairs[:, 1], left=pairs[:, 0], color=_ORANGE, label="waiting time")
    axes.set(title=f"Mean times (mean wait {waits:.1f} s)", xlabel="seconds per round")
    axes.tick_params(left=False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_xlim(0, max(1.05 * float(pairs.sum(axis=1).max()), 1e-3))


def _figure(width_in: float, height_in: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - slow to import
    from matplotlib.figure import Figure  # noqa: PLC0415 - as above

    # A Figure of its own: pyplot keeps every figure of a process alive.
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=_DPI)
    return stream.getvalue()


def _column(lines: Sequence[Mapping[str, object]], key: str) -> NDArray[np.float64]:
    return np.array([float(str(line[key])) for line in lines])


def _in_unit(seconds: NDArray[np.float64]) -> tuple[NDArray[np.float64], str]:
    longest = float(seconds.max())
    for unit, length_s in (("h", 3600.0), ("min", 60.0)):
        if longest >= 3 * length_s:
            return seconds / length_s, unit
    return seconds, "s"


def _accuracy_name(task: str) -> str:
    if task == "classification":
        return "held-out accuracy"
    return "held-out accuracy of response tokens"
