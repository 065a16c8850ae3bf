"""Splitting one labelled dataset over devices that do not resemble each other.

Pure NumPy: labels in, row numbers out. Randomness comes from the generator
that is passed in, so a seed names a split.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wire_protocol.errors import ConfigError

Rows = NDArray[np.intp]
"""Row numbers of one device, ascending."""

_SMALLEST_CONCENTRATION = 1e-6


@dataclass(frozen=True)
class PartitionOptions:
    """How unlike each other the devices are.

    Attributes:
        devices: how many parts.
        alpha: concentration of the label mix; 0.1 gives devices that see one
            or two labels, 1 a strong skew, 100 nearly the same mix everywhere.
        quantity_alpha: the same for the number of examples; None means that
            every device expects the same number.
        minimum: examples that every device gets at least.

    Raises:
        ConfigError: a value is out of range.
    """

    devices: int
    alpha: float
    quantity_alpha: float | None = None
    minimum: int = 1

    def __post_init__(self) -> None:
        if self.devices < 1 or self.minimum < 0:
            raise ConfigError("a split needs at least one device and a minimum of 0 or more")
        for value in (self.alpha, self.quantity_alpha):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"alpha must be a positive number, not {value}")


def split_by_label(
    labels: Sequence[str], options: PartitionOptions, *, generator: np.random.Generator
) -> list[Rows]:
    """Split rows so that each device gets its own label mix.

    The rows of each label are cut at shares drawn from a Dirichlet
    distribution whose mean is the size that each device should have.

    Args:
        labels: the label of every row.
        options: how unlike each other the devices are.
        generator: source of randomness; two calls with equal state are equal.

    Returns:
        One array per device; together they hold every row exactly once.

    Raises:
        ConfigError: fewer rows than ``devices * minimum``.

    Source: Hsu et al., arXiv:1909.06335, non-identical data by Dirichlet label skew.
    """
    needed = options.devices * options.minimum
    if len(labels) < needed:
        raise ConfigError(
            f"{len(labels)} examples cannot give {options.devices} devices {options.minimum} each"
        )
    sizes = _expected_sizes(options, generator)
    concentration = np.maximum(options.alpha * options.devices * sizes, _SMALLEST_CONCENTRATION)
    parts: list[list[int]] = [[] for _ in range(options.devices)]
    values = np.asarray(labels, dtype=np.str_)
    for label in np.unique(values):
        rows = generator.permutation(np.flatnonzero(values == label))
        shares = generator.dirichlet(concentration)
        cuts = np.rint(np.cumsum(shares)[:-1] * len(rows)).astype(np.intp)
        for part, piece in zip(parts, np.split(rows, cuts), strict=True):
            part.extend(piece.tolist())
    _top_up(parts, options.minimum, generator=generator)
    return [np.sort(np.asarray(part, dtype=np.intp)) for part in parts]


def _expected_sizes(
    options: PartitionOptions, generator: np.random.Generator
) -> NDArray[np.float64]:
    """Expected share of all rows per device; sums to 1."""
    if options.quantity_alpha is None:
        return np.full(options.devices, 1.0 / options.devices)
    return generator.dirichlet(np.full(options.devices, options.quantity_alpha))


def _top_up(parts: list[list[int]], minimum: int, *, generator: np.random.Generator) -> None:
    """Move single rows from the largest device to those below the minimum."""
    for part in parts:
        while len(part) < minimum:
            largest = max(parts, key=len)
            part.append(largest.pop(int(generator.integers(len(largest)))))
