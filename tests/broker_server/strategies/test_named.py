from __future__ import annotations

from typing import get_args

import pytest

from broker_server.run_spec import StrategyName
from broker_server.strategies import strategy_named
from broker_server.strategies.deadline import DeadlineRule
from broker_server.strategies.fedlora import FedLora
from broker_server.strategies.legend import Legend
from broker_server.strategies.named import STRATEGY_NAMES
from tests.support.capacities import SIX_LAYERS, device
from wire_protocol.errors import ConfigError


def test_a_strategy_without_options_has_its_defaults() -> None:
    assert strategy_named("legend", {}) == Legend(pace="deadline")
    assert strategy_named("legend-paper", {}) == Legend(pace="slowest")
    assert strategy_named("fedlora", {}) == FedLora()


def test_a_waiting_limit_takes_the_place_of_the_deadline() -> None:
    limited = strategy_named("legend", {"waiting_max_s": 3})
    assert limited == Legend(waiting_max_s=3.0, pace="slowest")
    with pytest.raises(ConfigError, match="not both"):
        strategy_named("legend", {"waiting_max_s": 3, "pace": "deadline"})


def test_options_reach_the_strategy() -> None:
    options: dict[str, object] = {
        "rank_min": 2,
        "rank_step": 2,
        "rank_budget": 40,
        "depth_min": 3,
        "waiting_max_share": 0.25,
        "rho": 0.8,
        "weighting": "uniform",
        "server_learning_rate": 0.5,
    }

    assert strategy_named("legend", options) == Legend(
        2, 2.0, 40, 3, None, 0.25, 0.8, "uniform", 0.5
    )


def test_null_means_no_limit() -> None:
    assert strategy_named("legend", {"rank_budget": None, "waiting_max_s": None}) == strategy_named(
        "legend", {}
    )


def test_an_unknown_strategy_is_answered_with_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"no strategy 'legnd'; use one of legend, legend-paper, fedlora"
    ):
        strategy_named("legnd", {})


def test_an_unknown_option_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"fedlora has no option 'rnk'; it has: rank$"):
        strategy_named("fedlora", {"rnk": 8})


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        ("rank_min", 0, "a whole number of at least 1 and at most 256, not 0"),
        ("rank_min", 257, "at most 256"),
        ("rank_min", 4.0, "a whole number"),
        ("rank_min", True, "a whole number"),
        ("rank_min", "4", "a whole number"),
        ("rank_budget", 0, "null or a whole number of at least 1"),
        ("rank_step", -1, "a number of at least 0"),
        ("rank_step", float("nan"), "a number of at least 0"),
        ("rank_step", False, "a number of at least 0"),
        ("waiting_max_s", float("inf"), "null or a number"),
        ("waiting_max_s", 10**400, "null or a number"),
        ("rho", 1.0, "below 1"),
        ("server_learning_rate", 0, "a number above 0"),
        ("coverage_target", 0, "a number above 0 and at most 1, not 0"),
        ("participation_min", 1.1, "at most 1"),
        ("participation_min", True, "at most 1"),
        ("weighting", "median", "one of examples, uniform, not 'median'"),
    ],
)
def test_a_wrong_value_says_what_would_be_right(option: str, value: object, complaint: str) -> None:
    with pytest.raises(ConfigError, match=f"option {option} of strategy legend must be") as caught:
        strategy_named("legend", {option: value})

    assert complaint in str(caught.value)


def test_a_run_may_name_every_strategy() -> None:
    assert get_args(StrategyName) == STRATEGY_NAMES


@pytest.mark.parametrize("name", STRATEGY_NAMES)
def test_every_strategy_configures_a_fleet_with_its_defaults(name: str) -> None:
    fleet = [device("slow", gflop_per_s=20), device("fast", gflop_per_s=200)]
    strategy = strategy_named(name, {})

    configuration = strategy.configure(SIX_LAYERS, fleet, 1)

    assert configuration.global_ranks == strategy.global_ranks(SIX_LAYERS)
    assert "fast" in configuration.plans
    for plan in configuration.plans.values():
        ranks = zip(plan.lora.ranks, configuration.global_ranks, strict=True)
        assert all(mine <= most for mine, most in ranks)


def test_options_of_the_deadline_are_flat() -> None:
    options: dict[str, object] = {"pace": "deadline", "coverage_target": 1, "left_out_max": 3}

    strategy = strategy_named("legend", options)

    rule = DeadlineRule(coverage_target=1.0, left_out_max=3)
    assert strategy == Legend(pace="deadline", rule=rule)


def test_the_published_legend_has_no_switch_of_ours() -> None:
    assert strategy_named("legend-paper", {"rank_min": 2}) == Legend(rank_min=2)
    with pytest.raises(ConfigError, match="legend-paper has no option 'pace'"):
        strategy_named("legend-paper", {"pace": "deadline"})
