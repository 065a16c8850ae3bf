"""Aggregation against one pass of NumPy over the same bytes.

    python benchmarks/aggregate.py [--quick] [--json FILE]

Both read every update once, as bytes in memory, and end with the new adapter as float32 bytes. The
pass knows where the values begin, multiplies all of an update at once with its weight, adds it to
one float64 array, divides at the end and adds the old adapter. The aggregation reads safetensors,
checks names, shapes and values, and keeps a weight per rank row. Neither reads a file nor hashes.
``defended`` looks at every update twice, as it must: once to know what is usual, once to add it.
Prediction: at most 1.5 times the pass, and the same memory for 10 updates and 1,000.
"""

from __future__ import annotations

import argparse
import json
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._machine import machine, peak_rss_bytes
from broker_server.strategies import strategy_named
from broker_server.strategies.protected import Received, aggregate_round, protected_strategy
from wire_protocol.lora import Codec
from wire_protocol.model_family import adapter_shapes, model_shape
from wire_protocol.tensors import decode, encode

RANKS = (8,) * 24
SHAPE = model_shape(
    {
        "model_type": "bert",
        "hidden_size": 1024,
        "num_hidden_layers": len(RANKS),
        "num_attention_heads": 16,
    }
)
"""BERT-large, LoRA on query and value: 3.1 MB in float32."""


def an_update(seed: int) -> bytes:
    """One device's update in float32."""
    generator = np.random.default_rng(seed)
    shapes = adapter_shapes(SHAPE, RANKS, 2)
    return encode(
        {
            name: generator.normal(size=shape).astype(np.float32) * np.float32(1e-3)
            for name, shape in shapes.items()
        },
        Codec.FP32,
    )


def repeated(updates: list[bytes], count: int) -> Iterator[bytes]:
    """``count`` updates that take the memory of a few."""
    for number in range(count):
        yield updates[number % len(updates)]


def one_pass(updates: Iterator[bytes], base: bytes) -> bytes:
    """The least that NumPy does for the weighted mean of these bytes, without a check."""
    begin = 8 + int.from_bytes(base[:8], "little")
    old = np.frombuffer(base, np.float32, offset=begin)
    total, weights = np.zeros(old.size), 0.0
    for number, data in enumerate(updates):
        values, weight = np.frombuffer(data, np.float32, offset=begin), 1.0 + number % 3
        total += np.multiply(values, weight, dtype=np.float64)
        weights += weight
    return base[:begin] + (old + total / weights).astype(np.float32).tobytes()


def aggregate(updates: Iterator[bytes], base: bytes) -> bytes:
    """What the server does at the end of a round, without a defence."""
    aggregation = strategy_named("fedlora", {}).begin(decode(base))
    for number, data in enumerate(updates):
        aggregation.add(f"d{number}", decode(data), weight=1.0 + number % 3, steps=10)
    return encode(aggregation.result(), Codec.FP32)


def aggregate_defended(updates: Iterator[bytes], base: bytes) -> bytes:
    """The same behind LEGEND's defence."""
    received = [
        Received(f"d{number}", 1.0 + number % 3, 10, partial(decode, data))
        for number, data in enumerate(updates)
    ]
    strategy = protected_strategy("fedlora", {"defence": "clip"})
    aggregated = aggregate_round(strategy, decode(base), received, ())
    return encode(aggregated.adapter, Codec.FP32)


def over_repeated(
    work: Callable[[Iterator[bytes], bytes], bytes], updates: list[bytes], count: int
) -> bytes:
    """``work`` on ``count`` updates against the first."""
    return work(repeated(updates, count), updates[0])


def cpu_seconds(works: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Least CPU time of each, all threads together: the machine may have other work.

    The works take turns, so that whatever slows down one slows down the others.
    """
    taken: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for work, times in zip(works, taken, strict=True):
            began = time.process_time()
            work()
            times.append(time.process_time() - began)
    return [min(times) for times in taken]


def peak_bytes(work: Callable[[], object]) -> int:
    """Largest memory that Python and NumPy held at once, beyond what was there."""
    tracemalloc.start()
    work()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def peak_rss_of(count: int) -> int:
    """Resident memory of a process that does nothing but aggregate, at its highest.

    A process of its own: what another measurement freed can stay with a process.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as child:
        return child.submit(_aggregate_and_measure, count).result()


def _aggregate_and_measure(count: int) -> int:
    updates = [an_update(seed) for seed in range(4)]
    return peak_rss_bytes(partial(over_repeated, aggregate, updates, count))


def measure(counts: list[int], repeats: int) -> dict[str, Any]:
    """One row per number of updates."""
    updates = [an_update(seed) for seed in range(4)]
    rows = []
    for count in counts:
        works = [
            partial(over_repeated, work, updates, count)
            for work in (one_pass, aggregate, aggregate_defended)
        ]
        if works[0]() != works[1]():
            raise SystemExit("the aggregation and the pass disagree")
        pass_s, ours_s, defended_s = cpu_seconds(works, max(9, repeats * 10 // count))
        rows.append(
            {
                "updates": count,
                "megabytes": count * len(updates[0]) / 1e6,
                "one_pass_s": pass_s,
                "aggregate_s": ours_s,
                "ratio": ours_s / pass_s,
                "defended_s": defended_s,
                "defended_ratio": defended_s / pass_s,
                "peak_megabytes": peak_bytes(works[1]) / 1e6,
                "defended_peak_megabytes": peak_bytes(works[2]) / 1e6,
                "peak_rss_megabytes": peak_rss_of(count) / 1e6,
            }
        )
        print(" ".join(f"{key} {value:.4g}" for key, value in rows[-1].items()), flush=True)
    return {
        "benchmark": "aggregate",
        "machine": machine(),
        "predicted_ratio": 1.5,
        "rows": rows,
        "summary": summary(rows),
    }


def summary(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The figures that a claim would quote: of the most updates, and from the fewest to them."""
    few, most = rows[0], rows[-1]
    grown = (most["peak_rss_megabytes"] - few["peak_rss_megabytes"]) * 1e6
    return {
        "ratio_to_numpy_mean": most["ratio"],
        "defended_ratio_to_numpy_mean": most["defended_ratio"],
        "rss_growth_bytes_per_update": grown / (most["updates"] - few["updates"]),
    }


def main() -> None:
    """Measure, print and, if asked, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="up to 100 updates, fewer times")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    counts = [10, 100] if arguments.quick else [10, 100, 1000]
    results = measure(counts, repeats=30 if arguments.quick else 100)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
