"""Shaping and measuring the link, on a virtual clock."""

from __future__ import annotations

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.link import PROBE_BYTES, LinkShape, ShapedLink, TokenBucket, measure_link
from wire_protocol.parts import LinkReport


class VirtualClock:
    """Time passes only by sleeping."""

    def __init__(self) -> None:
        self.now = 0.0

    def read(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


class VirtualServer:
    """Answers at once; the shape makes the time."""

    def __init__(self, link: ShapedLink) -> None:
        self._link = link

    async def probe_down(self, size_bytes: int) -> None:
        await self._link.asked()
        await self._link.received(size_bytes)

    async def probe_up(self, size_bytes: int) -> None:
        await self._link.sent(size_bytes)
        await self._link.asked()


def shaped(clock: VirtualClock, shape: LinkShape | None) -> ShapedLink:
    return ShapedLink(shape, clock=clock.read, sleep=clock.sleep)


@given(pieces=st.lists(st.integers(0, 10**6), max_size=50), rate=st.floats(1.0, 1e9))
def test_however_a_transfer_is_cut_it_takes_its_bytes_over_the_rate(
    pieces: list[int], rate: float
) -> None:
    bucket, now = TokenBucket(rate), 0.0
    for piece in pieces:
        now += bucket.take(piece, now)
    assert now == pytest.approx(sum(pieces) / rate, rel=1e-6, abs=1e-6)


def test_a_pause_is_not_credited_unless_a_burst_is_allowed() -> None:
    plain, bursty = TokenBucket(100.0), TokenBucket(100.0, burst_bytes=50)
    assert plain.take(100, 1000.0) == pytest.approx(1.0)
    assert bursty.take(100, 1000.0) == pytest.approx(0.5)
    assert bursty.take(100, 1000.5) == pytest.approx(1.0)


def test_two_transfers_share_one_link() -> None:
    bucket = TokenBucket(100.0)
    assert bucket.take(100, 0.0) == pytest.approx(1.0)
    assert bucket.take(100, 0.0) == pytest.approx(2.0)


def test_up_and_down_do_not_slow_each_other() -> None:
    clock = VirtualClock()
    link = shaped(clock, LinkShape(up_bytes_per_s=100.0, down_bytes_per_s=1000.0))

    async def transfer() -> None:
        await link.sent(100)
        await link.received(1000)

    anyio.run(transfer)
    assert clock.now == pytest.approx(2.0)


def test_no_shape_means_no_waiting() -> None:
    clock = VirtualClock()
    link = shaped(clock, None)

    async def transfer() -> None:
        await link.asked()
        await link.sent(10**12)
        await link.received(10**12)

    anyio.run(transfer)
    assert clock.now == 0.0


def test_the_measurement_finds_the_shape_again() -> None:
    clock = VirtualClock()
    link = shaped(clock, LinkShape(125_000.0, 1_000_000.0, round_trip_s=0.04))

    async def measure() -> LinkReport:
        return await measure_link(VirtualServer(link), clock=clock.read)

    report = anyio.run(measure)
    assert report.up_bytes_per_s == pytest.approx(125_000.0)
    assert report.down_bytes_per_s == pytest.approx(1_000_000.0)
    assert report.round_trip_s == pytest.approx(0.04)


def test_a_link_that_is_faster_than_the_clock_still_has_a_rate() -> None:
    clock = VirtualClock()
    server = VirtualServer(shaped(clock, None))

    async def measure() -> LinkReport:
        return await measure_link(server, clock=clock.read)

    report = anyio.run(measure)
    assert report.up_bytes_per_s >= PROBE_BYTES
    assert report.round_trip_s == 0.0


@pytest.mark.parametrize(("up", "down", "round_trip"), [(0, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_a_senseless_shape_cannot_be_built(up: float, down: float, round_trip: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        LinkShape(up, down, round_trip)
