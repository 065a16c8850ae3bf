"""``broker-server``: the service that leads a fleet."""

# ruff: noqa: PLC0415 - lazy imports keep --help instant

from __future__ import annotations

from pathlib import Path

import click

from broker_server.pki_cli import pki
from broker_server.signing_cli import signing_key
from broker_server.token_cli import token
from wire_protocol.command_line import OneLineErrors, configure_logging


@click.group(cls=OneLineErrors)
@click.version_option(package_name="legend-edge")
def main() -> None:
    """Lead a fleet: assign LoRA configs, collect updates, aggregate."""


main.add_command(token)
main.add_command(pki)
main.add_command(signing_key)


@main.command()
@click.option(
    "--settings",
    "settings_file",
    type=click.Path(path_type=Path),
    envvar="BROKER_SERVER_SETTINGS",
    help="Settings file (YAML). Default: /etc/broker-server/settings.yml if it exists.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="How much to say on stderr.",
)
def serve(settings_file: Path | None, log_level: str) -> None:
    """Serve devices and operators until stopped."""
    import anyio

    from broker_server.settings import load_settings
    from wire_protocol.heap import use_few_arenas

    use_few_arenas()
    configure_logging(log_level)
    settings = load_settings(settings_file)
    from broker_server.app import serve as serve_until_stopped

    anyio.run(serve_until_stopped, settings)


@main.command()
@click.argument("file", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--settings",
    "settings_file",
    type=click.Path(path_type=Path),
    envvar="BROKER_SERVER_SETTINGS",
    help="Settings file (YAML) of the server that will use it.",
)
@click.option("--force", is_flag=True, help="Move the state that is there aside.")
def restore(file: Path, settings_file: Path | None, *, force: bool) -> None:
    """Put a backup made by legend backup into state_dir; the server must not run.

    Every byte is checked before anything changes. A run that was running goes on
    when the server starts.
    """
    from broker_server.restore import restore as restore_backup
    from broker_server.settings import load_settings

    for line in restore_backup(file, load_settings(settings_file), force=force):
        click.echo(line)


if __name__ == "__main__":
    main()
