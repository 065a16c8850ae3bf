"""What a board draws while it trains."""

from __future__ import annotations

import pytest

from profiles.loader import load_board
from profiles.power import training_watts


@pytest.mark.parametrize(
    ("board", "mode", "watts"),
    [
        ("jetson-tx2", "MAXQ", 7.5),
        ("jetson-tx2", None, 15.0),
        ("jetson-tx2", "MAXN", 15.0 / 0.862),
        ("rpi-5-8", None, 12.7),
    ],
)
def test_a_mode_draws_its_budget_and_an_uncapped_one_in_proportion(
    board: str, mode: str | None, watts: float
) -> None:
    assert training_watts(load_board(board), mode) == pytest.approx(watts)


def test_nothing_is_said_where_the_profile_knows_nothing() -> None:
    assert training_watts(load_board("generic-x86-64"), None) is None
    assert training_watts(load_board("jetson-tx2"), "TURBO") is None
