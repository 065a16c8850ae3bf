"""``broker-server``: the service that leads a fleet."""

# ruff: noqa: PLC0415 - lazy imports keep --help instant

from __future__ import annotations

from pathlib import Path

import click

from wire_protocol.command_line import OneLineErrors, configure_logging


@click.group(cls=OneLineErrors)
@click.version_option(package_name="legend-edge")
def main() -> None:
    """Lead a fleet: assign LoRA configs, collect updates, aggregate."""


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

    configure_logging(log_level)
    settings = load_settings(settings_file)
    from broker_server.app import serve as serve_until_stopped

    anyio.run(serve_until_stopped, settings)


if __name__ == "__main__":
    main()
