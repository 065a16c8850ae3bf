"""``broker-server signing-key``: the key that the server's messages are signed with."""

# ruff: noqa: PLC0415 - lazy imports keep --help instant

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from broker_server.token_cli import settings_option

if TYPE_CHECKING:
    from broker_server.signing_keys import SigningKeys


@click.group("signing-key")
def signing_key() -> None:
    """The server's signing key, and the operator's word for it."""


@signing_key.command()
@settings_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON, not text.")
def show(settings_file: Path | None, as_json: bool) -> None:
    """Show the public keys; made now if the server has never run."""
    from broker_server.signing_keys import load_or_make

    folder, fleet = _place(settings_file)
    _print(load_or_make(folder, fleet), as_json)


@signing_key.command()
@settings_option
@click.option(
    "--operator-key",
    "operator_key_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The operator's private key. Default: operator.key beside the server's key.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, not text.")
def renew(settings_file: Path | None, operator_key_file: Path | None, as_json: bool) -> None:
    """Replace the server's key; devices that heard the new one refuse the old one.

    Restart the server afterwards.
    """
    from broker_server import signing_keys

    folder, fleet = _place(settings_file)
    key_file = operator_key_file or folder / signing_keys.OPERATOR_KEY
    _print(signing_keys.renew(folder, fleet, operator_key_file=key_file), as_json)
    if not as_json:
        click.echo(f"{'next':<13} restart the server")


def _place(settings_file: Path | None) -> tuple[Path, str]:
    from broker_server.server_state import ServerState
    from broker_server.settings import load_settings

    settings = load_settings(settings_file)
    return settings.pki or ServerState(settings.state_dir).signing, settings.fleet


def _print(keys: SigningKeys, as_json: bool) -> None:
    from wire_protocol.command_line import echo_json

    content = {
        "operator_key": keys.operator_key,
        "server_key": keys.server.public_key,
        "number": keys.number,
    }
    if as_json:
        echo_json(content)
    else:
        for name, value in content.items():
            click.echo(f"{name:<13} {value}")
