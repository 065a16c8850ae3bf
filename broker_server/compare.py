"""Which method reaches the same accuracy with less time and traffic.

Pure reckoning on the metrics of simulated runs, after the rules of this
project's comparisons: the target comes from the baselines alone, on the figures
that decisions were made on; it must hold for two evaluations in a row; a method
that never gets there keeps its row, as more than what it had. Draws nothing.

Source: bootstrap percentile interval, Efron and Tibshirani (1993), chapter 13.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from broker_server.run_folder import METRICS_FILE
from broker_server.simulation_folder import read_config
from wire_protocol.errors import ConfigError

CONVERGED = 5
"""Evaluations whose mean counts as the converged value; never the best of a run."""

HELD = 2
"""Evaluations in a row that must reach the target."""

LEAST_SEEDS = 3
"""Fewer give no interval."""

RESAMPLES = 10_000

OWN_METHOD = "legend"

_MAY_DIFFER = frozenset(
    {"name", "method", "strategy", "strategy_options", "seed", "rounds", "target_accuracy", "codec",
     "adapter_codec", "loss", "privacy", "threads"}
)  # fmt: skip
"""Settings in which compared runs may differ; the rest is the experiment."""


@dataclass(frozen=True)
class SimulatedRun:
    """One run as its folder tells it.

    Attributes:
        lines: of ``metrics.jsonl``, round 0 first.
    """

    folder: Path
    method: str
    seed: int
    settings: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]

    def converged(self, key: str) -> float:
        """Mean of the last evaluations of one figure."""
        values = [float(line[key]) for line in self.lines if key in line][-CONVERGED:]
        return sum(values) / len(values)

    @property
    def quality(self) -> float:
        """Converged accuracy on the test file, or on the only file there is."""
        tested = any("test_accuracy" in line for line in self.lines)
        return self.converged("test_accuracy" if tested else "accuracy")


@dataclass(frozen=True)
class Amount:
    """How much something took; ``censored`` means more than this."""

    value: float
    censored: bool


@dataclass(frozen=True)
class Cost:
    """What one run spent until it held the target, or in all if it never did."""

    rounds: int
    time_s: float
    bytes_up: int
    bytes_down: int
    reached: bool
    energy_j: float | None = None

    @property
    def bytes_total(self) -> int:
        """Both ways."""
        return self.bytes_up + self.bytes_down


@dataclass(frozen=True)
class MethodRow:
    """One method over its seeds; costs are means, censored if one run's is."""

    method: str
    seeds: tuple[int, ...]
    reached: int
    time_s: Amount
    rounds: Amount
    bytes_up: Amount
    bytes_down: Amount
    bytes_total: Amount
    energy_j: Amount | None
    waiting_s: float
    final: float


@dataclass(frozen=True)
class Ratio:
    """How many times less than a baseline a method took, paired by seed.

    Attributes:
        value: geometric mean over seeds; None when nothing can be said.
        bound: ``at least`` or ``at most`` when runs were censored.
        interval: 95 % bootstrap interval over seeds; None with fewer than three.
        seeds: pairs behind the value.
    """

    value: float | None
    bound: str | None
    interval: tuple[float, float] | None
    seeds: int


@dataclass(frozen=True)
class Comparison:
    """Every method's costs to one target.

    Attributes:
        target: accuracy to reach.
        target_from: the best baseline.
        speedups, savings: by baseline and method: time, and traffic up and down.
    """

    target: float
    target_from: str
    share: float
    rows: tuple[MethodRow, ...]
    speedups: Mapping[str, Mapping[str, Ratio]] = field(default_factory=dict)
    savings: Mapping[str, Mapping[str, Ratio]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain values for programs."""
        return asdict(self)


def read_run(folder: Path) -> SimulatedRun:
    """Read the folder of a simulated run.

    Raises:
        ConfigError: it is none, or has no committed round.
    """
    settings = read_config(folder)
    try:
        text = (folder / METRICS_FILE).read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
        method = str(settings.get("method") or settings["strategy"])
        seed = int(settings["seed"])
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{folder} is not the folder of a simulation") from error
    if len(lines) < 2:
        raise ConfigError(f"{folder} has no committed round yet; let the simulation run")
    return SimulatedRun(folder, method, seed, settings, lines)


def compare_runs(
    runs: Sequence[SimulatedRun], *, share: float, baselines: Sequence[str] = ()
) -> Comparison:
    """Reckon every method's cost to the target and its gain over each baseline.

    Args:
        runs: of the same experiment, each method and seed once.
        share: of the best baseline's converged accuracy.
        baselines: methods; empty means all but our own, or all if alone.

    Raises:
        ConfigError: the runs are of different experiments, a run is there
            twice, or a baseline is not among them.
    """
    _require_comparable(runs)
    methods = sorted({run.method for run in runs})
    chosen = list(baselines) or [name for name in methods if name != OWN_METHOD] or methods
    if missing := sorted(set(chosen) - set(methods)):
        raise ConfigError(f"no run of baseline {missing[0]!r}; there are {', '.join(methods)}")
    by_method = {name: [run for run in runs if run.method == name] for name in methods}
    level = {name: _mean([run.converged("accuracy") for run in by_method[name]]) for name in chosen}
    best = max(chosen, key=lambda name: level[name])
    target = share * level[best]
    costs = {(run.method, run.seed): cost_to(run, target) for run in runs}

    def gains(amount: Callable[[Cost], float]) -> dict[str, dict[str, Ratio]]:
        return {
            name: {
                other: paired_ratio(_pairs(costs, name, other), amount)
                for other in methods
                if other != name
            }
            for name in chosen
        }

    return Comparison(
        target=target,
        target_from=best,
        share=share,
        rows=tuple(_row(name, by_method[name], costs) for name in methods),
        speedups=gains(lambda cost: cost.time_s),
        savings=gains(lambda cost: float(cost.bytes_total)),
    )


def cost_to(run: SimulatedRun, target: float) -> Cost:
    """What a run spent until it reached an accuracy that held.

    The cost is that of the first of ``HELD`` evaluations in a row. An
    accuracy that round 0 has already costs nothing.
    """
    there = [float(line["accuracy"]) >= target for line in run.lines]
    first = next(
        (number for number in range(len(there) - HELD + 1) if all(there[number : number + HELD])),
        None,
    )
    end = len(run.lines) - 1 if first is None else first
    spent = run.lines[1 : end + 1]
    return Cost(
        rounds=end,
        time_s=float(run.lines[end]["elapsed_s"]),
        bytes_up=sum(int(line["bytes_up"]) for line in spent),
        bytes_down=sum(int(line["bytes_down"]) for line in spent),
        reached=first is not None,
        energy_j=_sum_known([line.get("energy_j") for line in spent]),
    )


def _sum_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def paired_ratio(pairs: Sequence[tuple[Cost, Cost]], amount: Callable[[Cost], float]) -> Ratio:
    """Baseline's amount over the method's, as a geometric mean over seeds.

    Args:
        pairs: (baseline, method) of the same seed.
        amount: what to compare, e.g. the time.
    """
    known = [
        (base, ours)
        for base, ours in pairs
        if (base.reached or ours.reached) and amount(base) > 0 and amount(ours) > 0
    ]
    if not known or len(known) < len(pairs):
        return Ratio(None, None, None, len(known))
    bounds = {
        "at least" if not base.reached else "at most"
        for base, ours in known
        if not (base.reached and ours.reached)
    }
    if len(bounds) > 1:
        return Ratio(None, None, None, len(known))
    logs = np.log([amount(base) / amount(ours) for base, ours in known])
    return Ratio(
        value=math.exp(float(logs.mean())),
        bound=bounds.pop() if bounds else None,
        interval=_interval(logs),
        seeds=len(known),
    )


def _interval(logs: Any) -> tuple[float, float] | None:
    if len(logs) < LEAST_SEEDS:
        return None
    generator = np.random.default_rng(0)
    drawn = generator.choice(logs, size=(RESAMPLES, len(logs))).mean(axis=1)
    low, high = np.exp(np.percentile(drawn, [2.5, 97.5]))
    return float(low), float(high)


def _pairs(
    costs: Mapping[tuple[str, int], Cost], baseline: str, method: str
) -> list[tuple[Cost, Cost]]:
    seeds = sorted(seed for name, seed in costs if name == method and (baseline, seed) in costs)
    return [(costs[baseline, seed], costs[method, seed]) for seed in seeds]


def _row(
    method: str, runs: Sequence[SimulatedRun], costs: Mapping[tuple[str, int], Cost]
) -> MethodRow:
    spent = [costs[method, run.seed] for run in runs]
    censored = not all(cost.reached for cost in spent)

    def mean(amount: Callable[[Cost], float]) -> Amount:
        return Amount(_mean([amount(cost) for cost in spent]), censored)

    return MethodRow(
        method=method,
        seeds=tuple(sorted(run.seed for run in runs)),
        reached=sum(cost.reached for cost in spent),
        time_s=mean(lambda cost: cost.time_s),
        rounds=mean(lambda cost: cost.rounds),
        bytes_up=mean(lambda cost: cost.bytes_up),
        bytes_down=mean(lambda cost: cost.bytes_down),
        bytes_total=mean(lambda cost: cost.bytes_total),
        energy_j=None
        if any(cost.energy_j is None for cost in spent)
        else mean(lambda cost: cost.energy_j or 0.0),
        waiting_s=_mean([_mean([float(x["waiting_s"]) for x in run.lines[1:]]) for run in runs]),
        final=_mean([run.quality for run in runs]),
    )


def _require_comparable(runs: Sequence[SimulatedRun]) -> None:
    first = runs[0]
    seen: dict[tuple[str, int], Path] = {}
    for run in runs:
        keys = (first.settings.keys() | run.settings.keys()) - _MAY_DIFFER
        different = sorted(k for k in keys if first.settings.get(k) != run.settings.get(k))
        if different:
            line = f"{first.folder} and {run.folder} are different experiments"
            raise ConfigError(f"{line}: they differ in {', '.join(different)}")
        other = seen.setdefault((run.method, run.seed), run.folder)
        if other != run.folder:
            line = f"{other} and {run.folder} are both {run.method} with seed {run.seed}"
            raise ConfigError(f"{line}; give one of them another 'method'")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
