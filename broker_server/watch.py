"""``legend watch``: follow one run until it ends.

``render_run`` and ``describe_changes`` are pure functions of the run's JSON;
``watch_run`` is the loop around them. A terminal gets a live table, anything
else one plain line per change.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from broker_server.tables import (
    NONE,
    accuracies_of,
    as_bytes,
    as_epsilon,
    as_number,
    as_percent,
    as_ranks,
    as_seconds,
    new_table,
    printable,
    run_heading,
    styled,
)
from wire_protocol.errors import ServerUnavailable

Json = Mapping[str, Any]

EXIT_CODES: Mapping[str, int] = MappingProxyType({"finished": 0, "failed": 1, "cancelled": 2})
"""Exit code of ``legend watch`` by how the run ended."""

_BAR_CELLS = 6
_ENDED = ("updated", "failed", "straggler")


@dataclass(frozen=True)
class Pace:
    """How often to ask, and how long to put up with a server that is away.

    Attributes:
        poll_s: seconds between two looks at the run.
        patience_s: seconds without an answer after which watching ends.
        sleep: waits that many seconds.
    """

    poll_s: float = 1.0
    patience_s: float = 60.0
    sleep: Callable[[float], None] = time.sleep


def watch_run(fetch: Callable[[], Json], console: Console, *, pace: Pace | None = None) -> Json:
    """Show a run until it ends.

    Args:
        fetch: gets the run's JSON from the server.
        console: where to show it; not a terminal means plain lines.
        pace: how often to ask.

    Returns:
        The run's JSON as it ended.

    Raises:
        ServerUnavailable: the server stayed away longer than the pace allows.
    """
    chosen = pace or Pace()
    if not console.is_terminal:
        return _print_lines(fetch, console, chosen)
    with Live(console=console, auto_refresh=False) as live:
        while True:
            run = _patiently(fetch, chosen)
            live.update(render_run(run), refresh=True)
            if run["status"] in EXIT_CODES:
                return run
            chosen.sleep(chosen.poll_s)


def _print_lines(fetch: Callable[[], Json], console: Console, pace: Pace) -> Json:
    before: Json | None = None
    while True:
        run = _patiently(fetch, pace)
        for line in describe_changes(before, run):
            console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)
        if run["status"] in EXIT_CODES:
            return run
        before = run
        pace.sleep(pace.poll_s)


def _patiently(fetch: Callable[[], Json], pace: Pace) -> Json:
    """Fetch; a server that restarts goes on with the run, so wait for it."""
    waited_s = 0.0
    while True:
        try:
            return fetch()
        except ServerUnavailable:
            if waited_s >= pace.patience_s:
                raise
            pace.sleep(pace.poll_s)
            waited_s += pace.poll_s


def render_run(run: Json) -> RenderableType:
    """One picture of a run: heading, devices now, last rounds."""
    parts: list[RenderableType] = [run_heading(run)]
    if run["live"]:
        parts += [Text(), _live_table(run)]
        parts += [Text(_detail(one)) for one in run["live"] if one["detail"]]
    if run["rounds"]:
        parts += [Text(), Text(_round_line(run["rounds"][-1]))]
    return Group(*parts)


def _live_table(run: Json) -> Table:
    numbers = ("depth", "loss", "completion", "waiting")
    table = new_table(
        "device", "state", "depth", "ranks", "step", "loss", "completion", "waiting",
        right=numbers,
    )  # fmt: skip
    for column in table.columns:
        column.no_wrap = column.header != "ranks"
    for device in run["live"]:
        table.add_row(
            device["device_id"],
            styled(device["state"]),
            str(device["depth"] or NONE),
            as_ranks(device["ranks"]),
            progress_bar(device["step"], device["steps"]),
            as_number(device["loss"]),
            _completion(device),
            as_seconds(device["waiting_s"]),
        )
    return table


def _detail(device: Json) -> str:
    return f"{device['device_id']}: {printable(device['detail'])}"


def progress_bar(step: int, steps: int) -> str:
    """Steps done of all, e.g. ``███░░░ 5/10``."""
    if steps <= 0:
        return NONE
    full = min(_BAR_CELLS, _BAR_CELLS * step // steps)
    return f"{'█' * full}{'░' * (_BAR_CELLS - full)} {step}/{steps}"


def _completion(device: Json) -> str:
    """Completion time, or the time so far with dots while the device works."""
    if device["completion_s"] is not None:
        return as_seconds(device["completion_s"])
    over = device["state"] in ("idle", "lost", *_ENDED)
    return NONE if over else f"{as_seconds(device['elapsed_s'])} …"


def describe_changes(before: Json | None, after: Json) -> list[str]:
    """What happened between two looks at a run, one line each.

    Args:
        before: the earlier JSON; None at the first look.
        after: the later JSON.
    """
    lines = []
    if before is None:
        lines.append(f"run {after['run_id']} {after['name']}: {after['strategy']}, "
                     f"{after['rounds_total']} rounds, {after['status']}")  # fmt: skip
    elif before["status"] == "queued" and after["status"] == "running":
        lines.append(f"run {after['run_id']} started")
    old: Json = before or {"accuracy_before": None, "round_number": 0, "rounds": (), "live": ()}
    if old["accuracy_before"] is None and after["accuracy_before"] is not None:
        lines.append(f"accuracy before training {as_percent(after['accuracy_before'])}")
    if after["reason"] and after["reason"] != old.get("reason") and after["status"] == "running":
        lines.append(printable(after["reason"]))
    lines += _absences(old, after)
    lines += _round_changes(old, after)
    if after["status"] in EXIT_CODES:
        lines.append(_end_line(after))
    return lines


def _absences(old: Json, new: Json) -> list[str]:
    """Devices that stay out of the run, and devices that were lost, once each."""
    before = {one["device_id"]: (one["state"], one["detail"]) for one in old["live"]}
    lines = []
    for one in new["live"]:
        state, detail = before.get(one["device_id"], ("", ""))
        if one["state"] == "idle" and one["detail"] and one["detail"] != detail:
            lines.append(f"{one['device_id']} stays out: {printable(one['detail'])}")
        if one["state"] == "lost" and state not in ("", "lost"):
            lines.append(f"{one['device_id']} was lost")
    return lines


def _round_changes(old: Json, new: Json) -> list[str]:
    known_ends, ends = _device_ends(old), _device_ends(new)
    finished = {one["round"]: one for one in new["rounds"]}
    announced = {one["round"] for one in old["rounds"]}
    announced |= {old["round_number"]} if _is_assigned(old) else set()
    current = {new["round_number"]} if _is_assigned(new) else set()
    results = {one["round"] for one in old["rounds"]}
    lines = []
    for number in sorted({*finished, *current, *(key[0] for key in ends)}):
        if number not in announced:
            members = finished[number]["devices"] if number in finished else new["live"]
            lines.append(_start_line(number, members))
        lines += [line for key, line in ends.items() if key[0] == number and key not in known_ends]
        if number in finished and number not in results:
            lines.append(_round_line(finished[number]))
    return lines


def _is_assigned(run: Json) -> bool:
    """True once the devices of the open round have their LoRA configs."""
    return any(one["depth"] for one in run["live"])


def _device_ends(run: Json) -> dict[tuple[int, str], str]:
    """A line for every device whose part in a round is over, by round and device."""
    ends = {
        (one["round"], device["device_id"]): _end_of_device(one["round"], device, device["status"])
        for one in run["rounds"]
        for device in one["devices"]
    }
    for device in run["live"]:
        if device["state"] in _ENDED:
            key = (run["round_number"], device["device_id"])
            ends.setdefault(key, _end_of_device(run["round_number"], device, device["state"]))
    return ends


def _end_of_device(number: int, device: Json, status: str) -> str:
    start = f"round {number}: {device['device_id']}"
    if status == "updated":
        seconds = as_seconds(device["completion_s"])
        loss = as_number(device["loss"])
        return f"{start} finished in {seconds}, depth {device['depth']}, loss {loss}"
    detail = f": {printable(device['detail'])}" if device["detail"] else ""
    return f"{start} {status}{detail}"


def _start_line(number: int, members: Any) -> str:
    depths = (f"{one['device_id']} depth {one['depth']}" for one in members if one["depth"])
    return f"round {number} started: {', '.join(depths)}"


def _round_line(one: Json) -> str:
    return (
        f"round {one['round']}: accuracy {as_percent(one['accuracy'])}, "
        f"{as_seconds(one['duration_s'])}, mean waiting {as_seconds(one['waiting_s'])}, "
        f"up {as_bytes(one['bytes_up'])}, down {as_bytes(one['bytes_down'])}{_protection(one)}"
    )


def _protection(one: Json) -> str:
    """What the defence did in a round, and what the run's privacy has cost so far."""
    counts = {verdict: one.get(verdict, 0) for verdict in ("clipped", "refused")}
    words = [f", {count} {verdict}" for verdict, count in counts.items() if count]
    if one.get("epsilon") is not None:
        words.append(f", epsilon {as_epsilon(one['epsilon'])} so far")
    return "".join(words)


def _end_line(run: Json) -> str:
    reason = f": {printable(run['reason'])}" if run["reason"] else ""
    accuracies = accuracies_of(run)
    last = f", accuracy {as_percent(accuracies[-1])}" if accuracies else ""
    return f"run {run['run_id']} {run['status']}{reason}{last}"
