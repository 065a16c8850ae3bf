"""Configuration and aggregation over rounds: every strategy learns a small problem.

The model is a sum of linear layers, one module each: y = sum_l 2 B_l A_l x + head.bias.
Devices do plain gradient descent on their own examples.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from broker_server.strategies import (
    Adapter,
    Plan,
    RoundOutcome,
    learn_from_round,
    strategy_named,
)
from broker_server.strategies.named import STRATEGY_NAMES
from tests.support.capacities import SIX_LAYERS, Tensors, device

SIZE, LAYERS, ROUNDS = 6, 3, 24
SHAPE = replace(SIX_LAYERS, layer_count=LAYERS, values_per_rank=(2 * SIZE,) * LAYERS)
FLEET = [
    device(f"d{number}", gflop_per_s=speed, examples=20 + 10 * number)
    for number, speed in enumerate((15, 40, 60, 90, 300))
]
SWITCHES: list[tuple[str, dict[str, object]]] = [
    *((name, {}) for name in STRATEGY_NAMES),
    ("legend", {"pace": "deadline", "factors": "alternating"}),
    ("legend", {"server_optimizer": "momentum", "server_momentum": 0.5}),
    ("legend", {"server_optimizer": "adam", "server_learning_rate": 0.05}),
    ("legend", {"server_optimizer": "yogi", "server_learning_rate": 0.05}),
]

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


@pytest.mark.parametrize(("name", "options"), SWITCHES)
def test_a_fleet_learns_together(name: str, options: dict[str, object]) -> None:
    strategy = strategy_named(name, options)
    adapter = start(strategy.global_ranks(SHAPE))
    before = loss(adapter)

    for number in range(1, ROUNDS + 1):
        plans = strategy.configure(SHAPE, FLEET, number).plans
        aggregation = strategy.begin(adapter)
        for one in FLEET:
            if one.device_id in plans:
                plan = plans[one.device_id]
                update = update_of(plan, adapter, *examples(one.device_id, one.examples))
                aggregation.add(one.device_id, update, weight=one.examples, steps=plan.steps)
        adapter = aggregation.result()
        learn_from_round(strategy, RoundOutcome(number, 1 / (1 + loss(adapter)), 1.0))

    assert loss(adapter) < before / 4
