"""Devices that send something else than what they learned, for experiments.

Which of a simulated fleet's devices attack, and how. What they send takes the
place of a real update's bytes, after real training, so that times stay as they
are. Pure: updates in, updates out; seeded like every other trace.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors.numpy import save

from wire_protocol.tensors import decode

AttackKind = Literal["scaled", "flipped", "garbage", "nan", "bytes"]

Tensors = dict[str, NDArray[np.float32]]


class Attackers(BaseModel):
    """Who attacks, and how.

    Attributes:
        kind: ``scaled`` sends ``factor`` times what was learned; ``flipped`` the
            same in the opposite direction; ``garbage`` normal noise with standard
            deviation ``factor``; ``nan`` values that are not numbers; ``bytes``
            something that is no adapter at all.
        share: of the fleet; which devices is drawn from the run's seed.
        devices: their names, in place of ``share``.
        factor: how much; 30 for updates, 1 for garbage unless given.
        claimed_examples: how many examples they say they have; None for the truth.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: AttackKind
    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    devices: tuple[str, ...] = ()
    factor: float | None = Field(default=None, gt=0, le=1e6, allow_inf_nan=False)
    claimed_examples: int | None = Field(default=None, ge=1, le=2**53)

    @model_validator(mode="after")
    def _one_way_to_name_them(self) -> Attackers:
        if (self.share is None) == (not self.devices):
            raise ValueError("give either share or devices")
        return self

    def among(self, device_ids: Sequence[str], generator: np.random.Generator) -> frozenset[str]:
        """The devices that attack.

        Args:
            device_ids: of the fleet.
            generator: draws them where only a share is given.

        Raises:
            ValueError: a named device is not in the fleet.
        """
        if self.share is None:
            if unknown := sorted(set(self.devices) - set(device_ids)):
                raise ValueError(f"attackers: the fleet has no device {unknown[0]!r}")
            return frozenset(self.devices)
        count = max(1, round(self.share * len(device_ids)))
        drawn = generator.choice(len(device_ids), size=count, replace=False)
        return frozenset(device_ids[int(index)] for index in drawn)

    def poisoned(self, update: bytes, generator: np.random.Generator) -> bytes:
        """What an attacker sends in place of an update.

        Args:
            update: what it learned, encoded.
            generator: of noise.
        """
        if self.kind == "bytes":
            return generator.bytes(len(update))
        change = _CHANGES[self.kind]
        values = {
            name: change(tensor, self.factor, generator)
            for name, tensor in sorted(decode(update).items())
        }
        # Not ``encode``: it refuses what attackers send.
        return bytes(save(values, metadata={"codec": "fp32"}))


_Change = Callable[[NDArray[np.float32], float | None, np.random.Generator], NDArray[np.float32]]


def _scaled(
    tensor: NDArray[np.float32], factor: float | None, _generator: np.random.Generator
) -> NDArray[np.float32]:
    return tensor * np.float32(factor or 30.0)


def _flipped(
    tensor: NDArray[np.float32], factor: float | None, generator: np.random.Generator
) -> NDArray[np.float32]:
    return -_scaled(tensor, factor, generator)


def _garbage(
    tensor: NDArray[np.float32], factor: float | None, generator: np.random.Generator
) -> NDArray[np.float32]:
    return generator.normal(0.0, factor or 1.0, tensor.shape).astype(np.float32)


def _nan(
    tensor: NDArray[np.float32], _factor: float | None, _generator: np.random.Generator
) -> NDArray[np.float32]:
    return np.full_like(tensor, np.nan)


_CHANGES: Mapping[str, _Change] = {
    "scaled": _scaled,
    "flipped": _flipped,
    "garbage": _garbage,
    "nan": _nan,
}
