"""A small problem that a fleet learns together, without a language model.

The model is a sum of linear layers, one module each: y = sum_l 2 B_l A_l x + head.bias.
Devices do plain gradient descent on their own examples.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from broker_server.strategies import Adapter, Plan
from tests.support.capacities import SIX_LAYERS, Tensors

SIZE, LAYERS = 6, 3
SHAPE = replace(SIX_LAYERS, layer_count=LAYERS, values_per_rank=(2 * SIZE,) * LAYERS)

Matrix = NDArray[np.float64]


def start(ranks: tuple[int, ...]) -> Tensors:
    generator = np.random.default_rng(3)
    adapter: Tensors = {"head.bias": np.zeros(SIZE, dtype=np.float32)}
    for layer, rank in enumerate(ranks):
        bound = SIZE**-0.5
        drawn = generator.uniform(-bound, bound, (rank, SIZE))
        adapter[f"layers.{layer}.q.lora_A"] = drawn.astype(np.float32)
        adapter[f"layers.{layer}.q.lora_B"] = np.zeros((SIZE, rank), dtype=np.float32)
    return adapter


def examples(device_id: str, count: int) -> tuple[Matrix, Matrix]:
    """Inputs and outputs of one device, (count, SIZE) each."""
    truth = np.random.default_rng(0).normal(size=(SIZE, SIZE))
    inputs = np.random.default_rng(int(device_id[1:]) + 1).normal(size=(count, SIZE))
    return inputs, inputs @ truth.T + 1.0


def error(adapter: Adapter, inputs: Matrix, outputs: Matrix) -> Matrix:
    got = inputs * 0 + adapter["head.bias"]
    for layer in range(LAYERS):
        down, up = (adapter[f"layers.{layer}.q.lora_{factor}"] for factor in "AB")
        got = got + 2 * inputs @ down.T @ up.T
    return got - outputs


def update_of(plan: Plan, adapter: Tensors, inputs: Matrix, outputs: Matrix) -> Tensors:
    """Gradient descent from the first rows of the global adapter."""
    held = dict(adapter)
    for layer in plan.lora.layers:
        rank, a, b = plan.lora.ranks[layer], *names(layer)
        held[a], held[b] = adapter[a][:rank].copy(), adapter[b][:, :rank].copy()
    begun = dict(held)
    trained = {"head.bias"}
    for layer in plan.lora.layers:
        trained |= {n for n in names(layer) if plan.factors in ("both", n[-1])}
    for _ in range(plan.steps):
        wrong = error(held, inputs, outputs) / len(inputs)
        slopes: dict[str, Matrix] = {"head.bias": wrong.sum(axis=0)}
        for layer in plan.lora.layers:
            a, b = names(layer)
            slopes[a] = 2 * held[b].T @ wrong.T @ inputs
            slopes[b] = 2 * wrong.T @ inputs @ held[a].T
        held.update({n: (held[n] - 0.02 * slopes[n]).astype(np.float32) for n in trained})
    return {name: held[name] - begun[name] for name in trained}


def names(layer: int) -> tuple[str, str]:
    return f"layers.{layer}.q.lora_A", f"layers.{layer}.q.lora_B"


def loss(adapter: Adapter) -> float:
    return float(np.mean(error(adapter, *examples("d99", 500)) ** 2))
