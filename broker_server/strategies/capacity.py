"""Capacity estimation: moving averages of what devices measured (eq. 3).

Knows numbers; knows neither messages nor clocks: durations come in as values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from broker_server.strategies.strategy import DeviceCapacity

RESET_FACTOR = 2.0
"""A measurement further off than this is a new power mode, not noise."""

DEFAULT_RHO = 0.7

FASTER_MAX = 10.0
"""Times faster than its board's full speed that a device is believed to be."""

SLOWER_MAX = 100.0
"""Times slower; much, because power modes, heat and imitated boards all slow down."""

MEMORY_MAX = 1.25
"""Times its board's memory that a device may claim; variants of a board differ by less."""

OBSERVED_SLACK_S = 30.0
"""Resends and a lost connection make a round longer than its work, by about this."""

OBSERVED_FACTOR = 10.0
"""A round may have taken this many times what the device says, beside the slack."""

ROUNDING = 1.1
"""Clocks of two machines over one round differ by less."""


@dataclass(frozen=True)
class CapacityEstimate:
    """What is known of one device; None where nothing was measured.

    The same type holds one measurement and the average of many.
    Units as in ``DeviceCapacity``.
    """

    forward_s_per_token_layer: float | None = None
    backward_s_per_token_layer: float | None = None
    up_bytes_per_s: float | None = None
    down_bytes_per_s: float | None = None
    round_trip_s: float | None = None
    memory_base_bytes: float | None = None
    memory_bytes_per_token: float | None = None
    memory_bytes_per_token_layer: float | None = None
    training_watts: float | None = None


@dataclass(frozen=True)
class Observation:
    """An estimate after a measurement.

    Attributes:
        ignored: names of measured values that were not positive and finite.
    """

    estimate: CapacityEstimate
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class RoundTimes:
    """What a device timed while it did an assignment.

    Attributes:
        tokens: tokens of all local steps together.
        depth: trained layers.
        downloaded_bytes: 0 when the adapter was already there.
        forward_token_layers: pairs that the forward passes computed; None for
            every token in every layer.
        energy_j: that training drew; None where the device cannot tell.
    """

    tokens: int
    layer_count: int
    depth: int
    forward_s: float
    backward_s: float
    downloaded_bytes: int
    download_s: float
    uploaded_bytes: int
    upload_s: float
    forward_token_layers: int | None = None
    energy_j: float | None = None

    def measurement(self) -> CapacityEstimate:
        """The rates in these times; None for what did not happen.

        Source: arXiv:2412.20004, capacity estimation; per token by us, so
        that estimates hold for any batch size and sequence length.
        """
        forward = self.forward_token_layers or self.tokens * self.layer_count
        return CapacityEstimate(
            forward_s_per_token_layer=_ratio(self.forward_s, forward),
            backward_s_per_token_layer=_ratio(self.backward_s, self.tokens * self.depth),
            up_bytes_per_s=_ratio(self.uploaded_bytes, self.upload_s),
            down_bytes_per_s=_ratio(self.downloaded_bytes, self.download_s),
            training_watts=_ratio(self.energy_j or 0.0, self.forward_s + self.backward_s),
        )


@dataclass(frozen=True)
class BoardBounds:
    """What the board of a device can do, by its profile.

    Attributes:
        s_per_token_layer: at full speed, forward or backward.
        memory_bytes: all there is.
    """

    s_per_token_layer: float
    memory_bytes: float


def believed(
    capacity: DeviceCapacity, board: BoardBounds
) -> tuple[DeviceCapacity, tuple[str, ...]]:
    """Hold what a device says of itself against its board.

    Whoever claims to be much slower would set the pace of all; whoever claims to be
    much faster would be given what it cannot do.

    Args:
        capacity: as reported, or averaged over rounds.
        board: of the device; for boards whose speed is known.

    Returns:
        The capacity with the nearest believable value where one was not, and one
        line per such value.
    """
    low, high = board.s_per_token_layer / FASTER_MAX, board.s_per_token_layer * SLOWER_MAX
    moved: dict[str, float] = {}
    doubts: list[str] = []
    for name in ("forward_s_per_token_layer", "backward_s_per_token_layer"):
        value = getattr(capacity, name)
        if low <= value <= high:
            continue
        moved[name] = min(max(value, low), high)
        factor = board.s_per_token_layer / value
        words = f"{factor:.0f} times faster" if factor > 1 else f"{1 / factor:.0f} times slower"
        doubts.append(f"its {name.partition('_')[0]} pass is {words} than its board")
    if capacity.memory_budget_bytes > board.memory_bytes * MEMORY_MAX:
        factor = capacity.memory_budget_bytes / board.memory_bytes
        moved["memory_budget_bytes"] = board.memory_bytes
        doubts.append(f"it claims {factor:.0f} times the memory of its board")
    return replace(capacity, **moved), tuple(doubts)  # type: ignore[arg-type]


def scale_to_observed(claimed_s: float, observed_s: float) -> float:
    """What to multiply a device's times of a round by, so that they can be true.

    Args:
        claimed_s: download, training and upload together, as the device timed them.
        observed_s: from sending the assignment to the update's arrival, at the server.

    Returns:
        1 where they can be: shorter than what was observed, and not by an order of
        magnitude beside the slack that resends and lost connections need.
    """
    if not math.isfinite(observed_s) or observed_s <= 0 or claimed_s <= 0:
        return 1.0
    too_long = claimed_s > observed_s * ROUNDING + 1.0
    too_short = observed_s > claimed_s * OBSERVED_FACTOR + OBSERVED_SLACK_S
    return observed_s / claimed_s if too_long or too_short else 1.0


def observe(
    estimate: CapacityEstimate | None,
    measurement: CapacityEstimate,
    *,
    rho: float = DEFAULT_RHO,
) -> Observation:
    """Move an estimate toward a measurement: x = rho x + (1 - rho) measured.

    A value more than ``RESET_FACTOR`` times off replaces the estimate, because
    a board that changed its power mode has forgotten its past.

    Args:
        estimate: so far; None for a new device.
        measurement: what it measured now; None fields leave the estimate.
        rho: weight of the past, 0 to below 1.

    Source: arXiv:2412.20004, capacity estimation (eq. 3).
    """
    known = estimate or CapacityEstimate()
    moved: dict[str, float] = {}
    ignored: list[str] = []
    for field in fields(CapacityEstimate):
        measured = getattr(measurement, field.name)
        if measured is None:
            continue
        if not math.isfinite(measured) or measured <= 0:
            ignored.append(field.name)
            continue
        moved[field.name] = _moved(getattr(known, field.name), measured, rho)
    return Observation(replace(known, **moved), tuple(ignored))


def device_capacity(
    estimate: CapacityEstimate,
    *,
    device_id: str,
    memory_budget_bytes: float,
    examples: int,
) -> DeviceCapacity | None:
    """The estimate as the strategies read it; None while a part is unknown.

    A missing round trip counts as none and missing activation sizes as
    nothing, because a measurement of zero is ignored by ``observe``.
    """
    forward = estimate.forward_s_per_token_layer
    backward = estimate.backward_s_per_token_layer
    up, down = estimate.up_bytes_per_s, estimate.down_bytes_per_s
    if forward is None or backward is None or up is None or down is None:
        return None
    return DeviceCapacity(
        device_id=device_id,
        forward_s_per_token_layer=forward,
        backward_s_per_token_layer=backward,
        up_bytes_per_s=up,
        down_bytes_per_s=down,
        round_trip_s=estimate.round_trip_s or 0.0,
        memory_base_bytes=estimate.memory_base_bytes or 0.0,
        memory_bytes_per_token=estimate.memory_bytes_per_token or 0.0,
        memory_bytes_per_token_layer=estimate.memory_bytes_per_token_layer or 0.0,
        memory_budget_bytes=memory_budget_bytes,
        examples=examples,
        training_watts=estimate.training_watts or 0.0,
    )


def _moved(known: float | None, measured: float, rho: float) -> float:
    if known is None or not known / RESET_FACTOR <= measured <= known * RESET_FACTOR:
        return measured
    # Written as a step from the estimate, so that rounding keeps equal values equal.
    return known + (1.0 - rho) * (measured - known)


def _ratio(amount: float, per: float) -> float | None:
    """None when one of the two did not happen; the rest is ``observe``'s to judge."""
    return amount / per if amount and per else None
