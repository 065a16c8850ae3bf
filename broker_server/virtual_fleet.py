"""Devices that exist as numbers: speed, link, memory and absences, round by round.

Every trace comes from a generator of its own, seeded by the run's seed, a
purpose and the round, never by what a strategy did: runs with the same seed see
the same fleet. Pure; knows no clock, no training and no coordinator.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from broker_server.simulation_spec import Availability
from profiles.loader import load_board
from profiles.power import training_watts
from profiles.schema import FleetDevices, FleetProfile
from wire_protocol.lora import kept_layers
from wire_protocol.messages import Birth
from wire_protocol.model_family import ModelShape
from wire_protocol.parts import (
    CapabilityProfile,
    ComputeReport,
    DatasetReport,
    LinkReport,
)

BYTES_PER_MBIT = 125_000.0

USABLE_MEMORY = 0.75
"""Share of a board's memory that is left beside its system; our assumption."""

PROCESS_BYTES = 500_000_000
"""A Python process with torch, before any model; an estimate."""

KEPT_VALUES = 20
"""Hidden-sized float32 activations that a trained layer keeps per token; an estimate."""


@dataclass(frozen=True)
class Conditions:
    """What one device is like during one round.

    Attributes:
        flops_per_s: sustained training rate in the present power mode.
        watts: power while training in that mode; None where the board's profile tells none.
    """

    flops_per_s: float
    up_bytes_per_s: float
    down_bytes_per_s: float
    round_trip_s: float
    watts: float | None = None


@dataclass(frozen=True)
class ModelCost:
    """What a base model asks of any device.

    Attributes:
        digest: of the base model.
        file_bytes: its files, which it fills in memory too.
        work_scale: the arithmetic of a token is this many times the model's own.
    """

    shape: ModelShape
    digest: str
    file_bytes: int
    work_scale: float = 1.0

    def forward_s(self, tokens: float, flops_per_s: float) -> float:
        """Seconds of a forward pass through every layer.

        Two floating-point operations per weight and token, like the profiles.
        """
        return self.layers_s(tokens * self.shape.layer_count, flops_per_s)

    def layers_s(self, token_layers: float, flops_per_s: float) -> float:
        """Seconds of so many tokens times layers, forward."""
        return self._flops_per_token_layer * token_layers / flops_per_s

    def backward_s(self, tokens: float, depth: int, flops_per_s: float) -> float:
        """Seconds of a backward pass through the ``depth`` trained layers.

        As much per layer as a forward pass: frozen matrices need no gradient.
        """
        return self._flops_per_token_layer * tokens * depth / flops_per_s

    def peak_memory_bytes(self, tokens: int, depth: int, quantised: int = 0) -> int:
        """Memory of a step over ``tokens`` tokens; see ``KEPT_VALUES``."""
        kept = self.bytes_per_token * (1 + kept_layers(depth, quantised) * KEPT_VALUES)
        return int(PROCESS_BYTES + self.file_bytes + tokens * kept)

    @property
    def _flops_per_token_layer(self) -> float:
        return 2.0 * self.work_scale * self.shape.weights_per_layer

    @property
    def bytes_per_token(self) -> float:
        """One hidden state in float32."""
        return 4.0 * self.shape.hidden_size


@dataclass(frozen=True)
class VirtualDevice:
    """One device of the fleet profile."""

    device_id: str
    group: FleetDevices

    @property
    def memory_budget_bytes(self) -> int:
        """What training may use."""
        if self.group.memory_limit_bytes is not None:
            return self.group.memory_limit_bytes
        return int(USABLE_MEMORY * load_board(self.group.board).memory_bytes)


class VirtualFleet:
    """Every device of a profile, with its traces.

    Args:
        profile: boards, power modes, links.
        seed: of the run.
        link_jitter: replaces the profile's, if given.
        link_scale: every link has this many times the profile's bandwidth.
        availability: who drops out, who is away and who is too hot.
    """

    def __init__(
        self,
        profile: FleetProfile,
        *,
        seed: int,
        link_jitter: float | None = None,
        link_scale: float = 1.0,
        availability: Availability | None = None,
    ) -> None:
        self.devices: Mapping[str, VirtualDevice] = {
            device_id: VirtualDevice(device_id, group)
            for group in profile.devices
            for device_id in group.device_ids
        }
        self._index = {name: index for index, name in enumerate(self.devices)}
        self._profile = profile
        self._seed = seed
        self._jitter = link_jitter
        self._bytes_per_s = BYTES_PER_MBIT * link_scale
        self._availability = availability or Availability()

    def conditions(self, device_id: str, round_number: int) -> Conditions:
        """Speed and link of a device in a round (from 1)."""
        group = self.devices[device_id].group
        distance = self._draw("distance")[self._index[device_id]]
        jitter = group.link.jitter if self._jitter is None else self._jitter
        up, down = (
            1.0 + jitter * (2.0 * self._draw(way, round_number)[self._index[device_id]] - 1.0)
            for way in ("up", "down")
        )
        board, power_mode = load_board(group.board), self.power_mode(device_id, round_number)
        return Conditions(
            flops_per_s=board.flops_per_s(power_mode) * self._speed(device_id, round_number),
            up_bytes_per_s=group.link.up_mbps_at(distance) * self._bytes_per_s * up,
            down_bytes_per_s=group.link.down_mbps_at(distance) * self._bytes_per_s * down,
            round_trip_s=group.link.round_trip_ms / 1000.0,
            watts=training_watts(board, power_mode),
        )

    def power_mode(self, device_id: str, round_number: int) -> str:
        """The power mode of a device in a round: given, or drawn from the board's."""
        group = self.devices[device_id].group
        if group.power_mode is not None:
            return group.power_mode
        modes = load_board(group.board).power_modes
        every = self._profile.mode_switch_rounds
        period = (round_number - 1) // every if every else 0
        drawn = self._draw("power mode", period)[self._index[device_id]]
        return modes[int(drawn * len(modes))].name

    def _speed(self, device_id: str, round_number: int) -> float:
        """What heat leaves of a device's speed in a round."""
        options = self._availability
        if not options.hot:
            return 1.0
        drawn = self._draw("heat", (round_number - 1) // options.hot_rounds)
        return options.hot_speed if drawn[self._index[device_id]] < options.hot else 1.0

    def present(self, round_number: int) -> list[str]:
        """Devices that are not away in a round; never nobody."""
        options = self._availability
        period = (round_number - 1) // options.absent_rounds
        drawn = self._draw("absence", period)
        here = [name for name, value in zip(self.devices, drawn, strict=True)
                if value >= options.absent]  # fmt: skip
        return here or [list(self.devices)[int(np.argmax(drawn))]]

    def lost_after(self, device_id: str, round_number: int, attempt: int) -> float | None:
        """Share of its completion time after which a device is lost; None: it stays."""
        index = self._index[device_id]
        if self._draw("dropout", round_number, attempt)[index] >= self._availability.dropout:
            return None
        return float(self._draw("moment of loss", round_number, attempt)[index])

    def birth(self, device_id: str, cost: ModelCost, data: tuple[str, DatasetReport]) -> Birth:
        """How the device introduces itself: benchmarked in the first round's conditions.

        Args:
            device_id: one of the fleet.
            cost: the run's base model.
            data: name and size of its local dataset.
        """
        device = self.devices[device_id]
        now = self.conditions(device_id, 1)
        board = load_board(device.group.board)
        name, report = data
        capability = CapabilityProfile(
            fingerprint=hashlib.sha256(device_id.encode()).hexdigest(),
            memory_budget_bytes=device.memory_budget_bytes,
            disk_free_bytes=2 * cost.file_bytes,
            cpu_count=board.cpu.cores,
            accelerator=board.accelerator,
            link=LinkReport(
                up_bytes_per_s=now.up_bytes_per_s,
                down_bytes_per_s=now.down_bytes_per_s,
                round_trip_s=now.round_trip_s,
            ),
            compute=ComputeReport(
                model_digest=cost.digest,
                forward_seconds_per_token_layer=cost.forward_s(1, now.flops_per_s)
                / cost.shape.layer_count,
                backward_seconds_per_token_layer=cost.backward_s(1, 1, now.flops_per_s),
                memory_base_bytes=PROCESS_BYTES + cost.file_bytes,
                memory_bytes_per_token=cost.bytes_per_token,
                memory_bytes_per_token_layer=cost.bytes_per_token * KEPT_VALUES,
            ),
            power_mode=self.power_mode(device_id, 1),
        )
        return Birth(
            boot_id=device_id,
            agent_version="virtual",
            board=board.board_id,
            emulated=board.board_id,
            capability=capability,
            datasets={name: report},
            heartbeat_s=3600.0,
        )

    def _draw(self, purpose: str, *numbers: int) -> NDArray[np.float64]:
        """One uniform number in [0, 1) per device; equal arguments give equal numbers."""
        return np.random.default_rng(_entropy(self._seed, purpose, numbers)).random(
            len(self.devices)
        )


def generator_for(seed: int, purpose: str) -> np.random.Generator:
    """A generator of its own for one purpose of a run."""
    return np.random.default_rng(_entropy(seed, purpose, ()))


def _entropy(seed: int, purpose: str, numbers: Iterable[int]) -> list[int]:
    name = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:4], "big")
    return [seed, name, *numbers]
