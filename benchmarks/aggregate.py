"""Aggregation against one pass of NumPy over the same bytes.

    python benchmarks/aggregate.py [--quick] [--json FILE]

Both read every update once, as bytes. The pass multiplies each with its weight and adds it to one
array; the aggregation also decodes safetensors, checks names, shapes and values, and counts holders
per rank row. Prediction: at most 1.5 times the pass, and the same memory for 10 updates and 1,000.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from broker_server.strategies import strategy_named
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


def one_pass(updates: Iterator[bytes]) -> float:
    """The least that any aggregation does with these bytes."""
    total: np.ndarray[Any, np.dtype[np.float64]] | None = None
    for number, data in enumerate(updates):
        values = np.frombuffer(data, np.float32, offset=len(data) % 4)
        if total is None:
            total = np.zeros(values.size)
        total += np.multiply(values, 1.0 + number % 3, dtype=np.float64)
    return 0.0 if total is None else float(total.sum())


def aggregate(updates: Iterator[bytes], base: bytes) -> int:
    """What the server does at the end of a round."""
    aggregation = strategy_named("fedlora", {}).begin(decode(base))
    for number, data in enumerate(updates):
        aggregation.add(f"d{number}", decode(data), weight=1.0 + number % 3, steps=10)
    return len(encode(aggregation.result(), Codec.FP32))


def _aggregate_repeated(updates: list[bytes], count: int) -> int:
    return aggregate(repeated(updates, count), updates[0])


def _pass_over_repeated(updates: list[bytes], count: int) -> float:
    return one_pass(repeated(updates, count))


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median wall time."""
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def peak_bytes(work: Callable[[], object]) -> int:
    """Largest memory that Python and NumPy held at once, beyond what was there."""
    tracemalloc.start()
    work()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def measure(counts: list[int], repeats: int) -> dict[str, Any]:
    """One row per number of updates."""
    updates = [an_update(seed) for seed in range(4)]
    rows = []
    for count in counts:
        ours = partial(_aggregate_repeated, updates, count)
        ours_s = seconds(ours, repeats)
        pass_s = seconds(partial(_pass_over_repeated, updates, count), repeats)
        peak = peak_bytes(ours)
        rows.append(
            {
                "updates": count,
                "megabytes": count * len(updates[0]) / 1e6,
                "aggregate_s": ours_s,
                "one_pass_s": pass_s,
                "ratio": ours_s / pass_s,
                "peak_megabytes": peak / 1e6,
            }
        )
        print(
            f"{count:>6} updates {rows[-1]['megabytes']:8.1f} MB   ours {ours_s:7.3f} s   "
            f"one pass {pass_s:7.3f} s   ratio {ours_s / pass_s:4.2f}   peak {peak / 1e6:6.1f} MB",
            flush=True,
        )
    return {"benchmark": "aggregate", "predicted_ratio": 1.5, "rows": rows}


def main() -> None:
    """Measure, print and, if asked, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="up to 100 updates, once each")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    counts = [10, 100] if arguments.quick else [10, 100, 1000]
    results = measure(counts, repeats=1 if arguments.quick else 3)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
