from __future__ import annotations

import pytest

from broker_server.strategies import strategy_named
from broker_server.strategies.fedlora import FedLora
from broker_server.strategies.legend import Legend
from wire_protocol.errors import ConfigError


def test_a_strategy_without_options_has_its_defaults() -> None:
    assert strategy_named("legend", {}) == Legend()
    assert strategy_named("fedlora", {}) == FedLora()


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
    assert strategy_named("legend", {"rank_budget": None, "waiting_max_s": None}) == Legend()


def test_an_unknown_strategy_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"no strategy 'legnd'; use one of legend, fedlora"):
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
        ("weighting", "median", "one of examples, uniform, not 'median'"),
    ],
)
def test_a_wrong_value_says_what_would_be_right(option: str, value: object, complaint: str) -> None:
    with pytest.raises(ConfigError, match=f"option {option} of strategy legend must be") as caught:
        strategy_named("legend", {option: value})

    assert complaint in str(caught.value)
