"""LoRA configuration by deadline: the cohort's times in, plans out.

Ties ``deadline`` to devices and LoRA configs; knows no paper.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from broker_server.strategies.cohort import Cohort, able_cohort
from broker_server.strategies.cost_model import (
    completion_s,
    download_bytes,
    quantised_layers,
    step_s,
    training_watts,
    upload_bytes,
)
from broker_server.strategies.deadline import (
    CohortCosts,
    CohortTimes,
    DeadlineRule,
    deadline_s,
    depths_and_steps,
    step_choices,
)
from broker_server.strategies.strategy import (
    Configuration,
    DeviceCapacity,
    Factors,
    Plan,
    RunShape,
)
from wire_protocol.lora import LoraConfig


@dataclass(frozen=True)
class Decided:
    """What a round settled on, for the hysteresis of the next one.

    Attributes:
        deadline_s: of the round.
        depths: by device, those that sat out included.
    """

    deadline_s: float
    depths: Mapping[str, int]

    def __post_init__(self) -> None:
        # Only what ``tensors`` can say, so that a run that was resumed decides alike; rounded
        # up, because a device that is done at the very deadline must stay in time.
        rounded = np.float32(self.deadline_s)
        if float(rounded) < self.deadline_s:
            rounded = np.nextafter(rounded, np.float32(np.inf))
        object.__setattr__(self, "deadline_s", float(rounded))

    def tensors(self) -> dict[str, NDArray[np.float32]]:
        """Everything, to be stored."""
        depths = {f"depth/{name}": depth for name, depth in self.depths.items()}
        numbers = {"deadline_s": self.deadline_s, **depths}
        return {name: np.array([value], dtype=np.float32) for name, value in numbers.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, NDArray[np.float32]]) -> Decided:
        """What ``tensors`` returned."""
        depths = {
            name.removeprefix("depth/"): int(value[0])
            for name, value in tensors.items()
            if name.startswith("depth/")
        }
        return cls(float(tensors["deadline_s"][0]), depths)


@dataclass(frozen=True)
class DeadlineChoice:
    """What is given to ``deadline_configuration`` beside shape and cohort.

    Attributes:
        ranks: of the global adapter, at every layer; also what a layer is worth.
        depth_min: k_min, 1..L.
        rule: how a deadline is judged.
        factors: what every device trains.
        previous: of an earlier round; None to decide afresh.
        for_all: nobody may be left out.
        quantise: see ``configure.lora_configuration``.
    """

    ranks: tuple[int, ...]
    depth_min: int
    rule: DeadlineRule
    factors: Factors = "both"
    previous: Decided | None = None
    for_all: bool = False
    quantise: bool = False


def deadline_configuration(
    shape: RunShape, devices: Sequence[DeviceCapacity], choice: DeadlineChoice
) -> tuple[Configuration, Decided | None]:
    """Depths and local steps by the best deadline.

    A device that sits out is in neither mapping of the configuration.

    Returns:
        The configuration, and what to remember of it; None without a cohort.

    Raises:
        ValueError: a device is listed twice.
    """
    cohort = able_cohort(shape, devices, depth_min=choice.depth_min, quantise=choice.quantise)
    if not cohort.devices:
        return Configuration({}, choice.ranks, cohort.refused), None
    times = _cohort_times(shape, cohort, choice)
    rule = replace(choice.rule, participation_min=1.0) if choice.for_all else choice.rule
    importance = np.array(choice.ranks[::-1], dtype=np.float64)
    before = choice.previous
    pace_s = deadline_s(times, importance, rule, previous_s=before.deadline_s if before else None)
    depths, steps = depths_and_steps(
        times, pace_s, previous=_previous(cohort, before), hysteresis=rule.hysteresis
    )
    quantised = quantised_layers(shape, cohort.devices, depths, quantise=choice.quantise)
    plans = _plans(cohort, times, choice, depths, steps, quantised)
    names = map(operator.attrgetter("device_id"), cohort.devices)
    decided = Decided(pace_s, dict(zip(names, depths.tolist(), strict=True)))
    return Configuration(plans, choice.ranks, cohort.refused), decided


def _cohort_times(shape: RunShape, cohort: Cohort, choice: DeadlineChoice) -> CohortTimes:
    full = completion_s(
        shape, cohort.devices, choice.ranks, factors=choice.factors, quantise=choice.quantise
    )
    a_step = step_s(shape, cohort.devices, quantise=choice.quantise)[:, choice.depth_min - 1]
    steps = step_choices(shape.steps)
    saved = (shape.steps - np.array(steps)) * a_step[:, np.newaxis]
    partial = full[:, choice.depth_min - 1, np.newaxis] - saved
    costs = _cohort_costs(shape, cohort, choice, steps)
    return CohortTimes(full, partial, steps, cohort.caps, cohort.examples, choice.depth_min, costs)


def _cohort_costs(
    shape: RunShape, cohort: Cohort, choice: DeadlineChoice, steps: tuple[int, ...]
) -> CohortCosts | None:
    """Joules of training, or bytes both ways; None where time is the objective."""
    column = choice.depth_min - 1
    if choice.rule.objective == "time":
        return None
    if choice.rule.objective == "traffic":
        full = download_bytes(shape, cohort.devices, choice.ranks)
        full = full + upload_bytes(shape, choice.ranks, factors=choice.factors)
        # Fewer steps save no byte.
        return CohortCosts(full, np.repeat(full[:, column, np.newaxis], len(steps), axis=1))
    a_step = step_s(shape, cohort.devices, quantise=choice.quantise)
    a_step = training_watts(cohort.devices) * a_step
    return CohortCosts(shape.steps * a_step, a_step[:, column, np.newaxis] * np.array(steps))


def _previous(cohort: Cohort, before: Decided | None) -> NDArray[np.int64] | None:
    if before is None:
        return None
    depths = (before.depths.get(device.device_id, 0) for device in cohort.devices)
    return np.fromiter(depths, dtype=np.int64, count=len(cohort.devices))


def _plans(
    cohort: Cohort,
    times: CohortTimes,
    choice: DeadlineChoice,
    depths: NDArray[np.int64],
    steps: NDArray[np.int64],
    quantised: list[int],
) -> dict[str, Plan]:
    rows = np.arange(len(depths))
    column = np.searchsorted(np.array(times.steps), np.maximum(steps, 1))
    whole = steps == times.steps[-1]
    predicted = np.where(whole, times.full[rows, depths - 1], times.partial[rows, column])
    configs = {int(depth): LoraConfig.top(int(depth), choice.ranks) for depth in np.unique(depths)}
    table = zip(
        cohort.devices,
        depths.tolist(),
        steps.tolist(),
        predicted.tolist(),
        quantised,
        strict=True,
    )
    return {
        device.device_id: Plan(configs[depth], count, seconds, choice.factors, layers)
        for device, depth, count, seconds, layers in table
        if count
    }
