"""``broker-server token``: who may use the HTTP API.

A running server accepts and refuses at once what these commands change.
"""

# ruff: noqa: PLC0415 - lazy imports keep --help instant

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from broker_server.tokens import TokenStore

settings_option = click.option(
    "--settings",
    "settings_file",
    type=click.Path(path_type=Path),
    envvar="BROKER_SERVER_SETTINGS",
    help="Settings file (YAML). Default: /etc/broker-server/settings.yml if it exists.",
)


@click.group()
def token() -> None:
    """Tokens for people and programs that use the HTTP API."""


@token.command()
@settings_option
@click.option("--name", required=True, help="Who will use it; to revoke it by.")
@click.option(
    "--role",
    type=click.Choice(["viewer", "operator"]),
    required=True,
    help="A viewer reads; an operator changes things too.",
)
def create(settings_file: Path | None, name: str, role: str) -> None:
    """Print a new token. It is shown this once and kept as a digest only."""
    import time

    from broker_server.access import Role

    click.echo(_store(settings_file).create(name, Role(role), time.time()))


@token.command("list")
@settings_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON, not a table.")
def list_tokens(settings_file: Path | None, as_json: bool) -> None:
    """List the tokens, never their secrets."""
    from datetime import datetime, timezone

    from wire_protocol.command_line import echo_json

    def when(seconds: float | None) -> str:
        if seconds is None:
            return ""
        return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")

    lines = [
        {
            "name": record.name,
            "role": record.role.value,
            "created": when(record.created_at),
            "revoked": when(record.revoked_at),
        }
        for record in _store(settings_file).records()
    ]
    if as_json:
        echo_json(lines)
        return
    for line in lines:
        revoked = f"  revoked {line['revoked']}" if line["revoked"] else ""
        click.echo(f"{line['name']:24} {line['role']:9} created {line['created']}{revoked}")


@token.command()
@settings_option
@click.argument("name")
def revoke(settings_file: Path | None, name: str) -> None:
    """Accept the token NAME no more."""
    import time

    _store(settings_file).revoke(name, time.time())
    click.echo(f"token {name} is revoked")


def _store(settings_file: Path | None) -> TokenStore:
    from broker_server.settings import load_settings
    from broker_server.tokens import TokenStore

    return TokenStore(load_settings(settings_file).state_dir)
