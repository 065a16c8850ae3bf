"""What every part of ``legend`` brings: all of it against all of it but one.

    python benchmarks/ablation.py [--quick] [--json FILE] [--out DIR]
        [--data DIR] [--seeds N] [--rounds N] [--workers N] [--methods A,B]
        [--work-scale F]

Simulates the variants of _methods.py like time_to_accuracy.py does; the folder
of its runs can be the same. The target comes from ``legend`` itself. A factor
above 1 means that the variant needs that many times as much as ``legend``.
--quick takes parts away only, and adds none.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks._machine import machine
from benchmarks._methods import ABLATIONS
from benchmarks._simulations import arguments, has_learned, simulate_all
from broker_server.compare import Amount, Comparison, compare_runs, read_run
from broker_server.dataset_split import write_text

SHARE = 0.99


def main() -> int:
    """Simulate, compare, print; 1 when a variant could not be simulated."""
    options = arguments(__doc__ or "", tuple(ABLATIONS))
    if options.quick and options.methods == tuple(ABLATIONS):
        options.methods = tuple(name for name in ABLATIONS if name == "legend" or name[:3] == "no-")
    finished, failed = simulate_all(options)
    runs = [read_run(out) for out in finished]
    comparison = compare_runs(runs, share=SHARE, baselines=["legend"])
    found = rows(comparison)
    learned = has_learned(runs, comparison.target)
    Console(width=120).print(table(found, comparison), highlight=False)
    if not learned:
        print("The target is no better than no training: these factors are noise, not results.")
    for name, reason in failed.items():
        print(f"{name} could not be simulated: {reason}")
    result = {
        "benchmark": "ablation",
        "machine": machine(),
        "quick": options.quick,
        "failed": failed,
        "learned": learned,
        "rows": found,
        "summary": {
            row["variant"]: {key: row[key] for key in ("time_factor", "traffic_factor", "final")}
            for row in found
        },
    }
    if options.json:
        write_text(options.json, json.dumps(result, indent=2) + "\n")
    return 1 if failed else 0


def rows(comparison: Comparison) -> list[dict[str, Any]]:
    """One a variant: what it needed, and how many times what ``legend`` needed."""
    gains, savings = comparison.speedups["legend"], comparison.savings["legend"]
    found = []
    for row in comparison.rows:
        time, traffic = gains.get(row.method), savings.get(row.method)
        found.append(
            {
                "variant": row.method,
                "seeds": len(row.seeds),
                "time_s": row.time_s.value,
                "bytes": row.bytes_total.value,
                "reached": row.reached,
                "final": row.final,
                "time_factor": 1 / time.value if time and time.value else None,
                "traffic_factor": 1 / traffic.value if traffic and traffic.value else None,
            }
        )
    return found


def table(found: list[dict[str, Any]], comparison: Comparison) -> Table:
    """The rows for people."""
    drawn = Table(title=f"to {comparison.target:.3f}, {SHARE:.0%} of what legend converged to")
    for name in ("variant", "seeds", "reached", "time s", "MB", "time x", "traffic x", "final"):
        drawn.add_column(name, justify="left" if name == "variant" else "right")
    for row in found:
        censored = row["reached"] < row["seeds"]
        drawn.add_row(
            row["variant"],
            str(row["seeds"]),
            str(row["reached"]),
            _amount(Amount(row["time_s"], censored)),
            _amount(Amount(row["bytes"] / 1e6, censored)),
            *(
                "-" if row[key] is None else f"{row[key]:.2f}"
                for key in ("time_factor", "traffic_factor")
            ),
            f"{row['final']:.3f}",
        )
    return drawn


def _amount(amount: Amount) -> str:
    return f"{'> ' if amount.censored else ''}{amount.value:.1f}"


if __name__ == "__main__":
    sys.exit(main())
