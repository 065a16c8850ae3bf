"""A comparison as tables for people. Pure; knows how quantities are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rich.console import Group, RenderableType
from rich.table import Table

from broker_server.compare import Amount, Comparison, Ratio
from broker_server.tables import NONE, as_bytes, as_percent, as_seconds


def comparison_tables(comparison: Comparison) -> RenderableType:
    """Costs to the target by method, then gains over each baseline."""
    title = (
        f"to accuracy {comparison.target:.4f} = {as_percent(comparison.share)} of "
        f"{comparison.target_from}, held twice"
    )
    costs = Table(title=title, title_justify="left")
    columns = ("method", "seeds", "there", "time", "rounds", "up", "down", "traffic", "energy",
               "mean waiting", "final (last 5)")  # fmt: skip
    for column in columns:
        costs.add_column(column, justify="left" if column == "method" else "right")
    for row in comparison.rows:
        costs.add_row(
            row.method,
            str(len(row.seeds)),
            f"{row.reached}/{len(row.seeds)}",
            _amount(row.time_s, as_seconds),
            _amount(row.rounds, lambda value: f"{value:.1f}"),
            _amount(row.bytes_up, as_bytes),
            _amount(row.bytes_down, as_bytes),
            _amount(row.bytes_total, as_bytes),
            NONE if row.energy_j is None else _amount(row.energy_j, _as_energy),
            as_seconds(row.waiting_s),
            f"{row.final:.4f}",
        )
    gains = Table(title="gain, paired by seed", title_justify="left")
    for column in ("method", "over", "times faster", "times less traffic", "seeds"):
        gains.add_column(column)
    for baseline, methods in comparison.speedups.items():
        for method, speedup in methods.items():
            saving = comparison.savings[baseline][method]
            gains.add_row(method, baseline, _ratio(speedup), _ratio(saving), str(speedup.seeds))
    return Group(costs, gains) if gains.row_count else costs


def _as_energy(joules: float) -> str:
    return f"{joules / 3600:.2f} Wh" if joules >= 3600 else f"{joules:.0f} J"


def _amount(amount: Amount, write: Callable[[float], str]) -> str:
    return ("> " if amount.censored else "") + write(amount.value)


_BOUNDS: Mapping[str | None, str] = {None: "", "at least": ">= ", "at most": "<= "}


def _ratio(ratio: Ratio) -> str:
    if ratio.value is None:
        return NONE
    text = f"{_BOUNDS[ratio.bound]}{ratio.value:.2f}"
    if ratio.interval is None:
        return text
    low, high = ratio.interval
    return f"{text} [{low:.2f}, {high:.2f}]"
