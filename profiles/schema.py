"""The shape of a board profile and of a fleet profile.

Unknown keys are refused: a typo in a profile must stop us, not be ignored.
``python -m profiles.schema`` writes the same rules as JSON Schema for editors
and for checks outside Python. Knows nothing of files' places; see ``loader``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from profiles.errors import ProfileError

GIGA = 1e9

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,59}$")]
Text = Annotated[str, Field(min_length=1)]
Basis = Literal["measured", "derived", "estimated"]
Mbps = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]


class Strict(BaseModel):
    """Immutable; a key that the schema does not name is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Figure(Strict):
    """A number together with how we came to it.

    ``measured``: timed or metered on such a board; ``derived``: taken or
    computed from its maker's documents or from measurements; ``estimated``: a
    judgement that a benchmark on the board should replace.
    """

    value: float = Field(gt=0, allow_inf_nan=False)
    basis: Basis
    source: Text


class Cpu(Strict):
    """The processor at its highest sustained clock."""

    model: Text
    cores: int = Field(ge=1)
    clock_mhz: float = Field(gt=0)
    basis: Basis
    source: Text


class Gpu(Strict):
    """An integrated GPU that shares the board's memory."""

    model: Text
    cuda_cores: int = Field(ge=1)
    tensor_cores: int = Field(ge=0)
    clock_mhz: float = Field(gt=0, description="highest clock of any power mode below")
    compute_capability: str = Field(pattern=r"^\d+\.\d+$")
    basis: Basis
    source: Text


class PowerMode(Strict):
    """One entry of nvpmodel, or the only state of a board without modes."""

    name: Name
    watts: Figure | None = Field(description="power budget; null: the mode has no cap")
    relative_speed: Figure = Field(description="of the board's full training speed, at most 1")


class TypicalLink(Strict):
    """What the board's usual connection carries; the agent measures its own."""

    up_mbps: Figure
    down_mbps: Figure


class Software(Strict):
    """One operating system on which this board can run the agent.

    ``split trainer``: the agent and the trainer run under different Python
    versions. ``cpu tier``: trains on the CPU unless the owner supplies a torch
    build for its GPU.
    """

    os: Text
    jetpack: str | None
    l4t: str | None
    python: Text
    torch_source: Text
    supported: Literal["first-class", "split trainer", "cpu tier", "untested"]


class Detection(Strict):
    """How a running system shows that it is this board.

    The longest matching text decides; among boards that share a text, the
    smallest whose memory covers what the kernel reports.
    """

    device_tree_models: tuple[Text, ...] = ()
    machines: tuple[Text, ...] = Field(
        default=(), description="uname -m, for boards without a device tree that we know"
    )


class BoardProfile(Strict):
    """A kind of board: what is fixed about it and how fast it is expected to train.

    Peaks are ceilings. The one speed here, ``training_gflops``, is the sustained
    rate of LoRA fine-tuning at full speed, counting 2 floating-point operations
    per weight and token, forward or backward.
    """

    board_id: Name
    name: Text
    vendor: Text
    cpu: Cpu
    gpu: Gpu | None
    accelerator: Literal["cuda", "cpu"]
    memory_bytes: int = Field(gt=0, description="nominal size; the kernel reports a little less")
    memory_bandwidth_gb_s: Figure
    precision: Literal["fp32", "fp16", "bf16"]
    training_gflops: Figure
    relative_training_speed: Figure = Field(description="training_gflops over the jetson-tx2's")
    power_modes: tuple[PowerMode, ...] = Field(min_length=1)
    default_power_mode: Name
    link: TypicalLink
    software: tuple[Software, ...] = Field(min_length=1)
    sources: tuple[Text, ...] = Field(min_length=1)
    detection: Detection

    @model_validator(mode="after")
    def _modes_are_consistent(self) -> BoardProfile:
        names = [mode.name for mode in self.power_modes]
        if len(set(names)) != len(names):
            raise ValueError(f"two power modes share a name: {', '.join(names)}")
        if self.default_power_mode not in names:
            raise ValueError(f"default_power_mode is none of {', '.join(names)}")
        for mode in self.power_modes:
            if mode.relative_speed.value > 1:
                raise ValueError(f"power mode {mode.name} is faster than the board's full speed")
        if (self.accelerator == "cuda") != (self.gpu is not None):
            raise ValueError("accelerator cuda and a gpu entry belong together")
        return self

    def mode(self, power_mode: str | None) -> PowerMode:
        """Find a power mode by name; ``None`` means the board's default.

        NVIDIA writes the same mode as ``MODE_15W`` and ``15W``, so that prefix
        and the case do not matter.

        Raises:
            ProfileError: the board has no such mode; the text lists those it has.
        """
        wanted = _plain(power_mode or self.default_power_mode)
        for mode in self.power_modes:
            if _plain(mode.name) == wanted:
                return mode
        known = ", ".join(mode.name for mode in self.power_modes)
        raise ProfileError(f"{self.board_id} has no power mode {power_mode!r}; it has {known}")

    def flops_per_s(self, power_mode: str | None) -> float:
        """Sustained LoRA fine-tuning rate in a power mode (``None``: the default mode).

        Raises:
            ProfileError: the board has no such mode.
        """
        return self.training_gflops.value * GIGA * self.mode(power_mode).relative_speed.value


class MbpsRange(Strict):
    """A link speed that is drawn log-uniformly between two bounds, in Mb/s."""

    low: Mbps
    high: Mbps

    @model_validator(mode="after")
    def _is_a_range(self) -> MbpsRange:
        if self.low > self.high:
            raise ValueError(f"low {self.low:g} lies above high {self.high:g}")
        return self


def _kind_of_speed(value: Any) -> str:
    return "range" if isinstance(value, (dict, MbpsRange)) else "number"


Speed = Annotated[
    Annotated[Mbps, Tag("number")] | Annotated[MbpsRange, Tag("range")],
    Discriminator(_kind_of_speed),
]
"""Mb/s: a number, or a range to draw from. Told apart by form, so that errors name one key."""


class FleetLink(Strict):
    """The path between a device of the fleet and the server."""

    up_mbps: Speed
    down_mbps: Speed
    round_trip_ms: float = Field(ge=0, le=60_000)
    jitter: float = Field(ge=0, lt=1, description="share by which the speed varies per round")

    def up_mbps_at(self, fraction: float) -> float:
        """Upload speed at a quantile in 0..1 of its log-uniform range, in Mb/s."""
        return _quantile(self.up_mbps, fraction)

    def down_mbps_at(self, fraction: float) -> float:
        """Download speed at a quantile in 0..1 of its log-uniform range, in Mb/s."""
        return _quantile(self.down_mbps, fraction)


class FleetDevices(Strict):
    """``count`` alike devices of one board."""

    board: Name
    count: int = Field(ge=1, le=100_000)
    name_prefix: Name
    power_mode: Name | None = Field(
        description="null: drawn from all modes of the board, and redrawn"
    )
    link: FleetLink
    memory_limit_bytes: int | None = Field(default=None, gt=0)

    @property
    def device_ids(self) -> tuple[str, ...]:
        """The prefix itself for a single device, else numbered from 1."""
        if self.count == 1:
            return (self.name_prefix,)
        width = len(str(self.count))
        return tuple(f"{self.name_prefix}-{n:0{width}d}" for n in range(1, self.count + 1))


class FleetProfile(Strict):
    """A fleet to imitate or to simulate; its numbers are a scenario, not claims."""

    name: Name
    description: Text
    time_dilation: float = Field(
        default=1.0, gt=0, description="seconds here per second of the imitated boards"
    )
    mode_switch_rounds: int | None = Field(
        default=None, ge=1, description="rounds between redraws of power modes; null: never"
    )
    devices: tuple[FleetDevices, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _device_ids_are_unique(self) -> FleetProfile:
        seen: set[str] = set()
        for group in self.devices:
            for device_id in group.device_ids:
                if device_id in seen:
                    raise ValueError(f"two devices are called {device_id}")
                seen.add(device_id)
        return self

    @property
    def device_count(self) -> int:
        """Devices in the whole fleet."""
        return sum(group.count for group in self.devices)


def json_schemas() -> dict[str, str]:
    """File name to JSON Schema text, for every kind of profile."""
    models: dict[str, type[Strict]] = {
        "board.schema.json": BoardProfile,
        "fleet.schema.json": FleetProfile,
    }
    return {
        name: json.dumps(model.model_json_schema(), indent=2, sort_keys=True) + "\n"
        for name, model in models.items()
    }


def write_json_schemas(folder: Path) -> None:
    """Write every JSON Schema into a folder that exists."""
    for name, text in json_schemas().items():
        temporary = folder / f".{name}.part"
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / name)


def _plain(mode: str) -> str:
    return mode.upper().removeprefix("MODE_")


def _quantile(speed: float | MbpsRange, fraction: float) -> float:
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction {fraction} is outside 0..1")
    if isinstance(speed, MbpsRange):
        return float(speed.low * (speed.high / speed.low) ** fraction)
    return speed


if __name__ == "__main__":
    write_json_schemas(Path(__file__).with_name("schema"))
