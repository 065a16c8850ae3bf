"""Who of a cohort can take part, and what to tell those who cannot.

Knows memory and examples; knows neither pace nor ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from broker_server.strategies.cost_model import memory_bytes
from broker_server.strategies.strategy import DeviceCapacity, RunShape

_MIB = 1024 * 1024


@dataclass(frozen=True)
class Cohort:
    """The devices that can train the smallest depth, by device_id.

    Attributes:
        caps: kmax_i, deepest LoRA that memory holds, (n,).
        examples: n_i, (n,).
        refused: by device that cannot take part, one sentence why.
    """

    devices: Sequence[DeviceCapacity]
    caps: NDArray[np.int64]
    examples: NDArray[np.float64]
    refused: dict[str, str]


def able_cohort(shape: RunShape, devices: Sequence[DeviceCapacity], *, depth_min: int) -> Cohort:
    """Sort a cohort by device_id and part those who cannot train ``depth_min`` layers.

    Raises:
        ValueError: a device is listed twice.
    """
    ordered = sorted(devices, key=lambda device: device.device_id)
    if any(one.device_id == two.device_id for one, two in itertools.pairwise(ordered)):
        raise ValueError("a device is listed twice in the cohort")
    caps = depth_caps(shape, ordered)
    examples = np.array([device.examples for device in ordered], dtype=np.float64)
    able = (caps >= depth_min) & (examples > 0)
    left_out = [ordered[index] for index in np.flatnonzero(~able)]
    taking_part = [ordered[index] for index in np.flatnonzero(able)]
    refused = _refusals(shape, left_out, depth_min)
    return Cohort(taking_part, caps[able], examples[able], refused)


def depth_caps(shape: RunShape, devices: Sequence[DeviceCapacity]) -> NDArray[np.int64]:
    """Deepest LoRA that each device's memory holds, (n,); 0 for none.

    kmax_i = max {k : memory_i(k) <= M_i}
    """
    budget = np.array([device.memory_budget_bytes for device in devices], dtype=np.float64)
    fits = memory_bytes(shape, devices) <= budget[:, np.newaxis]
    caps: NDArray[np.int64] = np.count_nonzero(fits, axis=1)
    return caps


def _refusals(shape: RunShape, devices: Sequence[DeviceCapacity], depth_min: int) -> dict[str, str]:
    """One sentence for every device that cannot take part."""
    needed = memory_bytes(shape, devices)[:, depth_min - 1].tolist()
    no_examples = "it holds no example of this run's dataset; give it data or leave it out"
    return {
        device.device_id: (
            f"training the top {depth_min} of {shape.layer_count} layers on"
            f" {shape.peak_tokens_per_step} tokens needs {bytes_ / _MIB:.0f} MiB and it may use"
            f" {device.memory_budget_bytes / _MIB:.0f} MiB; lower batch_size or max_tokens"
        )
        if device.examples
        else no_examples
        for device, bytes_ in zip(devices, needed, strict=True)
    }
