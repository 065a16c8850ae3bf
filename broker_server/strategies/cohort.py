"""Who of a cohort can take part, and what to tell those who cannot.

Knows memory and examples; knows neither pace nor ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from broker_server.strategies.cost_model import layers_to_quantise, memory_bytes
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


def able_cohort(
    shape: RunShape, devices: Sequence[DeviceCapacity], *, depth_min: int, quantise: bool = False
) -> Cohort:
    """Sort a cohort by device_id and part those who cannot train ``depth_min`` layers.

    Args:
        shape: what is the same for every device.
        devices: the cohort in any order.
        depth_min: k_min.
        quantise: memory may be spared by quantised activations.

    Raises:
        ValueError: a device is listed twice.
    """
    ordered = sorted(devices, key=lambda device: device.device_id)
    if any(one.device_id == two.device_id for one, two in itertools.pairwise(ordered)):
        raise ValueError("a device is listed twice in the cohort")
    caps = depth_caps(shape, ordered, quantise=quantise)
    examples = np.array([device.examples for device in ordered], dtype=np.float64)
    able = (caps >= depth_min) & (examples > 0)
    left_out = [ordered[index] for index in np.flatnonzero(~able)]
    taking_part = [ordered[index] for index in np.flatnonzero(able)]
    refused = _refusals(shape, left_out, depth_min, quantise=quantise)
    return Cohort(taking_part, caps[able], examples[able], refused)


def depth_caps(
    shape: RunShape, devices: Sequence[DeviceCapacity], *, quantise: bool = False
) -> NDArray[np.int64]:
    """Deepest LoRA that each device's memory holds, (n,); 0 for none.

    kmax_i = max {k : memory_i(k) <= M_i}
    """
    budget = np.array([device.memory_budget_bytes for device in devices], dtype=np.float64)
    fits = _least_memory(shape, devices, quantise=quantise) <= budget[:, np.newaxis]
    caps: NDArray[np.int64] = np.count_nonzero(fits, axis=1)
    return caps


def _least_memory(
    shape: RunShape, devices: Sequence[DeviceCapacity], *, quantise: bool
) -> NDArray[np.float64]:
    quantised = layers_to_quantise(shape, devices) if quantise else None
    return memory_bytes(shape, devices, quantised=quantised)


def _refusals(
    shape: RunShape, devices: Sequence[DeviceCapacity], depth_min: int, *, quantise: bool
) -> dict[str, str]:
    """One sentence for every device that cannot take part."""
    needed = _least_memory(shape, devices, quantise=quantise)[:, depth_min - 1].tolist()
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
