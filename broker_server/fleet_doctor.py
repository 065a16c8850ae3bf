"""``legend doctor``: a fleet as its operator sees it, checked point by point.

Each finding says what was seen and, when something is wrong, what to do. Knows the operator API's
answers; prints nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Protocol

from wire_protocol.errors import LegendError, Refused, Unavailable

Json = Mapping[str, Any]

LEAST_SERVER_BYTES = 2 * 10**9
"""Less is a warning: one base model and the blobs of a round fit, and little else."""
FULL_SERVER_BYTES = 200 * 10**6
"""Less is broken: commits are about to wait for space."""
LEAST_DEVICE_BYTES = 2 * 10**9
LARGEST_CLOCK_DIFFERENCE_S = 30.0
CERTIFICATE_DAYS = 14.0
"""Certificates renew themselves at a third of their 90 days: below this something is in the way."""

_NAMED = 5


@dataclass(frozen=True)
class Finding:
    """One check: ``state`` is ``ok``, ``warning`` or ``broken``."""

    check: str
    state: str
    seen: str
    remedy: str = ""


class Asked(Protocol):
    """The part of the operator API that is looked at."""

    def doctor(self) -> dict[str, Any]:
        """``GET /v1/doctor``."""

    def devices(self) -> list[dict[str, Any]]:
        """``GET /v1/devices``."""

    def runs(self) -> list[dict[str, Any]]:
        """``GET /v1/runs``."""


def examine(connect: Callable[[], AbstractContextManager[Asked]]) -> list[Finding]:
    """Run every check; without a server there is only one."""
    try:
        with connect() as api:
            before = time.time()
            server = api.doctor()
            after = time.time()
            devices = api.devices()
            runs = api.runs()
    except Unavailable as error:
        remedy = "start it, or correct --server; on its host: journalctl -u broker-server"
        return [Finding("server", "broken", str(error), remedy)]
    except Refused as error:
        return [Finding("server", "broken", str(error), "give a token: --token or LEGEND_TOKEN")]
    except LegendError as error:
        return [Finding("server", "broken", str(error), "update the server or this program")]
    return [
        *_server(server),
        *_clock(server, before, after),
        *_broker(server),
        *_disk(server),
        *_database(server),
        *_certificates(server.get("certificates", [])),
        *_dropped(server.get("dropped_messages", [])),
        *_runs(runs),
        *_devices(devices, str(server["version"])),
    ]


def _server(server: Json) -> Iterator[Finding]:
    seen = f"fleet {server['fleet']}, version {server['version']}"
    if server["version"] == version("legend-edge"):
        yield Finding("server", "ok", seen)
    else:
        remedy = "install the same release on both sides"
        seen += f", this program is {version('legend-edge')}"
        yield Finding("server", "warning", seen, remedy)


def _clock(server: Json, before: float, after: float) -> Iterator[Finding]:
    """The server's clock against ours; the way there and back is not held against it."""
    difference_s = max(before - server["time_s"], server["time_s"] - after, 0.0)
    seen = f"{difference_s:.0f} s from this machine's"
    if difference_s <= LARGEST_CLOCK_DIFFERENCE_S:
        yield Finding("clock", "ok", seen)
    else:
        remedy = "enable NTP on both machines: certificates and logs depend on the date"
        yield Finding("clock", "warning", seen, remedy)


def _broker(server: Json) -> Iterator[Finding]:
    kind = server["broker"]["kind"]
    if server["broker"]["connected"]:
        yield Finding("broker", "ok", f"{kind}, connected")
    else:
        remedy = "see broker_lost in the server's log; check broker.url, or mosquitto on its host"
        yield Finding("broker", "broken", f"{kind}, the server has no connection", remedy)


def _disk(server: Json) -> Iterator[Finding]:
    free, path = server["disk"]["free_bytes"], server["disk"]["path"]
    state = "ok"
    if free < LEAST_SERVER_BYTES:
        state = "broken" if free < FULL_SERVER_BYTES else "warning"
    remedy = "" if state == "ok" else "free some space, or move state_dir to a larger disk"
    yield Finding("server's disk", state, f"{free / 1e9:.1f} GB free in {path}", remedy)


def _database(server: Json) -> Iterator[Finding]:
    database = server["database"]
    if database["damage"]:
        remedy = "stop the server and run: broker-server restore FILE --force"
        yield Finding("database", "broken", f"damaged: {database['damage']}", remedy)
    elif database["kind"] == "sqlite":
        seen = f"sqlite, {database['size_bytes'] / 1e6:.1f} MB, quick check passed"
        yield Finding("database", "ok", seen)
    else:
        yield Finding("database", "ok", f"{database['kind']}; checked by its own tools")
    if server.get("unsaved_births"):
        seen = f"{server['unsaved_births']} births of devices were not written"
        yield Finding("database", "warning", seen, "free some space; devices say them again")


def _certificates(certificates: Sequence[Json]) -> Iterator[Finding]:
    ending = [one for one in certificates if one["days_left"] < CERTIFICATE_DAYS]
    if certificates and not ending:
        least = min(one["days_left"] for one in certificates)
        seen = f"{len(certificates)}, the next ends in {least:.0f} days"
        yield Finding("certificates", "ok", seen)
    for one in ending:
        ended = one["days_left"] <= 0
        when = "has ended" if ended else f"ends in {one['days_left']:.0f} days"
        if one["kind"] == "device":
            # One device less is no reason to call the fleet broken.
            state = "warning"
            remedy = "switch it on, it renews itself; if ended: edge-agent enroll on it; "
            remedy += f"if it is gone for good: legend devices revoke {one['name']}"
        else:
            state = "broken" if ended else "warning"
            remedy = "broker-server pki renew, where the authority's key is"
        yield Finding("certificate", state, f"{one['kind']} {one['name']} {when}", remedy)


def _dropped(dropped: Sequence[Json]) -> Iterator[Finding]:
    if not dropped:
        yield Finding("messages", "ok", "none was dropped since the server's start")
        return
    total = sum(one["count"] for one in dropped)
    most = sorted(dropped, key=lambda one: -one["count"])[:_NAMED]
    reasons = ", ".join(f"{one['count']} {one['channel']}: {one['reason']}" for one in most)
    remedy = "see message_dropped in the server's log; docs/operations.md explains the reasons"
    yield Finding("messages", "warning", f"{total} dropped ({reasons})", remedy)


def _runs(runs: Sequence[Json]) -> Iterator[Finding]:
    active = [run for run in runs if run["status"] in ("running", "queued")]
    for run in active:
        if run["status"] == "running" and run.get("reason"):
            remedy = f"legend show {run['run_id']}"
            yield Finding("run", "warning", f"{run['run_id']} waits: {run['reason']}", remedy)
    if active:
        seen = ", ".join(f"{run['run_id']} {run['status']}" for run in active[:_NAMED])
        yield Finding("runs", "ok", seen)


def _devices(devices: Sequence[Json], server_version: str) -> Iterator[Finding]:
    if not devices:
        remedy = "run edge-agent start on a device; edge-agent doctor says what is in its way"
        yield Finding("devices", "warning", "no device has ever been online", remedy)
        return
    online = [one for one in devices if one["state"] == "online"]
    yield Finding("devices", "ok", f"{len(online)} of {len(devices)} online")
    for one in devices:
        if one["state"] == "revoked":
            yield Finding("device", "ok", f"{one['device_id']} is revoked, as somebody decided")
        elif one["state"] == "expected":
            seen = f"{one['device_id']} is expected and was never seen"
            remedy = "enrol and start its agent; or take it out of the inventory and import again"
            yield Finding("device", "warning", seen, remedy)
        elif one["state"] != "online":
            seen = f"{one['device_id']} is lost, last heard {_ago(one['last_seen_s'])} ago"
            remedy = "on the device: systemctl status edge-agent; edge-agent doctor"
            yield Finding("device", "warning", seen, remedy)
    for one in online:
        yield from _device(one, server_version)


def _device(one: Json, server_version: str) -> Iterator[Finding]:
    name, capability = one["device_id"], one.get("capability") or {}
    if one["agent_version"] != server_version:
        seen = f"{name} runs {one['agent_version']}, the server {server_version}"
        remedy = "ansible-playbook playbooks/rollout.yml, or update legend-edge on it"
        yield Finding("device", "warning", seen, remedy)
    if capability.get("compute") is None:
        remedy = "add a base model (legend model add DIR), or on the device: edge-agent benchmark"
        yield Finding("device", "warning", f"{name} has not measured itself", remedy)
    if capability.get("throttled"):
        remedy = "check its cooling and power supply"
        yield Finding("device", "warning", f"{name} runs below its speed", remedy)
    free = capability.get("disk_free_bytes")
    if free is not None and free < LEAST_DEVICE_BYTES:
        seen = f"{name} has {free / 1e9:.1f} GB left on its disk"
        yield Finding("device", "warning", seen, "free some space on it")
    if one.get("note"):
        yield Finding("device", "warning", f"{name}: {one['note']}", "see legend devices")


def _ago(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h"
