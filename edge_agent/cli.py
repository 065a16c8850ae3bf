"""``edge-agent``: what a person or systemd can ask of this device.

A thin rim: flags in, one call, exit code out. Everything heavy is imported
inside the command that needs it, so that ``--help`` answers at once on a Pi.
"""

# ruff: noqa: PLC0415 - lazy imports are the point of this module

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from wire_protocol.command_line import OneLineErrors, configure_logging, echo_json

if TYPE_CHECKING:
    from edge_agent.enroll import Enrolment
    from edge_agent.settings import AgentSettings

as_json = click.option("--json", "json_output", is_flag=True, help="Print JSON for programs.")


@click.group(cls=OneLineErrors)
@click.version_option(package_name="legend-edge")
@click.option(
    "--settings",
    "settings_file",
    type=click.Path(path_type=Path),
    envvar="EDGE_AGENT_SETTINGS",
    help="Settings file (YAML). Default: /etc/edge-agent/settings.yml if it exists.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="How much to say on stderr.",
)
@click.pass_context
def main(ctx: click.Context, settings_file: Path | None, log_level: str) -> None:
    """Train a shared language model on this device's private data."""
    ctx.obj = settings_file
    if ctx.invoked_subcommand == "start" or log_level != "info":
        configure_logging(log_level)
    else:
        configure_logging("warning")


def _settings(ctx: click.Context) -> AgentSettings:
    from edge_agent.settings import load_settings

    return load_settings(ctx.obj)


@main.command()
@click.option("--emulate", metavar="BOARD", help="Imitate the speed and the link of a board.")
@click.option(
    "--time-dilation",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="With --emulate: how many seconds one second of the board takes here.",
)
@click.pass_context
def start(ctx: click.Context, emulate: str | None, time_dilation: float) -> None:
    """Connect to the server and take part in training until stopped."""
    import anyio

    from edge_agent.app import run_agent
    from edge_agent.settings import EmulateSettings

    settings = _settings(ctx)
    if emulate:
        imitation = EmulateSettings(board=emulate, time_dilation=time_dilation)
        settings = settings.model_copy(update={"emulate": imitation})
    anyio.run(run_agent, settings)


@main.command()
@click.option("--url", metavar="URL", help="The server's https address. Default: that of before.")
@click.option("--token", help="One-time token of broker-server pki token. Default: that of before.")
@click.option(
    "--wait-s",
    type=click.FloatRange(min=0),
    default=300.0,
    show_default=True,
    help="How long to wait for an operator to accept this device.",
)
@click.option("--again", is_flag=True, help="Replace the identity that this device has.")
@as_json
@click.pass_context
def enroll(
    ctx: click.Context,
    url: str | None,
    token: str | None,
    wait_s: float,
    again: bool,
    json_output: bool,
) -> None:
    """Get this device its identity: a key made here, certified by the fleet.

    Without --url and --token it goes on with the request that waits. Exit code
    75 while no operator has accepted it; 77 if one rejected it.
    """
    import anyio

    from edge_agent.enroll import Ticket
    from edge_agent.enroll import enroll as enroll_device

    if (url is None) != (token is None):
        raise click.UsageError("give --url and --token together")
    settings = _settings(ctx)
    ticket = Ticket.read(url, token) if url and token else None
    if ticket is not None and not json_output:
        click.echo(f"enrolling {settings.device_id} at {ticket.url}", err=True)

    async def run() -> Enrolment:
        return await enroll_device(settings, ticket, wait_s=wait_s, again=again)

    outcome = anyio.run(run)
    if json_output:
        echo_json(outcome.__dict__)
    else:
        click.echo(outcome.sentence(settings))
    if outcome.status != "accepted":
        ctx.exit(75)


@main.command()
@click.pass_context
def stop(ctx: click.Context) -> None:
    """Stop the agent that runs in the state directory."""
    from edge_agent.status_file import stop_agent

    settings = _settings(ctx)
    pid = stop_agent(settings.state_dir)
    click.echo(f"agent stopped (pid {pid})")


@main.command()
@as_json
@click.pass_context
def status(ctx: click.Context, json_output: bool) -> None:
    """Show what the running agent does; exit code 69 if none runs."""
    from edge_agent.status_file import read_status

    report = read_status(_settings(ctx).state_dir)
    if json_output:
        echo_json(report)
    else:
        _print_table("agent", report)


@main.command()
@click.option(
    "--model",
    "model_dir",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of a base model. Default: the newest one of the server.",
)
@click.option("--refresh", is_flag=True, help="Measure again even if nothing has changed.")
@as_json
@click.pass_context
def benchmark(ctx: click.Context, model_dir: Path | None, refresh: bool, json_output: bool) -> None:
    """Measure training, memory, link, disk and inference on this device."""
    import anyio

    from edge_agent.local_commands import benchmark_now

    capability = anyio.run(benchmark_now, _settings(ctx), model_dir, refresh)
    report = capability.model_dump(mode="json")
    if json_output:
        echo_json(report)
    else:
        _print_table("capability profile", report)


@main.command()
@as_json
@click.pass_context
def doctor(ctx: click.Context, json_output: bool) -> None:
    """Check everything that this device needs; exit code 1 if something is broken."""
    from edge_agent.doctor import examine

    findings = examine(ctx.obj)
    if json_output:
        echo_json([finding.__dict__ for finding in findings])
    else:
        from edge_agent.doctor import print_findings

        print_findings(findings)
    if any(finding.state == "broken" for finding in findings):
        ctx.exit(1)


@main.command()
@click.option("--boards", is_flag=True, help="List every board that has a profile.")
@as_json
@click.pass_context
def profile(ctx: click.Context, boards: bool, json_output: bool) -> None:
    """Show which board this is and what it measured about itself."""
    from edge_agent.local_commands import board_table, own_profile

    if boards:
        rows = board_table()
        if json_output:
            echo_json(rows)
        else:
            _print_rows("boards", rows)
        return
    report = own_profile(_settings(ctx))
    if json_output:
        echo_json(report)
    else:
        _print_table("this device", report)


@main.command("train-once")
@click.option(
    "--model",
    "model_dir",
    required=True,
    help="Folder of a base model.",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
)
@click.option("--dataset", required=True, help="A dataset of the settings file.")
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Where to write the update (safetensors).",
)
@click.option(
    "--steps", type=click.IntRange(min=1), default=5, show_default=True, help="Training steps."
)
@click.option("--depth", type=click.IntRange(min=1), help="Layers to train. Default: all.")
@click.option(
    "--rank",
    type=click.IntRange(1, 256),
    default=8,
    show_default=True,
    help="LoRA rank of every trained layer.",
)
@as_json
@click.pass_context
def train_once(
    ctx: click.Context,
    model_dir: Path,
    dataset: str,
    out: Path,
    steps: int,
    depth: int | None,
    rank: int,
    json_output: bool,
) -> None:
    """Train a few steps on a local dataset, without any server."""
    import anyio

    from edge_agent.local_commands import LocalTraining, train_locally

    training = LocalTraining(model_dir, dataset, out, steps=steps, depth=depth, rank=rank)
    report = anyio.run(train_locally, _settings(ctx), training)
    if json_output:
        echo_json(report)
    else:
        _print_table("local training", report)


def _print_table(title: str, values: dict[str, object]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("what", "value", title=title, title_justify="left")
    for key, value in _flat(values):
        table.add_row(key, str(value))
    Console().print(table)


def _print_rows(title: str, rows: list[dict[str, object]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*rows[0], title=title, title_justify="left")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)


def _flat(values: dict[str, object], prefix: str = "") -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        elif value is not None:
            rows.append((prefix + key, value))
    return rows


if __name__ == "__main__":
    main()
