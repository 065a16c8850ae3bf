"""What the server says, as tables for people.

Pure: JSON of the operator API in, rich renderables out. Knows how quantities
are written (units, empty values); fetches nothing and prints nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

Json = Mapping[str, Any]

NONE = "-"
_BLOCKS = "▁▂▃▄▅▆▇█"
_STATE_STYLES = {
    "online": "green",
    "lost": "red",
    "expected": "yellow",
    "refused": "red",
    "revoked": "red",
    "failed": "red",
    "straggler": "yellow",
    "training": "cyan",
    "fetching": "cyan",
    "uploading": "cyan",
    "updated": "green",
    "running": "cyan",
    "finished": "green",
    "cancelled": "yellow",
}


def as_bytes(count: float | None) -> str:
    """A number of bytes with a decimal unit, e.g. ``1.4 MB``."""
    if count is None:
        return NONE
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if abs(value) < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def as_seconds(value: float | None) -> str:
    """A duration, e.g. ``12.3 s`` or ``4 min 05 s``."""
    if value is None:
        return NONE
    if value < 120:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 120:
        return f"{minutes} min {seconds:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def as_percent(share: float | None) -> str:
    """A share of 1, e.g. ``87.5 %``."""
    return NONE if share is None else f"{100 * share:.1f} %"


def as_number(value: float | None) -> str:
    """A loss, with three decimals."""
    return NONE if value is None else f"{value:.3f}"


def as_epsilon(value: float | None) -> str:
    """Privacy that was spent, with three digits; nothing can be said of known noise."""
    return NONE if value is None else f"{value:.3g}"


def as_ranks(ranks: Sequence[int] | None) -> str:
    """Ranks of the trained layers, towards the output; a range when there are many."""
    trained = [rank for rank in ranks or () if rank]
    if len(trained) > 12:
        return f"{trained[0]}..{trained[-1]}"
    return " ".join(str(rank) for rank in trained) or NONE


def printable(text: str) -> str:
    """Text from another machine without line breaks and terminal control codes."""
    return "".join(char if char.isprintable() else " " for char in text)


def styled(state: str) -> Text:
    """A state, status or phase in its colour."""
    return Text(state, style=_STATE_STYLES.get(state, ""))


def sparkline(values: Sequence[float]) -> str:
    """Shares of 1 as a line of blocks, one each."""
    top = len(_BLOCKS) - 1
    return "".join(_BLOCKS[min(top, max(0, round(value * top)))] for value in values)


def new_table(*columns: str, right: Sequence[str] = ()) -> Table:
    """An empty table; columns named in ``right`` hold numbers."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def devices_table(devices: Sequence[Json]) -> RenderableType:
    """Every registered device, what it measured and what data it has."""
    table = new_table(
        "device", "board", "state", "memory", "link up/down", "compute", "datasets", "note"
    )
    for device in devices:
        capability = device.get("capability") or {}
        seen = as_seconds(device.get("last_seen_s"))
        state = styled(device["state"])
        if device["state"] == "lost":
            state.append(f" {seen}")
        elif device.get("busy_with"):
            state.append(" busy")
        table.add_row(
            device["device_id"],
            printable(device["board"]) + (" (emulated)" if device.get("emulated") else ""),
            state,
            as_bytes(capability.get("memory_budget_bytes")),
            _link(capability.get("link")),
            _compute(capability.get("compute")),
            _datasets(device.get("datasets", {})),
            printable(_note_of(device)),
        )
    return _or_nothing(table, "no device is registered; start agents with edge-agent start")


def enrolments_table(enrolments: Sequence[Json]) -> RenderableType:
    """Devices that wait to be let in."""
    table = new_table("device", "key", "waits for", "note")
    for one in enrolments:
        note = "takes the place of another key" if one["replaces"] else ""
        table.add_row(one["device_id"], one["key"], as_seconds(one["since_s"]), note)
    return _or_nothing(table, "no device waits; they ask with edge-agent enroll")


def models_table(models: Sequence[Json]) -> RenderableType:
    """Every registered base model."""
    table = new_table("name", "family", "layers", "size", "digest", right=("layers", "size"))
    for model in models:
        table.add_row(
            model["name"],
            model["family"],
            str(model["layer_count"]),
            as_bytes(model["size_bytes"]),
            model["digest"][:16],
        )
    return _or_nothing(table, "no base model is registered; add one with legend model add")


def runs_table(runs: Sequence[Json]) -> RenderableType:
    """Every run, newest as the server orders them."""
    # Runs without privacy, which are most, are spared the column.
    private = any(run.get("epsilon") is not None for run in runs)
    table = new_table(
        "run", "name", "strategy", "status", "round", "accuracy", *["epsilon"] * private, "reason",
        right=("round", "accuracy", "epsilon"),
    )  # fmt: skip
    for run in runs:
        table.add_row(
            run["run_id"],
            run["name"],
            run["strategy"],
            styled(run["status"]),
            f"{run['round_number']}/{run['rounds']}",
            as_percent(run.get("accuracy")),
            *[as_epsilon(run.get("epsilon"))] * private,
            printable(run.get("reason", "")),
        )
    return _or_nothing(table, "no run yet; start one with legend launch RUN.yaml")


def run_overview(run: Json) -> RenderableType:
    """One run: its heading, its rounds, and every device's depth in every round."""
    parts: list[RenderableType] = [run_heading(run)]
    if run["rounds"]:
        parts += [rounds_table(run), depths_table(run)]
    return Group(*parts)


def run_heading(run: Json) -> Text:
    """Name, strategy, status, round and accuracy so far, in two lines."""
    text = Text.assemble((run["name"], "bold"), f"  {run['run_id']}  {run['strategy']}  ")
    text.append_text(styled(run["status"]))
    text.append(f"  round {run['round_number']}/{run['rounds_total']}")
    if run["status"] == "running" and run.get("phase"):
        text.append(f"  {run['phase']}")
    if run.get("reason"):
        text.append(f"  ({printable(run['reason'])})")
    accuracies = accuracies_of(run)
    if accuracies:
        text.append(f"\naccuracy {as_percent(accuracies[-1])}  {sparkline(accuracies)}")
        text.append(f"  before training {as_percent(run.get('accuracy_before'))}")
    privacy = (run.get("spec") or {}).get("privacy")
    if privacy:
        spent = run["rounds"][-1].get("epsilon") if run["rounds"] else 0.0
        text.append(f"\nprivacy: epsilon {as_epsilon(spent)} so far at delta {privacy['delta']:g}")
    return text


def accuracies_of(run: Json) -> list[float]:
    """Accuracy before training and after every round, as far as known."""
    values = [run.get("accuracy_before"), *(one["accuracy"] for one in run["rounds"])]
    return [float(value) for value in values if value is not None]


def rounds_table(run: Json) -> Table:
    """What every round brought and what it cost."""
    figures = ("accuracy", "loss", "duration", "mean waiting", "up", "down")
    table = new_table("round", *figures, "devices", right=("round", *figures))
    for one in run["rounds"]:
        updated = sum(device["status"] == "updated" for device in one["devices"])
        table.add_row(
            str(one["round"]),
            as_percent(one["accuracy"]),
            as_number(one["loss"]),
            as_seconds(one["duration_s"]),
            as_seconds(one["waiting_s"]),
            as_bytes(one["bytes_up"]),
            as_bytes(one["bytes_down"]),
            f"{updated} of {len(one['devices'])}",
        )
    return table


def depths_table(run: Json) -> Table:
    """LoRA depth per device and round; brackets where no update came of it."""
    table = new_table("depth in round", *(str(one["round"]) for one in run["rounds"]))
    for device_id, depths in depths_of(run).items():
        table.add_row(device_id, *depths)
    return table


def depths_of(run: Json) -> dict[str, list[str]]:
    """Per device one cell per round."""
    names = sorted({device["device_id"] for one in run["rounds"] for device in one["devices"]})
    cells: dict[str, list[str]] = {name: [] for name in names}
    for one in run["rounds"]:
        by_name = {device["device_id"]: device for device in one["devices"]}
        for name in names:
            device = by_name.get(name)
            if device is None:
                cells[name].append(NONE)
            elif device["status"] == "updated":
                cells[name].append(str(device["depth"]))
            else:
                cells[name].append(f"({device['depth']})")
    return cells


def split_table(counts: Mapping[str, Mapping[str, int]]) -> Table:
    """Examples per device and label."""
    labels = sorted({label for row in counts.values() for label in row})
    table = new_table("device", *labels, "all", right=(*labels, "all"))
    for device, row in counts.items():
        cells = [str(row.get(label, 0)) for label in labels]
        table.add_row(device, *cells, str(sum(row.values())))
    return table


def _or_nothing(table: Table, hint: str) -> RenderableType:
    return table if table.row_count else Text(hint)


def _datasets(datasets: Mapping[str, Json]) -> str:
    return printable(", ".join(f"{name} {one['examples']}" for name, one in datasets.items()))


def _link(link: Json | None) -> str:
    if not link:
        return NONE
    megabits = [8e-6 * link[key] for key in ("up_bytes_per_s", "down_bytes_per_s")]
    return f"{megabits[0]:.1f}/{megabits[1]:.1f} Mb/s"


def _compute(compute: Json | None) -> str:
    """Forward plus backward time of one layer, per thousand tokens."""
    if not compute:
        return "not measured"
    both = compute["forward_seconds_per_token_layer"] + compute["backward_seconds_per_token_layer"]
    return f"{1e6 * both:.0f} ms/layer/ktok"


def _note_of(device: Json) -> str:
    reason = device.get("not_training")
    return f"does not train now: {reason}" if reason else str(device.get("note", ""))


def findings_table(findings: Sequence[Json]) -> Table:
    """What the doctor found."""
    styles = {"ok": "green", "warning": "yellow", "broken": "red"}
    table = Table("check", "state", "seen", "what to do", box=None, pad_edge=False)
    for finding in findings:
        state = Text(finding["state"], style=styles[finding["state"]])
        seen, remedy = printable(finding["seen"]), printable(finding["remedy"])
        table.add_row(finding["check"], state, Text(seen), Text(remedy))
    return table
