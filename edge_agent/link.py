"""The path to the server: measure it, or imitate a slower one.

An emulated board sits on a fast network; ``ShapedLink`` paces its transfers so that they take as
long as on the board's own radio. ``measure_link`` goes through the same pacing, so a device reports
the link that it really has. Knows bytes and seconds; not what is transferred.
"""

from __future__ import annotations

import statistics
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

import anyio

from wire_protocol.parts import LinkReport

PROBE_BYTES = 256 * 1024
PROBE_ROUND_TRIPS = 3


@dataclass(frozen=True)
class LinkShape:
    """How slow a link is to be made.

    Raises:
        ValueError: a rate is not positive, or the round trip is negative.
    """

    up_bytes_per_s: float
    down_bytes_per_s: float
    round_trip_s: float = 0.0

    def __post_init__(self) -> None:
        if self.up_bytes_per_s <= 0 or self.down_bytes_per_s <= 0 or self.round_trip_s < 0:
            raise ValueError(f"rates must be positive and the round trip not negative: {self}")


class TokenBucket:
    """Paces one direction; pure. Transfers that share it share its rate.

    Args:
        bytes_per_s: the rate.
        burst_bytes: what may pass at once after a pause.
    """

    def __init__(self, bytes_per_s: float, *, burst_bytes: int = 0) -> None:
        self._bytes_per_s = bytes_per_s
        self._burst_s = burst_bytes / bytes_per_s
        self._paid_until = float("-inf")

    def take(self, size_bytes: int, now: float) -> float:
        """Account for bytes that pass now.

        Args:
            size_bytes: how many.
            now: seconds on the caller's monotonic clock.

        Returns:
            Seconds to wait until they are through.
        """
        self._paid_until = max(self._paid_until, now - self._burst_s)
        self._paid_until += size_bytes / self._bytes_per_s
        return max(0.0, self._paid_until - now)


@dataclass(frozen=True)
class ShapedLink:
    """Makes transfers wait as a slower link would.

    Args:
        shape: the link to imitate; None lets everything pass.
        clock: seconds, monotonic.
        sleep: waits that many seconds.
    """

    shape: LinkShape | None = None
    clock: Callable[[], float] = anyio.current_time
    sleep: Callable[[float], Awaitable[None]] = anyio.sleep
    _buckets: dict[str, TokenBucket] = field(default_factory=dict, repr=False)

    async def asked(self) -> None:
        """Wait one round trip: a request went out and its answer begins."""
        if self.shape is not None and self.shape.round_trip_s > 0:
            await self.sleep(self.shape.round_trip_s)

    async def sent(self, size_bytes: int) -> None:
        """Wait as long as these bytes take upwards."""
        if self.shape is not None:
            await self._pace("up", self.shape.up_bytes_per_s, size_bytes)

    async def received(self, size_bytes: int) -> None:
        """Wait as long as these bytes take downwards."""
        if self.shape is not None:
            await self._pace("down", self.shape.down_bytes_per_s, size_bytes)

    async def _pace(self, direction: str, bytes_per_s: float, size_bytes: int) -> None:
        bucket = self._buckets.setdefault(direction, TokenBucket(bytes_per_s))
        delay_s = bucket.take(size_bytes, self.clock())
        if delay_s > 0:
            await self.sleep(delay_s)


class ProbeClient(Protocol):
    """What can be measured: it moves bytes to and from the server's probe."""

    async def probe_down(self, size_bytes: int) -> None:
        """Fetch that many random bytes."""

    async def probe_up(self, size_bytes: int) -> None:
        """Send that many bytes."""


async def measure_link(
    client: ProbeClient, *, clock: Callable[[], float] = anyio.current_time
) -> LinkReport:
    """Measure the link with about half a megabyte.

    The round trip is the median of a few empty requests, and is taken off the transfer times.

    Raises:
        ServerUnavailable: the server does not answer.
        Refused: the server says no.
    """

    async def time_s(transfer: Callable[[int], Awaitable[None]], size_bytes: int) -> float:
        started = clock()
        await transfer(size_bytes)
        return clock() - started

    await client.probe_down(0)  # opens the connection, which is not part of a round trip
    round_trips = [await time_s(client.probe_down, 0) for _ in range(PROBE_ROUND_TRIPS)]
    round_trip_s = statistics.median(round_trips)
    down_s = await time_s(client.probe_down, PROBE_BYTES)
    up_s = await time_s(client.probe_up, PROBE_BYTES)
    return LinkReport(
        up_bytes_per_s=PROBE_BYTES / _transfer_s(up_s, round_trip_s),
        down_bytes_per_s=PROBE_BYTES / _transfer_s(down_s, round_trip_s),
        round_trip_s=round_trip_s,
    )


def _transfer_s(total_s: float, round_trip_s: float) -> float:
    # On a very fast link the difference is noise: at least a tenth was spent on the bytes.
    return max(total_s - round_trip_s, total_s / 10, 1e-6)
