"""Two thousand devices on one server: nothing is lost, it answers, and it does not grow.

The devices speak the real protocol over a real mosquitto and upload real blobs; only their boards
are missing. ``LEGEND_LOAD_S`` sets how long the long form lasts.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx
import pytest

from edge_agent.blobs import BlobClient
from tests.support.light_device import LightDevice
from tests.support.light_fleet import FleetPlan, LightFleet
from tests.support.light_site import LightSite, light_site
from tests.support.messages import a_manifest
from tests.support.site import Json
from wire_protocol.model_family import model_shape
from wire_protocol.topics import Channel

pytestmark = [pytest.mark.e2e, pytest.mark.train]

CONTROL_P99_S = 0.25
"""The requirement; checked by the long form, which has the machine to itself."""

GROWTH_BYTES_PER_ROUND = 256 * 1024
"""A server that kept one update of every round would grow forty times as fast."""

GROWTH_BYTES = 6 * 2**20
"""Most of it that the second half of a run may add up to, however many rounds that has."""

LEAST_ROUNDS = 50
"""In that half; a few rounds say more about the warming up."""


@dataclass(frozen=True)
class Load:
    """How much, and for how long.

    Attributes:
        seconds: rounds go on for so long; None does ``rounds`` of them.
    """

    devices: int
    at_once: int
    heartbeat_s: float
    hidden: int
    layers: int
    rounds: int = 100_000
    seconds: float | None = None


@dataclass
class Seen:
    """What was measured while the rounds went on."""

    round_trips_s: list[float] = field(default_factory=list)
    rss_bytes: list[int] = field(default_factory=list)


@contextmanager
def few_open_files() -> Iterator[None]:
    """As most systems start a program: the server must ask for more by itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def watch(site: LightSite, load: Load, run_id: str, seen: Seen) -> None:
    """Ask and measure until the run has ended, or is cancelled because time is up."""
    over_at = None if load.seconds is None else time.monotonic() + load.seconds
    rounds = -1
    async with BlobClient(site.url) as blobs, httpx.AsyncClient(base_url=site.url) as http:
        prober = LightDevice("prober", site.for_devices(blobs))
        # Without the run's data: it is never chosen.
        await prober.start(prober.birth().model_copy(update={"datasets": {}}))
        for number in range(10**9):
            stale = a_manifest(run_id="none")
            began = time.monotonic()
            ack = await prober.asked(Channel.UPDATE, stale, f"probe-{number}")
            seen.round_trips_s.append(time.monotonic() - began)
            assert ack.status == "rejected"
            if number % 10 == 0:
                line = next(
                    one
                    for one in (await http.get("/v1/runs")).json()["runs"]
                    if one["run_id"] == run_id
                )
                if line["round_number"] > rounds:
                    rounds = line["round_number"]
                    seen.rss_bytes.append(site.server_rss_bytes())
                if line["status"] not in ("queued", "running"):
                    break
                if over_at is not None and time.monotonic() > over_at:
                    await http.post(f"/v1/runs/{run_id}/cancel")
                    over_at = None
            await asyncio.sleep(0.02)
        await prober.stop()


def percentile(values: list[float], share: float) -> float:
    """The value that this share of the values does not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def growth_per_round(rss_bytes: list[int]) -> float:
    """Slope of a straight line through the second half: the first is warming up."""
    half = rss_bytes[len(rss_bytes) // 2 :]
    if len(half) < 3:
        return 0.0
    return statistics.linear_regression(range(len(half)), half).slope


def figures_of(load: Load, run: Json, seen: Seen, counted: Json) -> Json:
    """What goes into the experiments' page."""
    members = [device for one in run["rounds"] for device in one["devices"]]
    durations_s = [one["duration_s"] for one in run["rounds"]]
    trips = seen.round_trips_s
    shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
    rss_mib = [round(rss / 2**20, 1) for rss in seen.rss_bytes]
    return {
        "devices": load.devices,
        "at_once": load.at_once,
        "rounds": len(run["rounds"]),
        "connect_s": round(counted["connect_s"], 2),
        "updates": len(members),
        "update_bytes": max((one["bytes_up"] for one in members), default=0),
        "resends": counted["resends"],
        "round_s": round(statistics.median(durations_s), 2) if durations_s else None,
        "control_ms": {name: round(1e3 * percentile(trips, at), 1) for name, at in shares.items()},
        "control_count": len(trips),
        "update_ack_ms_p99": round(1e3 * percentile(counted["ack_delays_s"], 0.99), 1),
        "rss_mib": rss_mib[:: max(1, len(rss_mib) // 12)],
        "growth_kib_per_round": round(growth_per_round(seen.rss_bytes) / 1024, 1),
        "load_average": os.getloadavg(),
    }


SHORT = Load(devices=200, at_once=20, heartbeat_s=5.0, hidden=32, layers=2, rounds=3)
LONG = Load(
    devices=2000,
    at_once=200,
    heartbeat_s=30.0,
    hidden=256,
    layers=6,
    seconds=float(os.environ.get("LEGEND_LOAD_S", "180")),
)


@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize(
    "load",
    [pytest.param(SHORT, id="short"), pytest.param(LONG, id="long", marks=pytest.mark.trust)],
)
def test_a_fleet_at_full_load_loses_nothing(
    load: Load, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    seen = Seen()
    with few_open_files(), light_site(tmp_path, hidden=load.hidden, layers=load.layers) as site:
        config = json.loads((tmp_path / "tiny" / "config.json").read_text())
        answer = httpx.get(f"{site.url}/v1/join?device_id=light").json()
        plan = FleetPlan(
            url=site.url,
            broker_url=answer["broker_url"],
            folder=str(tmp_path / "fleet"),
            devices=load.devices,
            at_once=load.at_once,
            heartbeat_s=load.heartbeat_s,
            model_digest=site.model_digest,
            shape=asdict(model_shape(config)),
        )
        fleet = LightFleet(plan)
        try:
            connected = fleet.wait_until_connected()
            site.real.until(
                lambda: (
                    httpx.get(f"{site.url}/v1/health", timeout=30).json()["devices_online"]
                    == load.devices
                ),
                "every device is in the registry",
            )
            run_id = site.launch(
                rounds=load.rounds, devices_per_round=load.at_once, local_steps=1, seed=3
            )
            asyncio.run(watch(site, load, run_id, seen))
            run = site.real.run(run_id)
            health = httpx.get(f"{site.url}/v1/health").json()
            counted = fleet.finish()
        finally:
            fleet.close()
        log = site.real.log("server")
    figures = figures_of(load, run, seen, {**connected, **counted})
    print(json.dumps(figures))  # noqa: T201 - the figures for the experiments' page
    record_property("figures", figures)

    assert run["rounds"], run["reason"]
    assert all(len(one["devices"]) == load.at_once for one in run["rounds"])
    members = [device for one in run["rounds"] for device in one["devices"]]
    assert [one for one in members if one["status"] != "updated"] == []
    assert counted["acked"] >= len(members)
    assert all(why.startswith("stale") for why in counted["rejected"]), counted["rejected"][:5]
    assert health["dropped_messages"] == {}
    assert health["devices_online"] == load.devices + 1, "a device was taken for lost"
    assert "Traceback" not in log
    if load is LONG:
        assert percentile(seen.round_trips_s, 0.99) < CONTROL_P99_S
        slope = growth_per_round(seen.rss_bytes)
        assert slope < GROWTH_BYTES_PER_ROUND
        half = len(seen.rss_bytes) / 2
        assert half < LEAST_ROUNDS or slope * half < GROWTH_BYTES
