"""The deadline that covers the most per second, instead of the pace of the slowest.

For a deadline D every device takes its deepest LoRA that is done by D; one that
misses D at k_min does fewer local steps (quarters of tau), and one that misses
it even so sits this round out.

    cover_l(D) = sum_{i trains l} n_i steps_i / tau
    U(D) = sum_l g_l min(1, cover_l / (target * sum_i n_i)) / (D + overhead)    (6)

Where joules or bytes are to be saved instead of time, they stand below the line.
Knows times; knows no device and no paper's defaults. All of it is ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

MAX_DEADLINES = 4096
"""Deadlines that are tried; of a larger fleet's times, evenly spaced ones."""

Times = NDArray[np.float64]

Objective = Literal["time", "energy", "traffic"]


@dataclass(frozen=True)
class DeadlineRule:
    """How a deadline is judged.

    Attributes:
        coverage_target: share of the cohort's examples that a layer should see
            in a round; more counts no further.
        participation_min: smallest share of the cohort that takes part.
        left_out_max: every round after this many is one in which all take
            part, so that nobody sits out more in a row. All at once, because
            one slow device costs a round as much time as ten.
        overhead_s: of a round beside the devices: aggregation, evaluation; counts
            where the objective is time.
        hysteresis: a new deadline must be better by this share, and a device
            deepens only if it then has this share of the deadline to spare.
        objective: what coverage is divided by.
    """

    coverage_target: float = 0.75
    participation_min: float = 0.5
    left_out_max: int = 2
    overhead_s: float = 1.0
    hysteresis: float = 0.1
    objective: Objective = "time"

    def is_for_all(self, round_number: int) -> bool:
        """True for a round in which nobody is left out."""
        return round_number % (self.left_out_max + 1) == 0


@dataclass(frozen=True)
class CohortCosts:
    """What every device spends, in joules or bytes; shaped like its times.

    Attributes:
        full: with all local steps, (n, L), not decreasing along a row.
        partial: at depth k_min with ``steps`` local steps, (n, len(steps)), not decreasing.
    """

    full: NDArray[np.float64]
    partial: NDArray[np.float64]


@dataclass(frozen=True)
class CohortTimes:
    """What every device of a cohort needs.

    Attributes:
        full: t_i(k) with all local steps, (n, L), increasing along a row.
        partial: t_i(k_min) with ``steps`` local steps, (n, len(steps)), increasing.
        steps: local steps that may be asked for, rising to tau.
        caps: kmax_i, (n,), none below ``depth_min``.
        examples: n_i, (n,).
        depth_min: k_min.
        costs: what is to be saved; None for time.
    """

    full: Times
    partial: Times
    steps: tuple[int, ...]
    caps: NDArray[np.int64]
    examples: NDArray[np.float64]
    depth_min: int
    costs: CohortCosts | None = None

    def earliest_s(self, participation_min: float) -> float:
        """The first deadline that this share of the cohort can keep."""
        needed = max(1, math.ceil(participation_min * len(self.caps)))
        return float(np.partition(self.partial[:, 0], needed - 1)[needed - 1])


def step_choices(steps: int) -> tuple[int, ...]:
    """Quarters of the local steps, rounded up, the last all of them."""
    return tuple(sorted({-(-steps * quarter // 4) for quarter in (1, 2, 3, 4)}))


def deadline_s(
    times: CohortTimes, importance: Times, rule: DeadlineRule, *, previous_s: float | None = None
) -> float:
    """The deadline with the largest U; of equals the earliest.

    O(n L log C) for C tried deadlines.

    Args:
        times: of the cohort, not empty.
        importance: g_l by distance from the output, (L,): the output layer first.
        rule: how to judge.
        previous_s: of the round before; kept unless another is clearly better.

    Returns:
        Seconds from assignment to update.
    """
    earliest = times.earliest_s(rule.participation_min)
    tried = _candidates(times, earliest)
    utility = _utility(times, importance, rule, tried)
    best = int(np.argmax(utility))
    if previous_s is not None and previous_s >= earliest:
        kept = float(_utility(times, importance, rule, np.array([previous_s]))[0])
        if kept * (1.0 + rule.hysteresis) >= utility[best]:
            return previous_s
    return float(tried[best])


def depths_and_steps(
    times: CohortTimes,
    pace_s: float,
    *,
    previous: NDArray[np.int64] | None = None,
    hysteresis: float = 0.0,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """What every device does by a deadline.

    Args:
        times: of the cohort.
        pace_s: the deadline.
        previous: depth of the round before, (n,); 0 for none.
        hysteresis: see ``DeadlineRule``.

    Returns:
        Depth (n,), and local steps (n,): 0 for who sits out.
    """
    in_time = np.count_nonzero(times.full <= pace_s, axis=1)
    depths = np.minimum(np.maximum(in_time, times.depth_min), times.caps)
    if previous is not None:
        with_room = np.count_nonzero(times.full <= pace_s * (1.0 - hysteresis), axis=1)
        kept = np.minimum(depths, np.maximum(previous, with_room))
        depths = np.where(previous >= times.depth_min, np.maximum(kept, times.depth_min), depths)
    quarters = np.count_nonzero(times.partial <= pace_s, axis=1)
    return depths, np.array((0, *times.steps))[quarters]


def _candidates(times: CohortTimes, earliest: float) -> Times:
    """Times at which somebody can do more, (C,), rising, from ``earliest`` on."""
    deeper = times.full[:, times.depth_min :]
    reachable = np.arange(times.depth_min + 1, times.full.shape[1] + 1) <= times.caps[:, np.newaxis]
    events = np.concatenate([times.partial.ravel(), deeper[reachable]])
    events = events[events >= earliest]
    if len(events) > MAX_DEADLINES:
        ranks = np.linspace(0, len(events) - 1, MAX_DEADLINES).astype(np.int64)
        events = np.partition(events, ranks)[ranks]
    return np.unique(events)


def _utility(times: CohortTimes, importance: Times, rule: DeadlineRule, tried: Times) -> Times:
    """U of every deadline of the rising array ``tried``, (C,)."""
    tau = times.steps[-1]
    shares = np.diff((0, *times.steps)) / tau
    at_least = np.zeros(len(tried))
    for column, share in enumerate(shares):
        at_least += share * _admitted(times.partial[:, column], times.examples, tried)
    target = rule.coverage_target * float(times.examples.sum())
    gained = importance[: times.depth_min].sum() * np.minimum(1.0, at_least / target)
    for depth in range(times.depth_min + 1, times.full.shape[1] + 1):
        deep = times.caps >= depth
        cover = _admitted(times.full[deep, depth - 1], times.examples[deep], tried)
        gained += importance[depth - 1] * np.minimum(1.0, cover / target)
    spent = tried + rule.overhead_s if times.costs is None else _spent(times, times.costs, tried)
    utility: Times = gained / spent
    return utility


def _spent(times: CohortTimes, costs: CohortCosts, tried: Times) -> NDArray[np.float64]:
    """What the cohort spends by each deadline, (C,)."""
    spent = np.zeros(len(tried))
    more = np.diff(costs.partial, axis=1, prepend=0.0)
    for column in range(costs.partial.shape[1]):
        spent += _admitted(times.partial[:, column], more[:, column], tried)
    more = np.diff(costs.full, axis=1, prepend=0.0)
    for depth in range(times.depth_min + 1, times.full.shape[1] + 1):
        deep = times.caps >= depth
        spent += _admitted(times.full[deep, depth - 1], more[deep, depth - 1], tried)
    return spent


def _admitted(times: Times, amounts: NDArray[np.float64], tried: Times) -> NDArray[np.float64]:
    """Sum of the amounts of the devices whose time is within each deadline, (C,)."""
    first = np.searchsorted(tried, times, side="left")
    added = np.bincount(first, weights=amounts, minlength=len(tried) + 1)
    return np.cumsum(added[: len(tried)], dtype=np.float64)
