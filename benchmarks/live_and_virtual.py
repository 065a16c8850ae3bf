"""Does virtual time run like real time? One fleet, live and simulated, side by side.

    python benchmarks/live_and_virtual.py [--quick] [--json FILE] [--rounds N] [--out DIR]

Live: ``legend demo``, server and four agents as processes, each slowed down to the board it
imitates, its link shaped. Virtual: the same fleet profile, recipe, strategy and examples in
``legend simulate``. Live seconds are divided by the fleet's time dilation. Needs a calm machine:
one that cannot keep up with four boards shows in longer live rounds. --quick: two rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from broker_server.dataset_split import write_text
from broker_server.demo_fleet import RECIPE, base_model_dir, read_fleet
from broker_server.simulate import simulate
from broker_server.simulation_spec import parse_simulation_spec

FLEET = "demo4"
COLUMNS = {"text": "line", "label": "label"}


def main() -> int:
    """Run both, compare the rounds that both have; 0 when it worked."""
    options = arguments()
    root = options.out or Path(tempfile.mkdtemp(prefix="live-and-virtual-"))
    rounds = options.rounds or (2 if options.quick else 6)
    live = live_rounds(root, rounds)
    virtual = virtual_rounds(root, rounds)
    dilation = read_fleet(FLEET).time_dilation
    rows = [
        {
            "round": one["round"],
            "live_s": one["duration_s"] / dilation,
            "virtual_s": other["duration_s"],
            "live_waiting_s": one["waiting_s"] / dilation,
            "virtual_waiting_s": other["waiting_s"],
            "live_bytes_up": one["bytes_up"],
            "virtual_bytes_up": other["bytes_up"],
        }
        for one, other in zip(live, virtual, strict=True)
    ]
    live_s, virtual_s = (statistics.fmean(row[key] for row in rows) for key in KEYS)
    summary = {
        "mean_live_round_s": live_s,
        "mean_virtual_round_s": virtual_s,
        "virtual_over_live": virtual_s / live_s,
        "time_dilation": dilation,
        "rounds": rounds,
    }
    show(rows, summary)
    if options.json:
        write_text(options.json, json.dumps({"rows": rows, "summary": summary}, indent=2) + "\n")
    return 0


KEYS = ("live_s", "virtual_s")


def live_rounds(root: Path, rounds: int) -> list[dict[str, Any]]:
    """The rounds of a live fleet, in its slowed down seconds."""
    result = root / "live.json"
    command = ["-m", "broker_server.operator_cli", "demo", "--rounds", str(rounds)]
    places = ["--keep", str(root / "live"), "--json", str(result)]
    subprocess.run([sys.executable, *command, *places], check=True, stdout=sys.stderr)
    found: list[dict[str, Any]] = json.loads(result.read_text(encoding="utf-8"))["rounds"]
    return found


def virtual_rounds(root: Path, rounds: int) -> list[dict[str, Any]]:
    """The rounds of the same fleet on a virtual clock, trained on the live fleet's examples."""
    files = sorted((root / "live" / "data").glob("*.tsv"))
    texts = [path.read_text(encoding="utf-8").splitlines(keepends=True) for path in files]
    train = root / "train.tsv"
    write_text(train, "".join([texts[0][0], *(line for text in texts for line in text[1:])]))
    run = {
        **RECIPE,
        "name": "virtual",
        "strategy": "legend",
        "rounds": rounds,
        "model": str(base_model_dir()),
        "fleet": FLEET,
        "train": {"path": str(train), **COLUMNS},
        "evaluation": {"path": str(root / "live" / "held-out.tsv"), **COLUMNS},
        "partition": {"alpha": 100.0, "minimum": 8},
    }
    simulate(parse_simulation_spec(run, place="virtual"), root / "virtual", pictures=False)
    lines = (root / "virtual" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[1:]]


def show(rows: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    """The table for people."""
    table = Table(*rows[0], title="Seconds of the boards, and bytes")
    for row in rows:
        table.add_row(*(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()))
    console = Console(width=140)
    console.print(table)
    console.print(f"virtual over live: {summary['virtual_over_live']:.3f}", highlight=False)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two rounds instead of six")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--out", type=Path, help="a new folder to keep; default: a temporary one")
    parser.add_argument("--rounds", type=int)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
