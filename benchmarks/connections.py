"""What connected devices cost the server: memory, and the share of a core that heartbeats take.

    python benchmarks/connections.py [--quick] [--json FILE] [--devices 100,500,2000]
        [--heartbeat-s 30] [--seconds N]

A real server with mosquitto, and light devices in one more process: real connections, births and
heartbeats of the protocol, without boards behind them. Every size of fleet meets a fresh server,
which is watched with its broker for a while once everybody is online. Nothing is trained. Ten
thousand devices: --devices 10000, given the files and memory for it (`ulimit -n`).

``server_kb_per_device`` is the slope of the server's memory over devices. CPU shares are of one
core. --quick connects 100 and 400 devices with a heartbeat every 5 s, in under a minute.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks._machine import Usage, load, machine, tree_of, usage_of
from tests.support.light_fleet import FleetPlan, LightFleet
from tests.support.light_site import LightSite, light_site
from wire_protocol.model_family import model_shape

SETTLE_S = 3.0
"""Between the last birth and the first look."""

Row = dict[str, Any]


def main() -> int:
    """Measure, print and, if asked, write JSON."""
    options = arguments()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="connections-") as text:
        for count in options.devices:
            # A server of its own: memory that an earlier step took would not be given back.
            folder = Path(text) / str(count)
            folder.mkdir()
            with light_site(folder) as site:
                rows.append(measured(site, count, options))
            print(f"{count} devices: {rows[-1]['server_mb']:.0f} MB", file=sys.stderr, flush=True)
    result = {
        "benchmark": "connections",
        "machine": machine(),
        "broker": "mosquitto",
        "heartbeat_s": options.heartbeat_s,
        "rows": rows,
        "summary": summary(rows),
    }
    Console(width=110).print(table(rows, caption=str(result["machine"])))
    Console(width=110).print_json(data=result["summary"])
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def measured(site: LightSite, count: int, options: argparse.Namespace) -> Row:
    """Connect so many devices to a fresh server and watch it."""
    idle = site.server_rss_bytes()
    with ExitStack() as stack:
        fleet = LightFleet(plan(site, count, options.heartbeat_s))
        stack.callback(fleet.close)
        connected = fleet.wait_until_connected()
        site.real.until(lambda: online(site) >= count, f"{count} devices are online")
        time.sleep(SETTLE_S)
        # Whatever a beat makes the server read or write happens at least twice in this time.
        seconds = options.seconds or max(10.0, 2 * options.heartbeat_s)
        server_before, broker_before = usages(site)
        began = time.monotonic()
        time.sleep(seconds)
        spent_s = time.monotonic() - began
        server, broker = usages(site)
        lost = count - online(site)
        fleet.finish()
    return {
        "devices": count,
        "connect_s": connected["connect_s"],
        "lost": lost,
        "server_idle_mb": idle / 1e6,
        "server_mb": server.rss_bytes / 1e6,
        "broker_mb": broker.rss_bytes / 1e6,
        "server_cpu_share": (server.cpu_s - server_before.cpu_s) / spent_s,
        "broker_cpu_share": (broker.cpu_s - broker_before.cpu_s) / spent_s,
        "heartbeats_per_s": count / options.heartbeat_s,
        "seconds": spent_s,
        "load": load(),
    }


def plan(site: LightSite, count: int, heartbeat_s: float) -> FleetPlan:
    """What the devices' process is told."""
    with site.real.api() as api:
        digest = str(api.models()[0]["digest"])
    config = json.loads((site.real.folder / "tiny" / "config.json").read_text(encoding="utf-8"))
    login = site.login
    return FleetPlan(
        url=site.url,
        broker_url=f"mqtt://{login.username}:{login.password}@{login.host}:{login.port}",
        folder=str(site.real.folder / "updates"),
        devices=count,
        at_once=1,
        heartbeat_s=heartbeat_s,
        model_digest=digest,
        shape=asdict(model_shape(config)),
    )


def online(site: LightSite) -> int:
    """Devices that the server believes to be there."""
    return sum(device["state"] == "online" for device in site.real.devices().values())


def usages(site: LightSite) -> tuple[Usage, Usage]:
    """What the server has taken so far, and its broker."""
    everything = tree_of(site.server_pid)
    broker = [pid for pid in everything if program(pid) == "mosquitto"]
    return usage_of([site.server_pid]), usage_of(broker)


def program(pid: int) -> str:
    """What a process runs; empty when it has ended."""
    try:
        first = Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")[0]
    except OSError:
        return ""
    return Path(first.decode(errors="replace")).name


def summary(rows: Sequence[Row]) -> Row:
    """The figures that a claim would quote."""
    last = max(rows, key=lambda row: int(row["devices"]))
    return {
        "devices": last["devices"],
        "server_mb": last["server_mb"],
        "server_cpu_share": last["server_cpu_share"],
        "server_cpu_ms_per_heartbeat": 1000 * last["server_cpu_share"] / last["heartbeats_per_s"],
        "server_kb_per_device": slope(rows, "server_mb"),
        "broker_kb_per_device": slope(rows, "broker_mb"),
        "devices_lost": sum(row["lost"] for row in rows),
        "highest_load": max(row["load"] for row in rows),
    }


def slope(rows: Sequence[Row], key: str) -> float | None:
    """Kilobytes a device, over at least two sizes of fleet."""
    if len(rows) < 2:
        return None
    counts = [float(row["devices"]) for row in rows]
    return float(np.polyfit(counts, [1000 * float(row[key]) for row in rows], 1)[0])


def table(rows: Sequence[Row], *, caption: str) -> Table:
    """For people."""
    made = Table(title="Connected devices", caption=caption)
    for name in ("devices", "connect s", "lost", "beats/s", "server MB", "server CPU", "broker MB",
                 "broker CPU", "load"):  # fmt: skip
        made.add_column(name, justify="right")
    for row in rows:
        made.add_row(
            str(row["devices"]),
            f"{row['connect_s']:.1f}",
            str(row["lost"]),
            f"{row['heartbeats_per_s']:.0f}",
            f"{row['server_mb']:.0f}",
            f"{100 * row['server_cpu_share']:.1f} %",
            f"{row['broker_mb']:.0f}",
            f"{100 * row['broker_cpu_share']:.1f} %",
            f"{row['load']:.1f}",
        )
    return made


def arguments() -> argparse.Namespace:
    """The command line, with what --quick means."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="100 and 400 devices")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument(
        "--devices",
        type=lambda text: [int(one) for one in text.split(",")],
        help="default: 100,500,1000,2000",
    )
    parser.add_argument("--heartbeat-s", type=float, help="default: 30, as agents; quick: 5")
    parser.add_argument("--seconds", type=float, help="to watch; default: two heartbeats")
    options = parser.parse_args()
    options.devices = options.devices or ([100, 400] if options.quick else [100, 500, 1000, 2000])
    options.heartbeat_s = options.heartbeat_s or (5.0 if options.quick else 30.0)
    return options


if __name__ == "__main__":
    sys.exit(main())
