from __future__ import annotations

import numpy as np

from broker_server.strategies.fedlora import FedLora
from tests.support.capacities import SIX_LAYERS, device
from wire_protocol.lora import LoraConfig


def test_every_device_trains_every_layer_with_one_rank() -> None:
    fleet = [device("slow", gflop_per_s=5), device("fast", gflop_per_s=500)]

    configuration = FedLora(rank=8).configure(SIX_LAYERS, fleet, 3)

    assert configuration.global_ranks == (8,) * 6
    assert {plan.lora for plan in configuration.plans.values()} == {LoraConfig((8,) * 6)}


def test_a_device_that_cannot_hold_full_depth_is_refused() -> None:
    fleet = [device("big"), device("small", memory_budget_bytes=800e6)]

    configuration = FedLora().configure(SIX_LAYERS, fleet, 1)

    assert list(configuration.plans) == ["big"]
    assert configuration.refused["small"].startswith("training the top 6 of 6 layers")


def test_updates_count_by_their_examples() -> None:
    old = {"head.bias": np.zeros(1, dtype=np.float32)}
    aggregation = FedLora().begin(old)
    aggregation.add("a", {"head.bias": np.array([1.0], dtype=np.float32)}, weight=30, steps=1)
    aggregation.add("b", {"head.bias": np.array([5.0], dtype=np.float32)}, weight=10, steps=1)

    assert aggregation.result()["head.bias"].tolist() == [2.0]
