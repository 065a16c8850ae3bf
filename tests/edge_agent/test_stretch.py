"""Imitating a slower board."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.stretch import Stretch


def test_a_step_waits_for_the_imitated_board() -> None:
    slept: list[float] = []
    stretch = Stretch(1000, flops_per_s=1e6, sleep=slept.append)
    # 2 flops x 1000 weights x 10 tokens x 4 layers = 80 000 flops
    assert stretch.forward(10 * 4, measured_s=0.03) == pytest.approx(0.08)
    assert stretch.backward(10, depth=1, measured_s=0.005) == pytest.approx(0.02)
    assert slept == pytest.approx([0.05, 0.015])


def test_a_board_that_is_faster_than_this_machine_cannot_be_imitated() -> None:
    slept: list[float] = []
    stretch = Stretch(1000, flops_per_s=1e12, sleep=slept.append)
    assert stretch.forward(10 * 4, measured_s=0.03) == 0.03
    assert slept == []


@given(
    tokens=st.integers(1, 10_000),
    depth=st.integers(1, 24),
    flops_per_s=st.none() | st.floats(1e3, 1e15),
    measured_s=st.floats(0, 1e3),
)
def test_reported_seconds_are_measured_plus_slept(
    tokens: int, depth: int, flops_per_s: float | None, measured_s: float
) -> None:
    slept: list[float] = []
    stretch = Stretch(7_000_000, flops_per_s=flops_per_s, sleep=slept.append)
    forward_s = stretch.forward(tokens * 24, measured_s=measured_s)
    backward_s = stretch.backward(tokens, depth=depth, measured_s=measured_s)
    assert forward_s + backward_s == pytest.approx(2 * measured_s + sum(slept))
    assert forward_s >= backward_s >= measured_s
