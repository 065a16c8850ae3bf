"""``legend simulate`` and ``legend compare``: experiments without devices.

A thin rim like ``operator_cli``, which takes these commands in: flags in, one
call, exit code out; what is heavy is imported inside.
"""

# ruff: noqa: PLC0415 - lazy imports are the point of this module

from __future__ import annotations

import sys
from pathlib import Path

import click

from wire_protocol.command_line import echo_json


@click.command()
@click.argument("file", metavar="SPEC.yaml", type=click.Path(path_type=Path))
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key of the file, e.g. seed=1 or partition.alpha=0.1.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the run; default: runs/NAME-METHOD-SEED.",
)
@click.option(
    "--workers",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Processes that train; the result does not depend on it.",
)
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Where they run: on this machine, or on a Ray cluster.",
)
@click.option(
    "--address",
    metavar="HOST:PORT",
    help="Of a Ray cluster that runs; default: one is started on this machine.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def simulate(
    file: Path,
    overrides: tuple[str, ...],
    out: Path | None,
    *,
    workers: int,
    engine: str,
    address: str | None,
    as_json: bool,
) -> None:
    """Train for real on a virtual fleet with a virtual clock.

    A simulation that was interrupted goes on where it stood: run the same
    command again. Exit code: 0 finished, 1 failed.
    """
    if address and engine != "ray":
        raise click.UsageError("--address belongs to --engine ray")
    hired = None
    if engine == "ray":
        from broker_server.ray_trainers import ray_engine

        hired = ray_engine(count=workers, address=address)
    from broker_server.simulation_spec import load_simulation_spec

    spec = load_simulation_spec(file, overrides)
    folder = out or Path("runs") / f"{spec.name}-{spec.method_name}-{spec.seed}"
    from broker_server.run_state import RunStatus
    from broker_server.simulate import simulate as run_simulation
    from broker_server.simulation_folder import report_of
    from broker_server.simulation_progress import show_progress

    with show_progress(spec) as watch:
        state = run_simulation(spec, folder, processes=workers, engine=hired, watch=watch)
    if as_json:
        from broker_server.run_folder import summary

        echo_json({"folder": str(folder), **summary(report_of(spec, state, spec.labels))})
    else:
        accuracy = state.rounds[-1].accuracy if state.rounds else float("nan")
        ended = f"{state.status.value}: {state.reason}; accuracy {accuracy:.4f}"
        click.echo(f"{ended}, {state.now:.1f} s of virtual time; see {folder}")
    sys.exit(0 if state.status is RunStatus.FINISHED else 1)


@click.command()
@click.argument(
    "folders",
    metavar="RUN_DIR...",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
)
@click.option(
    "--target",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.99,
    show_default=True,
    help="Share of the best baseline's converged accuracy that counts as there.",
)
@click.option(
    "--baseline",
    "baselines",
    multiple=True,
    metavar="METHOD",
    help="Whom to compare with; may be repeated. Default: every method but legend.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, not a table.")
def compare(
    folders: tuple[Path, ...], *, target: float, baselines: tuple[str, ...], as_json: bool
) -> None:
    """Compare simulated runs: time, traffic and rounds to a target accuracy.

    RUN_DIR are folders of legend simulate, of several methods and, better,
    several seeds each; runs with the same seed are compared in pairs. The
    target is fixed from the baselines alone and must hold twice in a row. A
    method that never gets there is shown with the time it had, as ">T".
    """
    from broker_server.compare import compare_runs, read_run

    comparison = compare_runs(
        [read_run(folder) for folder in folders], share=target, baselines=baselines
    )
    if as_json:
        echo_json(comparison.as_json())
        return
    from rich.console import Console

    from broker_server.compare_table import comparison_tables

    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(comparison_tables(comparison), highlight=False)
