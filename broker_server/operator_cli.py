"""The ``legend`` command: what an operator does with a fleet.

A thin rim: flags in, one call, exit code out. Everything heavier than click is
imported inside the command that needs it, so that ``--help`` answers at once.
"""

# ruff: noqa: PLC0415 - lazy imports are the point of this module

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from broker_server.care_cli import backup, doctor
from broker_server.cli_output import as_json_option, print_answer
from broker_server.devices_cli import devices
from broker_server.fleet_cli import fleet
from broker_server.simulation_cli import compare, simulate
from broker_server.wheelhouse_cli import wheelhouse
from wire_protocol.command_line import OneLineErrors
from wire_protocol.errors import ConfigError

if TYPE_CHECKING:
    from broker_server.operator_api_client import OperatorApi

DEFAULT_SERVER = "http://127.0.0.1:8300"


@dataclass(frozen=True)
class ServerAddress:
    """Where the server is and what it is shown."""

    url: str
    token: str | None = field(repr=False)
    ca: Path | None = None

    def connect(self) -> OperatorApi:
        """Open a client; nothing is sent yet."""
        from broker_server.operator_api_client import OperatorApi

        return OperatorApi(self.url, token=self.token, ca=self.ca)


@click.group("legend", cls=OneLineErrors)
@click.version_option(package_name="legend-edge")
@click.option(
    "--server",
    envvar="LEGEND_SERVER",
    default=DEFAULT_SERVER,
    show_default=True,
    show_envvar=True,
    metavar="URL",
    help="Address of the server.",
)
@click.option(
    "--token", envvar="LEGEND_TOKEN", show_envvar=True, help="Token, if the server wants one."
)
@click.option(
    "--ca",
    envvar="LEGEND_CA",
    show_envvar=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="For https: ca.pem of the fleet. Default: the system's authorities.",
)
@click.pass_context
def main(ctx: click.Context, server: str, token: str | None, ca: Path | None) -> None:
    """Fine-tune one language model on a fleet of devices with LEGEND.

    \b
    A first look:    legend demo
    With a fleet:    legend devices; legend model add FOLDER; legend launch RUN.yaml
    """  # noqa: D301 - click wants a real backspace
    ctx.obj = ServerAddress(server, token, ca)


main.add_command(devices)
main.add_command(fleet)
main.add_command(backup)
main.add_command(doctor)
main.add_command(simulate)
main.add_command(compare)
main.add_command(wheelhouse)


@main.group()
def model() -> None:
    """Base models that runs can use."""


@model.command("add")
@click.argument("source")
@click.option("--name", help="What runs call it; default: the folder's name.")
@as_json_option
@click.pass_obj
def model_add(server: ServerAddress, source: str, name: str | None, as_json: bool) -> None:
    """Upload a base model to the server.

    SOURCE is a folder with config.json, tokenizer and safetensors weights, or
    the id of such a model on the Hugging Face hub.
    """
    from broker_server.operator_api_client import add_model
    from broker_server.transfer_progress import show_transfers

    with server.connect() as api, show_transfers() as report:
        added = add_model(api, source, name=name, report=report)
    print_answer(added, f"added {added['name']}, digest {added['digest']}", as_json=as_json)


@model.command("list")
@as_json_option
@click.pass_obj
def model_list(server: ServerAddress, as_json: bool) -> None:
    """List the base models that runs can use."""
    with server.connect() as api:
        found = api.models()
    from broker_server.tables import models_table

    print_answer(found, models_table(found), as_json=as_json)


@main.command()
@click.argument("file", metavar="RUN.yaml", type=click.Path(path_type=Path))
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key of the file, e.g. rounds=3 or strategy_options.rank_min=4.",
)
@click.option("--watch/--no-watch", default=True, show_default=True, help="Follow the run.")
@click.pass_obj
def launch(server: ServerAddress, file: Path, overrides: tuple[str, ...], watch: bool) -> None:
    """Start a run and follow it until it ends.

    Exit code, when it is followed: 0 finished, 1 failed, 2 cancelled. Ctrl-C
    stops following, not the run.
    """
    from broker_server.run_spec import load_run_spec, read_held_out

    spec = load_run_spec(file, overrides)
    held_out = read_held_out(spec.evaluation)
    with server.connect() as api:
        run_id = api.submit_run(spec.submitted(held_out, api.upload_bytes(held_out.content)))
        _warn_without_data(api, spec.dataset)
        if not watch:
            click.echo(run_id)
            return
        _follow(api, run_id)


def _warn_without_data(api: OperatorApi, dataset: str) -> None:
    """Say at once that nobody could train; the run itself may wait for devices to come."""
    known = {name for device in api.devices() for name in device.get("datasets", {})}
    if dataset not in known:
        have = f"they have: {', '.join(sorted(known))}" if known else "none has any"
        click.echo(
            f"no device has a dataset {dataset!r} yet ({have}); the run waits for one that has: "
            "name it in the device's settings, or correct 'dataset' in the run",
            err=True,
        )


@main.command()
@click.argument("run_id", metavar="[RUN]", required=False)
@click.pass_obj
def watch(server: ServerAddress, run_id: str | None) -> None:
    """Follow a run, by default the newest.

    Exit code: 0 finished, 1 failed, 2 cancelled. Ctrl-C stops following, not
    the run.
    """
    with server.connect() as api:
        _follow(api, run_id or _newest(api))


@main.command()
@as_json_option
@click.pass_obj
def runs(server: ServerAddress, as_json: bool) -> None:
    """List every run."""
    with server.connect() as api:
        found = api.runs()
    from broker_server.tables import runs_table

    print_answer(found, runs_table(found), as_json=as_json)


@main.command()
@click.argument("run_id", metavar="RUN")
@as_json_option
@click.pass_obj
def show(server: ServerAddress, run_id: str, as_json: bool) -> None:
    """Show one run: its rounds, and every device's depth in them."""
    with server.connect() as api:
        found = api.run(run_id)
    from broker_server.tables import run_overview

    print_answer(found, run_overview(found), as_json=as_json)


@main.command()
@click.argument("run_id", metavar="RUN")
@click.pass_obj
def cancel(server: ServerAddress, run_id: str) -> None:
    """Stop a run; the adapter of its last complete round stays."""
    with server.connect() as api:
        api.cancel_run(run_id)
    click.echo(f"asked run {run_id} to stop")


@main.command()
@click.argument("run_id", metavar="RUN")
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@click.option("--merge", is_flag=True, help="Write base model plus adapter to DIR/merged.")
@click.option("--onnx", is_flag=True, help="Write the merged model to DIR/model.onnx.")
@click.option(
    "--base",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the base model; default: fetched from the server.",
)
@click.pass_obj
def export(
    server: ServerAddress,
    run_id: str,
    folder: Path,
    *,
    merge: bool,
    onnx: bool,
    base: Path | None,
) -> None:
    """Download a run's adapter as a PEFT folder.

    --merge and --onnx need torch: pip install 'legend-edge[train]'.
    """
    from broker_server.run_export import ExportPlan, export_run

    with server.connect() as api:
        plan = ExportPlan(folder=folder, merge=merge, onnx=onnx, base=base)
        for line in export_run(api, run_id, plan):
            click.echo(line)


@main.group()
def data() -> None:
    """Datasets on this machine."""


@data.command("split")
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--devices", "count", type=click.IntRange(1), required=True, help="How many parts.")
@click.option(
    "--alpha",
    type=click.FloatRange(0, min_open=True),
    required=True,
    help="Dirichlet concentration: 0.1 very unlike label mixes, 100 nearly equal ones.",
)
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder."
)
@click.option(
    "--quantity-alpha", type=click.FloatRange(0, min_open=True), help="Same, for the sizes."
)
@click.option("--minimum", type=click.IntRange(0), default=1, show_default=True, help="Per device.")
@click.option("--seed", type=int, default=0, show_default=True, help="Names the split.")
@click.option("--label", default="label", show_default=True, help="Column to skew.")
@as_json_option
def data_split(file: Path, *, out: Path, label: str, seed: int, as_json: bool, **skew: Any) -> None:
    """Split a labelled file into one file per device, label mixes unlike.

    FILE is csv, tsv, JSON lines or parquet; a tsv file stays tsv, others
    become JSON lines.
    """
    from broker_server.dataset_split import split_file
    from broker_server.partition import PartitionOptions
    from broker_server.tables import split_table

    options = PartitionOptions(
        devices=skew["count"],
        alpha=skew["alpha"],
        quantity_alpha=skew["quantity_alpha"],
        minimum=skew["minimum"],
    )
    counts = split_file(file, out, label=label, options=options, seed=seed)
    print_answer(counts, split_table(counts), as_json=as_json)


@main.command()
@click.option(
    "--broker",
    type=click.Choice(["embedded", "mosquitto"]),
    default="embedded",
    show_default=True,
    help="MQTT broker to start.",
)
@click.option("--rounds", type=click.IntRange(1), default=6, show_default=True, help="Rounds.")
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Result as JSON."
)
@click.option(
    "--keep",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the adapter, data and logs; default: a temporary one, which stays.",
)
@click.option("--fleet", default="demo4", show_default=True, help="Fleet profile to imitate.")
def demo(broker: str, rounds: int, json_file: Path | None, keep: Path | None, fleet: str) -> None:
    """Train on an imitated fleet of four boards on this machine.

    Starts a broker, a server and one agent per board as processes, fine-tunes
    a small language model on generated device logs, and checks the result.
    """
    from broker_server.demo import DemoOptions, run_demo

    options = DemoOptions(
        broker=broker, rounds=rounds, fleet=fleet, folder=keep, json_file=json_file
    )
    run_demo(options)


def _follow(api: OperatorApi, run_id: str) -> None:
    """Watch a run and leave with its exit code."""
    from rich.console import Console

    from broker_server.watch import EXIT_CODES, watch_run

    try:
        run = watch_run(lambda: api.run(run_id), Console())
    except KeyboardInterrupt:
        click.echo(f"run {run_id} goes on; follow it with: legend watch {run_id}", err=True)
        raise
    sys.exit(EXIT_CODES[run["status"]])


def _newest(api: OperatorApi) -> str:
    found = api.runs()
    if not found:
        raise ConfigError("there is no run to watch; start one with legend launch RUN.yaml")
    return str(found[-1]["run_id"])


if __name__ == "__main__":
    main()
