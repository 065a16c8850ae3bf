"""What a round costs that trains nothing: our server and agents beside flwr's.

    python benchmarks/round_overhead.py [--quick] [--json FILE] [--clients 4,16]
        [--tensors 1,32,192] [--rounds N] [--peer-rounds N] [--pairs N]
        [--skip-peer] [--skip-simulation] [--environment DIR]

Deployed: one process a client and a server with its state on disk, on loopback, without TLS on both
sides; about 2 MB of float32 each way, FedAvg over all clients. Ours signs every command and scores
every global adapter on a few sentences; the peer does neither. Simulated: everything in one engine,
again without training. A round is counted from the end of the one before; the first is left out.
The peer is flwr from PyPI, with its defaults, in an environment of its own that is made once.

--quick does 4 clients and 1 tensor in under a minute on a quiet machine.
Ratios below one are in our favour. Every row says how busy the machine was.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import _flwr, _our_simulation
from benchmarks._machine import load, machine
from benchmarks._measured import Measured
from benchmarks._our_fleet import PAYLOADS, idle_agent_rss_bytes, launch_and_measure, our_fleet

PAYLOAD_BYTES = 2 * 2**20
ENVIRONMENT = Path.home() / ".cache" / "legend-edge-benchmarks" / "flwr"

Row = dict[str, Any]


def main() -> int:
    """Measure, print and, if asked, write JSON."""
    options = arguments()
    flwr = None if options.skip_peer else _flwr.installed(options.environment)
    rows: list[Row] = []
    for clients in options.clients:
        for tensors in options.tensors:
            for pair in range(options.pairs):
                rows += pair_of_rows(options, flwr, clients, tensors)
                print(f"{clients} clients, {tensors} tensors, pair {pair + 1}", file=sys.stderr)
    result = {
        "benchmark": "round_overhead",
        "machine": machine(),
        "broker": options.broker,
        "peer": flwr.version if flwr else None,
        "rows": rows,
        "summary": summary(rows),
    }
    Console(width=120).print(table(rows, caption=f"{result['machine']}; {result['peer']}"))
    Console(width=120).print_json(data=result["summary"])
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def pair_of_rows(
    options: argparse.Namespace, flwr: _flwr.FlwrEnvironment | None, clients: int, tensors: int
) -> list[Row]:
    """Ours and the peer's, one after the other."""
    payload = PAYLOADS[tensors]
    case: Row = {"clients": clients, "tensors": tensors}
    work = _flwr.Work(clients, tensors, PAYLOAD_BYTES, options.peer_rounds + 1)
    rows = []
    with tempfile.TemporaryDirectory(prefix="round-overhead-") as text:
        folder = Path(text)
        with our_fleet(folder / "ours", broker=options.broker, agents=clients,
                       payload=payload) as site:  # fmt: skip
            idle = idle_agent_rss_bytes(site)
            count, size = payload.sizes(folder / "ours" / "tiny")
            ours = launch_and_measure(site, payload, rounds=options.rounds)
        told = {
            "sent_tensors": count,
            "sent_megabytes": size / 1e6,
            "agent_idle_rss_mb": idle / 1e6,
        }
        rows.append({**case, "system": "ours", **figures(ours), **told})
        if flwr:
            rows.append(
                {**case, "system": "flwr", **figures(_flwr.deployed(flwr, work, folder / "f"))}
            )
        if not options.skip_simulation:
            one = _our_simulation.simulated(
                payload, folder / "s", devices=clients, rounds=options.rounds + 1
            )
            rows.append({**case, "system": "ours, simulated", **figures(one)})
            if flwr:
                one = _flwr.simulated(flwr, work, folder / "fs")
                rows.append({**case, "system": "flwr, simulated", **figures(one)})
    return rows


def figures(measured: Measured) -> Row:
    """Of one system's rounds."""
    return {
        "round_s": measured.median_s,
        "rounds": len(measured.round_s),
        "cpu_s": measured.cpu_s,
        "rss_megabytes": measured.rss_bytes / 1e6,
        "total_s": measured.total_s,
        "load": load(),
    }


def summary(rows: Sequence[Row]) -> Row:
    """The figures that a claim would quote; ratios are medians over pairs, then over cases."""
    per_round = {
        f"{clients} clients, {tensors} tensors": {
            system: median_of(rows, "round_s", system=system, clients=clients, tensors=tensors)
            for system in dict.fromkeys(row["system"] for row in rows)
        }
        for clients, tensors in dict.fromkeys((row["clients"], row["tensors"]) for row in rows)
    }
    return {
        "ours_over_flwr_wall": ratio(rows, "round_s", "ours", "flwr"),
        "ours_over_flwr_cpu": ratio(rows, "cpu_s", "ours", "flwr"),
        "ours_over_flwr_rss": ratio(rows, "rss_megabytes", "ours", "flwr"),
        "simulation_over_flwr_simulation_wall": ratio(
            rows, "round_s", "ours, simulated", "flwr, simulated"
        ),
        "simulation_over_flwr_simulation_total": ratio(
            rows, "total_s", "ours, simulated", "flwr, simulated"
        ),
        "seconds_per_round": per_round,
        "agent_idle_rss_mb": median_of(rows, "agent_idle_rss_mb", system="ours"),
        "highest_load": max(row["load"] for row in rows),
    }


def median_of(rows: Sequence[Row], key: str, **case: object) -> float | None:
    """Over the rows of a case; None where there is none."""
    values = [row[key] for row in rows if all(row[name] == case[name] for name in case)]
    return statistics.median(values) if values else None


def ratio(rows: Sequence[Row], key: str, ours: str, theirs: str) -> float | None:
    """Median of the paired ratios; None without a peer."""
    mine = [row for row in rows if row["system"] == ours]
    others = [row for row in rows if row["system"] == theirs]
    if not others:
        return None
    ratios = [float(a[key] / b[key]) for a, b in zip(mine, others, strict=True)]
    return statistics.median(ratios)


def table(rows: Sequence[Row], *, caption: str) -> Table:
    """For people."""
    made = Table(title="A round that trains nothing", caption=caption)
    for name in ("clients", "tensors", "system", "s/round", "CPU s/round", "MB of all", "total s",
                 "load"):  # fmt: skip
        made.add_column(name, justify="left" if name == "system" else "right")
    for row in rows:
        made.add_row(
            str(row["clients"]),
            str(row["tensors"]),
            row["system"],
            f"{row['round_s']:.3f}",
            f"{row['cpu_s']:.3f}",
            f"{row['rss_megabytes']:.0f}" if row["rss_megabytes"] else "",
            f"{row['total_s']:.1f}",
            f"{row['load']:.1f}",
        )
    return made


def numbers(text: str) -> list[int]:
    """A list on the command line."""
    return [int(one) for one in text.split(",")]


def arguments() -> argparse.Namespace:
    """The command line, with what --quick means."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="4 clients, 1 tensor, few rounds")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--clients", type=numbers, help="default: 4,16; quick: 4")
    parser.add_argument("--tensors", type=numbers, help="of 1,32,192; default: all; quick: 1")
    parser.add_argument("--rounds", type=int, help="of ours that count; default: 20; quick: 8")
    parser.add_argument("--peer-rounds", type=int, help="of flwr's; default: 4; quick: 1")
    parser.add_argument("--pairs", type=int, help="repetitions; default: 2; quick: 1")
    parser.add_argument("--broker", choices=["mosquitto", "embedded"], default="mosquitto")
    parser.add_argument("--skip-peer", action="store_true", help="measure ours alone")
    parser.add_argument("--skip-simulation", action="store_true", help="processes only")
    parser.add_argument("--environment", type=Path, default=ENVIRONMENT, help="where flwr lives")
    options = parser.parse_args()
    quick = options.quick
    options.clients = options.clients or ([4] if quick else [4, 16])
    options.tensors = options.tensors or ([1] if quick else list(PAYLOADS))
    if unknown := sorted(set(options.tensors) - set(PAYLOADS)):
        parser.error(f"--tensors {unknown[0]}: known are {', '.join(map(str, PAYLOADS))}")
    options.rounds = options.rounds or (8 if quick else 20)
    options.peer_rounds = options.peer_rounds or (1 if quick else 4)
    options.pairs = options.pairs or (1 if quick else 2)
    return options


if __name__ == "__main__":
    sys.exit(main())
