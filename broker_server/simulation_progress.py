"""The progress bar of a simulation, on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from broker_server.simulation_folder import SimulationState
from broker_server.simulation_spec import SimulationSpec
from broker_server.tables import as_percent, as_seconds


@contextmanager
def show_progress(spec: SimulationSpec) -> Iterator[Callable[[SimulationState], object]]:
    """Show rounds, accuracy and virtual time until the block ends; tell it every state."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[news]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        line = bar.add_task(f"{spec.name} ({spec.method_name})", total=spec.rounds, news="loading")

        def show(state: SimulationState) -> None:
            accuracy = state.rounds[-1].accuracy if state.rounds else None
            if accuracy is None and state.baseline is not None:
                accuracy = state.baseline.accuracy
            news = f"accuracy {as_percent(accuracy)}, {as_seconds(state.now)} virtual"
            bar.update(line, completed=len(state.rounds), news=news)

        yield show
