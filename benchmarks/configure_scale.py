"""How long a round's configuration takes as the fleet grows.

    python benchmarks/configure_scale.py [--quick] [--json FILE] [--strategy NAME]

Configures synthetic fleets of 10^2 to 10^6 devices and fits seconds = c n^e.
Needs the server's dependencies and 4 GB of memory; takes a few minutes. --quick does
two variants once each, in half a minute.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from broker_server.strategies import DeviceCapacity, RunShape, Strategy, strategy_named

SHAPE = RunShape(
    layer_count=12,
    values_per_rank=(3072,) * 12,
    head_values=1538,
    tokens_per_step=512.0,
    peak_tokens_per_step=1024,
    steps=10,
    bytes_per_value_up=4.0,
    bytes_per_value_down=4.0,
)
"""BERT-base, LoRA on query and value."""

VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "legend": ("legend", {}),
    "legend-paper": ("legend-paper", {}),
    "legend-waiting": ("legend", {"waiting_max_share": 0.05}),
    "fedlora": ("fedlora", {}),
    "hetlora": ("hetlora", {}),
}
"""Name in the table -> strategy and options."""


def fleet(count: int, seed: int) -> list[DeviceCapacity]:
    """Devices whose speed spans 1 to 20 and whose links span 1 to 30 Mb/s."""
    generator = np.random.default_rng(seed)
    forward_s = 4e-5 / np.exp(generator.uniform(0, np.log(20), count))
    link = 125e3 * np.exp(generator.uniform(0, np.log(30), count))
    memory = generator.uniform(1e9, 8e9, count)
    examples = generator.integers(50, 2000, count)
    return [
        DeviceCapacity(
            device_id=f"d{number:07}",
            forward_s_per_token_layer=seconds,
            backward_s_per_token_layer=seconds,
            up_bytes_per_s=rate,
            down_bytes_per_s=rate,
            round_trip_s=0.05,
            memory_base_bytes=5e8,
            memory_bytes_per_token=5e4,
            memory_bytes_per_token_layer=2e5,
            memory_budget_bytes=budget,
            examples=size,
        )
        for number, (seconds, rate, budget, size) in enumerate(
            zip(forward_s.tolist(), link.tolist(), memory.tolist(), examples.tolist(), strict=True)
        )
    ]


def seconds_to_configure(strategy: Strategy, devices: list[DeviceCapacity], repeats: int) -> float:
    """Median wall time of rounds that are not the first."""
    taken = []
    for round_number in range(1, repeats + 1):
        gc.collect()
        began = time.perf_counter()
        configuration = strategy.configure(SHAPE, devices, round_number)
        taken.append(time.perf_counter() - began)
        if not configuration.plans:
            raise SystemExit("no device of the synthetic fleet could take part")
    return statistics.median(taken)


def growth_exponent(seconds_by_count: dict[int, float]) -> float:
    """Slope of log seconds over log devices, from 10^4 on: below that, constants rule."""
    points = [(n, s) for n, s in seconds_by_count.items() if n >= 10_000]
    counts, seconds = np.log(np.array(points)).T
    return float(np.polyfit(counts, seconds, 1)[0])


def measure(names: list[str], repeats: int) -> dict[str, Any]:
    """A row of seconds for every variant, and a summary over the slowest of them."""
    counts = [10**exponent for exponent in range(2, 7)]
    table: dict[str, dict[int, float]] = {name: {} for name in names}
    for count in counts:
        devices = fleet(count, seed=count)
        for name in names:
            strategy = strategy_named(*VARIANTS[name])
            taken = seconds_to_configure(strategy, devices, repeats)
            table[name][count] = taken
            print(f"{name:16} {count:>9,} devices  {taken:9.4f} s", flush=True)
    rows = [
        {
            "variant": name,
            "seconds": {str(count): taken for count, taken in by_count.items()},
            "growth_exponent": growth_exponent(by_count),
        }
        for name, by_count in table.items()
    ]
    worst = {count: max(by_count[count] for by_count in table.values()) for count in counts}
    return {
        "benchmark": "configure_scale",
        "layers": SHAPE.layer_count,
        "rows": rows,
        "summary": {
            "seconds_at_1e6": worst[10**6],
            "growth_exponent": growth_exponent(worst),
            "slowest_of": names,
            "repeats": repeats,
        },
    }


def main() -> None:
    """Measure, print and, if asked, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two variants, once each")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--strategy", choices=list(VARIANTS), action="append")
    arguments = parser.parse_args()
    default = ["legend", "legend-paper"] if arguments.quick else list(VARIANTS)
    results = measure(arguments.strategy or default, repeats=1 if arguments.quick else 3)
    summary = results["summary"]
    print(
        f"slowest at 10^6 devices: {summary['seconds_at_1e6']:.2f} s;"
        f" time grows with n^{summary['growth_exponent']:.2f}"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
