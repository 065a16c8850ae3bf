from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from broker_server.strategies.deadline import (
    CohortCosts,
    CohortTimes,
    DeadlineRule,
    deadline_s,
    depths_and_steps,
    step_choices,
)

RULES = st.builds(
    DeadlineRule,
    coverage_target=st.floats(0.1, 1.0),
    participation_min=st.floats(0.05, 1.0),
    overhead_s=st.floats(0, 5),
    hysteresis=st.just(0.1),
)


@st.composite
def cohorts(draw: st.DrawFn) -> CohortTimes:
    """Devices whose steps and layers cost different times."""
    count, layers = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    depth_min = draw(st.integers(1, layers))
    steps = step_choices(draw(st.integers(1, 12)))
    seconds = st.floats(0.01, 10)
    full = np.array(
        [
            np.cumsum(draw(st.lists(seconds, min_size=layers, max_size=layers)))
            + draw(st.floats(0, 5))
            for _ in range(count)
        ]
    )
    # One step is at most a tau-th of what a round at the smallest depth takes.
    share = np.array(draw(st.lists(st.floats(0.05, 1), min_size=count, max_size=count)))
    a_step = share * full[:, depth_min - 1] / steps[-1]
    partial = full[:, depth_min - 1, np.newaxis] - a_step[:, np.newaxis] * (
        steps[-1] - np.array(steps)
    )
    caps = np.array(draw(st.lists(st.integers(depth_min, layers), min_size=count, max_size=count)))
    sizes = draw(st.lists(st.integers(1, 99), min_size=count, max_size=count))
    costs = None
    if draw(st.booleans()):
        spent = np.array(
            draw(st.lists(st.floats(0.1, 9), min_size=count * layers, max_size=count * layers))
        ).reshape(count, layers)
        spent = np.cumsum(spent, axis=1)
        share = np.array(steps) / steps[-1]
        costs = CohortCosts(spent, spent[:, depth_min - 1, np.newaxis] * share)
    return CohortTimes(
        full, partial, steps, caps, np.array(sizes, dtype=np.float64), depth_min, costs
    )


def plan_by_loop(times: CohortTimes, row: int, deadline: float) -> tuple[int, int]:
    """Depth and steps of one device by a deadline; no steps if it sits out."""
    depth = times.depth_min
    while depth < times.caps[row] and times.full[row, depth] <= deadline:
        depth += 1
    done = [
        count for count, t in zip(times.steps, times.partial[row], strict=True) if t <= deadline
    ]
    return depth, max(done, default=0)


def utility(
    times: CohortTimes, importance: NDArray[np.float64], rule: DeadlineRule, deadline: float
) -> float:
    """Equation 6, one device and one layer at a time; nothing where too few take part."""
    plans = [plan_by_loop(times, row, deadline) for row in range(len(times.caps))]
    taking_part = sum(steps > 0 for _, steps in plans)
    if taking_part < max(1, math.ceil(rule.participation_min * len(plans))):
        return -math.inf
    total = 0.0
    for depth, worth in enumerate(importance, start=1):
        cover = sum(
            size * steps / times.steps[-1]
            for (deep, steps), size in zip(plans, times.examples, strict=True)
            if deep >= depth
        )
        total += worth * min(1.0, cover / (rule.coverage_target * times.examples.sum()))
    return total / spent_by_loop(times, plans, rule, deadline)


def spent_by_loop(
    times: CohortTimes, plans: list[tuple[int, int]], rule: DeadlineRule, deadline: float
) -> float:
    """Seconds, joules or bytes of a round, one device at a time."""
    if times.costs is None:
        return deadline + rule.overhead_s
    spent = 0.0
    for row, (depth, steps) in enumerate(plans):
        if steps == times.steps[-1]:
            spent += times.costs.full[row, depth - 1]
        elif steps:
            spent += times.costs.partial[row, times.steps.index(steps)]
    return spent


@given(cohorts(), RULES)
def test_the_deadline_is_the_best_of_all_by_brute_force(
    times: CohortTimes, rule: DeadlineRule
) -> None:
    importance = np.arange(times.full.shape[1], 0, -1, dtype=np.float64)
    events = [*times.full.ravel().tolist(), *times.partial.ravel().tolist()]

    chosen = deadline_s(times, importance, rule)

    best = max(utility(times, importance, rule, event) for event in events)
    assert utility(times, importance, rule, chosen) == pytest.approx(best, rel=1e-9)


@given(cohorts(), st.floats(0.01, 60))
def test_depths_and_steps_are_those_of_the_loop(times: CohortTimes, deadline: float) -> None:
    depths, steps = depths_and_steps(times, deadline)

    expected = [plan_by_loop(times, row, deadline) for row in range(len(times.caps))]
    assert list(zip(depths.tolist(), steps.tolist(), strict=True)) == expected


@given(cohorts(), RULES, st.floats(0.01, 60))
def test_an_earlier_deadline_stays_unless_another_is_clearly_better(
    times: CohortTimes, rule: DeadlineRule, previous_s: float
) -> None:
    importance = np.ones(times.full.shape[1])
    afresh = deadline_s(times, importance, rule)

    chosen = deadline_s(times, importance, rule, previous_s=previous_s)

    kept = utility(times, importance, rule, previous_s)
    best = utility(times, importance, rule, afresh)
    if chosen == previous_s:
        assert kept * 1.1 >= best * (1 - 1e-9)
    else:
        assert chosen == afresh
        assert kept * 1.1 <= best * (1 + 1e-9)


@given(cohorts(), st.floats(0.1, 60), st.data())
def test_a_device_deepens_only_with_time_to_spare(
    times: CohortTimes, deadline: float, data: st.DataObject
) -> None:
    layers = times.full.shape[1]
    count = len(times.caps)
    drawn = data.draw(st.lists(st.integers(0, layers), min_size=count, max_size=count))
    previous = np.array(drawn)
    free, steps = depths_and_steps(times, deadline)

    depths, same_steps = depths_and_steps(times, deadline, previous=previous, hysteresis=0.1)

    assert (depths <= free).all()
    assert (depths >= times.depth_min).all()
    assert same_steps.tolist() == steps.tolist()
    for row, depth in enumerate(depths):
        before = previous[row]
        if before < times.depth_min:
            assert depth == free[row]
        elif depth > before and depth > times.depth_min:
            assert times.full[row, depth - 1] <= deadline * 0.9
        elif depth < before:
            assert depth == free[row]


def test_one_very_slow_device_no_longer_sets_the_pace() -> None:
    full = np.array([[1.0, 1.1, 1.2]] * 9 + [[50.0, 51.0, 52.0]])
    steps = step_choices(8)
    partial = full[:, :1] * np.array(steps) / 8
    times = CohortTimes(full, partial, steps, np.full(10, 3), np.ones(10), 1)
    importance = np.ones(3)

    chosen = deadline_s(times, importance, DeadlineRule())

    assert chosen == 1.2
    depths, done = depths_and_steps(times, chosen)
    assert depths.tolist() == [3] * 9 + [1]
    assert done.tolist() == [8] * 9 + [0]
    # When nobody may be left out, the slow one does the fewest steps.
    for_all = deadline_s(times, importance, DeadlineRule(participation_min=1.0))
    assert for_all == 12.5
    assert depths_and_steps(times, for_all)[1].tolist() == [8] * 9 + [2]


@pytest.mark.parametrize(
    ("steps", "expected"), [(10, (3, 5, 8, 10)), (4, (1, 2, 3, 4)), (2, (1, 2)), (1, (1,))]
)
def test_partial_work_is_in_quarters(steps: int, expected: tuple[int, ...]) -> None:
    assert step_choices(steps) == expected


def test_a_large_fleet_is_judged_at_some_of_its_times() -> None:
    generator = np.random.default_rng(1)
    full = np.cumsum(generator.uniform(0.1, 1.0, (20_000, 6)), axis=1)
    steps = step_choices(10)
    partial = full[:, :1] * np.array(steps) / 10
    examples = generator.integers(1, 100, 20_000).astype(np.float64)
    times = CohortTimes(full, partial, steps, np.full(20_000, 6), examples, 1)
    importance, rule = np.arange(6, 0, -1, dtype=np.float64), DeadlineRule()

    chosen = deadline_s(times, importance, rule)

    tried = np.quantile(full, np.linspace(0.001, 1, 200))
    chosen_u = vector_utility(times, importance, rule, chosen)
    assert chosen_u >= max(vector_utility(times, importance, rule, t) for t in tried) * 0.999


def vector_utility(
    times: CohortTimes, importance: NDArray[np.float64], rule: DeadlineRule, deadline: float
) -> float:
    depths, steps = depths_and_steps(times, deadline)
    if np.count_nonzero(steps) < rule.participation_min * len(steps):
        return -math.inf
    work = times.examples * steps / times.steps[-1]
    cover = np.array([work[depths >= depth].sum() for depth in range(1, len(importance) + 1)])
    share = np.minimum(1.0, cover / (rule.coverage_target * times.examples.sum()))
    return float(importance @ share) / (deadline + rule.overhead_s)
