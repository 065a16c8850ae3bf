"""What one training step costs on this device with one base model.

A few steps on random tokens at the smallest and the largest depth; two seconds-per-token figures
and a memory line come out. Knows torch through ``finetune``. Valid on Python 3.8.

Source: arXiv:2412.20004, capacity estimation (F and mu per device).
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np

from edge_agent import onnx_runtime
from edge_agent.base_model import BaseModel
from edge_agent.dataset import Tokenised
from edge_agent.finetune import StepCost, TrainingStep
from edge_agent.peak_memory import (
    available_bytes,
    is_out_of_memory,
    peak_bytes,
    release_memory,
    reset_peak,
)
from edge_agent.peft_adapter import attach, detach, set_training_mode
from edge_agent.round_directory import Recipe
from edge_agent.stretch import Stretch
from wire_protocol.errors import DeviceError, FailureCode
from wire_protocol.model_family import adapter_shapes

_RANK = 8
_TIMED_STEPS = 3
_BUDGET_S = 20.0
_LARGER = 4
"""The second batch is this many times the first: the memory line needs two points apart."""

PROGRESS_STEPS = 5


@dataclass(frozen=True)
class ProbeRequest:
    """What to measure.

    Attributes:
        max_tokens: tokens of each random example.
        batch_size: examples of a step; halved until a step fits into memory.
        flops_per_s: speed of the imitated board; None imitates nothing.
        onnx: whether to measure inference too.
        work_dir: where the exported model is kept.
    """

    max_tokens: int
    batch_size: int
    threads: int
    precision: str
    flops_per_s: Optional[float]
    onnx: bool
    work_dir: Path
    memory_limit_bytes: Optional[int] = None


@dataclass(frozen=True)
class Point:
    """One measurement: the timed steps of one depth and batch, and their peak memory.

    Depth 0 without tokens or steps is the idle process.
    """

    depth: int
    tokens: int
    costs: Tuple[StepCost, ...]
    peak_memory_bytes: int


def benchmark(
    base: BaseModel, request: ProbeRequest, *, on_step: Callable[[int, str], object]
) -> Dict[str, Any]:
    """Measure training steps, memory and inference.

    Args:
        base: a base model without an adapter.
        request: what to measure.
        on_step: called before each part with its number from 1 and its name; it
            may raise to stop.

    Returns:
        The fields of ``ComputeReport`` without the digest, ``inference`` with the
        fields of ``InferenceReport`` or None, ``onnx_error`` and ``steps_timed``.

    Raises:
        DeviceError: OUT_OF_MEMORY, when even one example does not fit.
    """
    # First, because the exporter leaves memory behind that this process then also trains with.
    on_step(1, "inference")
    latency, onnx_error = _inference(base, request)
    points = _measure(base, request, on_step)
    forward, backward = fit_seconds(points)
    memory = fit_memory(points)
    return {
        "forward_seconds_per_token_layer": forward,
        "backward_seconds_per_token_layer": backward,
        "memory_base_bytes": int(memory[0]),
        "memory_bytes_per_token": memory[1],
        "memory_bytes_per_token_layer": memory[2],
        "inference": latency,
        "onnx_error": onnx_error,
        "steps_timed": sum(len(point.costs) for point in points),
    }


def fit_seconds(points: Sequence[Point]) -> Tuple[float, float]:
    """Seconds per token and layer, forward and backward.

    Forward is the median over all steps. Backward grows with the depth from zero:
    least squares through the origin over each point's median.
    """
    timed = [point for point in points if point.costs]
    forward = statistics.median(
        cost.forward_s / cost.forward_token_layers for point in timed for cost in point.costs
    )
    sizes = np.array([point.tokens * point.depth for point in timed], dtype=np.float64)
    seconds = np.array([statistics.median(c.backward_s for c in point.costs) for point in timed])
    return float(forward), float(sizes @ seconds / (sizes @ sizes))


def fit_memory(points: Sequence[Point]) -> Tuple[float, float, float]:
    """Fit ``peak = base + tokens * (frozen + trained * depth)``, nothing negative.

    Three unknowns: the best non-negative solution is the best among the solutions
    with some of them held at zero.

    Returns:
        base in bytes, frozen in bytes per token, trained in bytes per token and layer.
    """
    rows = np.array([[1.0, p.tokens, p.tokens * p.depth] for p in points])
    peaks = np.array([p.peak_memory_bytes for p in points], dtype=np.float64)
    best, best_error = np.array([peaks.max(), 0.0, 0.0]), np.inf
    for kept in _subsets(3):
        solution = np.zeros(3)
        solution[kept] = np.linalg.lstsq(rows[:, kept], peaks, rcond=None)[0]
        error = float(np.square(rows @ solution - peaks).sum())
        if (solution >= 0).all() and error < best_error * (1 - 1e-9):
            best, best_error = solution, error
    return float(best[0]), float(best[1]), float(best[2])


def _subsets(count: int) -> List[List[int]]:
    """Index subsets that keep the base, smallest first."""
    others = range(1, count)
    sizes = range(count)
    return [[0, *kept] for size in sizes for kept in itertools.combinations(others, size)]


def _measure(
    base: BaseModel, request: ProbeRequest, on_step: Callable[[int, str], object]
) -> List[Point]:
    batch_size = request.batch_size
    while True:
        try:
            return _measure_depths(base, request, on_step, batch_size=batch_size)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        release_memory()
        if batch_size == 1:
            line = "one training step on a single example does not fit into memory"
            raise DeviceError(FailureCode.OUT_OF_MEMORY, line)
        batch_size //= 2


def _measure_depths(
    base: BaseModel,
    request: ProbeRequest,
    on_step: Callable[[int, str], object],
    *,
    batch_size: int,
) -> List[Point]:
    began = time.perf_counter()
    release_memory()
    reset_peak()
    idle = peak_bytes()
    depths = sorted({1, base.shape.layer_count})
    points = []
    for number, depth in enumerate(depths, start=2):
        on_step(number, f"training step at depth {depth}")
        points.append(_run(base, request, depth=depth, batch_size=batch_size, steps=_TIMED_STEPS))
    growth = max(point.peak_memory_bytes for point in points) - idle
    room = available_bytes(request.memory_limit_bytes)
    if time.perf_counter() - began > _BUDGET_S or room < 2 * _LARGER * growth:
        # A larger batch costs too much here: the idle process is the other end of the line.
        return [*points, Point(0, 0, (), idle)]
    for number, depth in enumerate(depths, start=4):
        on_step(number, f"larger training step at depth {depth}")
        points.append(_run(base, request, depth=depth, batch_size=batch_size * _LARGER, steps=1))
    return points


def _run(
    base: BaseModel, request: ProbeRequest, *, depth: int, batch_size: int, steps: int
) -> Point:
    """Timed steps at one depth, after a warm-up step where there are several."""
    layer_count = base.shape.layer_count
    ranks = (0,) * (layer_count - depth) + (_RANK,) * depth
    adapter = {
        name: np.zeros(shape, dtype=np.float32)
        for name, shape in adapter_shapes(base.shape, ranks, base.label_count).items()
    }
    batch = _random_batch(base, batch_size, min(request.max_tokens, base.max_positions))
    stretch = Stretch(
        base.shape.weights_per_layer, request.flops_per_s, sleep=lambda _seconds: None
    )
    release_memory()
    reset_peak()
    began = time.perf_counter()
    attached = attach(base, adapter, ranks)
    try:
        set_training_mode(attached)
        step = TrainingStep(attached, _recipe(base), precision=request.precision, stretch=stretch)
        costs = [step.run(batch)]
        while len(costs) <= steps and steps > 1 and time.perf_counter() - began < _BUDGET_S / 2:
            costs.append(step.run(batch))
        tokens, peak = costs[0].tokens, peak_bytes()
    finally:
        detach(attached)
    return Point(depth, tokens, tuple(costs[1:] or costs), peak)


def _random_batch(base: BaseModel, batch_size: int, tokens: int) -> List[Tokenised]:
    generator = random.Random(0)  # noqa: S311  # any words will do
    vocabulary = int(base.model.config.vocab_size)
    batch = []
    for row in range(batch_size):
        ids = [generator.randrange(vocabulary) for _ in range(tokens)]
        labels = [row % base.label_count] if base.label_count else ids
        batch.append(Tokenised({"input_ids": ids, "attention_mask": [1] * tokens}, labels))
    return batch


def _recipe(base: BaseModel) -> Recipe:
    """Learning rates so small that the loss stays finite; they cost the same."""
    return Recipe(base.family.task, (), 1e-6, 1e-6, max_tokens=base.max_positions)


def _inference(
    base: BaseModel, request: ProbeRequest
) -> Tuple[Optional[Dict[str, Any]], Optional[str]]:
    """The latency, or None and why; a device without onnxruntime still trains."""
    if not request.onnx:
        return None, None
    tokens = min(request.max_tokens, base.max_positions)
    try:
        path = onnx_runtime.export(
            Path(base.tokenizer.name_or_path),
            request.work_dir,
            limit_bytes=request.memory_limit_bytes,
        )
        latency = onnx_runtime.measure(path, tokens=tokens, threads=request.threads)
    except Exception as error:  # noqa: BLE001  # exporters fail in their own ways; none is fatal
        return None, " ".join(f"{type(error).__name__}: {error}".split())[:300]
    stretch = Stretch(
        base.shape.weights_per_layer, request.flops_per_s, sleep=lambda _seconds: None
    )
    token_layers = tokens * base.shape.layer_count
    p50_s = stretch.forward(token_layers, measured_s=latency.p50_s)
    p95_s = stretch.forward(token_layers, measured_s=latency.p95_s)
    return {"p50_s": p50_s, "p95_s": p95_s, "tokens": tokens}, None
