"""Configuration and aggregation over rounds: every strategy learns a small problem."""

from __future__ import annotations

import pytest

from broker_server.strategies import RoundOutcome, learn_from_round, strategy_named
from broker_server.strategies.named import STRATEGY_NAMES
from tests.support.capacities import device
from tests.support.linear_fleet import SHAPE, examples, loss, start, update_of

ROUNDS = 24
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
