"""``legend fleet``: the fleet as an inventory of Ansible, in and out."""

# ruff: noqa: PLC0415 - lazy imports keep --help instant

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from broker_server.cli_output import as_json_option, print_answer
from wire_protocol.errors import ConfigError

if TYPE_CHECKING:
    from broker_server.fleet_inventory import Site
    from broker_server.operator_cli import ServerAddress

_MEANINGS = (
    ("waiting", "expected, never seen"),
    ("seen", "known to the server"),
    ("revoked", "revoked: take it out, or let it in again with broker-server pki token --device"),
    ("unlisted", "known to the server, not in the inventory"),
    ("forgotten", "no longer expected"),
)


@click.group()
def fleet() -> None:
    """The fleet as an Ansible inventory: what it should be, what it is."""


@fleet.command("import")
@click.argument("file", metavar="INVENTORY.yml", type=click.Path(path_type=Path))
@click.option(
    "--tokens",
    "tokens_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write a token for each device that has no certificate: its id and token, as YAML.",
)
@click.option(
    "--ttl-s",
    type=click.FloatRange(min=60, max=2_678_400),
    default=86_400,
    show_default=True,
    help="Seconds in which a token must be used.",
)
@as_json_option
@click.pass_obj
def import_inventory(
    server: ServerAddress, file: Path, *, tokens_file: Path | None, ttl_s: float, as_json: bool
) -> None:
    """Expect the devices of an inventory, and say how it differs from the server.

    They are the hosts of the group 'devices', called as edge_agent_device_id says.
    Those that were never seen show in legend devices as expected. A device that
    is no longer listed is not removed: legend devices revoke does that.

    With --tokens each of them is let in at once when it shows its own token
    (edge-agent enroll --token), once; nobody has to accept it. Keep FILE secret.
    """
    from broker_server.fleet_inventory import read_inventory
    from broker_server.tables import new_table

    hosts = read_inventory(file)
    if tokens_file and not tokens_file.absolute().parent.is_dir():
        # Found out later, the tokens would have been made and lost.
        raise ConfigError(f"there is no folder {tokens_file.absolute().parent} for the tokens")
    with server.connect() as api:
        found = api.expect(
            {
                "devices": {host.device_id: host.address for host in hosts},
                "tokens_ttl_s": ttl_s if tokens_file else None,
            }
        )
    tokens: dict[str, str] = found.pop("tokens")
    if tokens_file:
        _write_tokens(tokens_file, tokens)
    table = new_table("device", "is")
    for key, meaning in _MEANINGS:
        for name in found[key]:
            table.add_row(name, meaning)
    print_answer({**found, "tokens": sorted(tokens)}, table, as_json=as_json)
    if tokens_file and not as_json:
        click.echo(f"{len(tokens)} tokens, good for {ttl_s:.0f} s, in {tokens_file}")


@fleet.command("export")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="File to write. Default: stdout.",
)
@as_json_option
@click.pass_obj
def export_inventory(server: ServerAddress, *, out: Path | None, as_json: bool) -> None:
    """Write an inventory of the devices that the server knows.

    Revoked devices are left out. Boards are comments; addresses are those of the
    last import. Passwords and files of datasets are not known to the server.
    With --json: the devices themselves.
    """
    from broker_server.fleet_inventory import write_inventory
    from broker_server.pki_folder import PUBLIC, replace_file
    from wire_protocol.command_line import echo_json

    with server.connect() as api:
        health = api.health()
        devices = [one for one in api.devices() if one["state"] != "revoked"]
    if as_json:
        keys = ("device_id", "address", "board", "state")
        echo_json([{key: one.get(key) for key in keys} for one in devices])
        return
    text = write_inventory(_site(server.url, health), devices)
    if out is None:
        click.echo(text, nl=False)
        return
    replace_file(out, text, site="operator.inventory", mode=PUBLIC)
    click.echo(f"{len(devices)} devices in {out}")


def _site(url: str, health: dict[str, Any]) -> Site:
    from urllib.parse import urlsplit

    from broker_server.fleet_inventory import Site

    parts = urlsplit(url)
    default = 443 if parts.scheme == "https" else 80
    return Site(
        host=parts.hostname or "",
        port=parts.port or default,
        url=url.rstrip("/"),
        fleet=str(health["fleet"]),
        version=str(health["version"]),
    )


def _write_tokens(path: Path, tokens: dict[str, str]) -> None:
    from broker_server.pki_folder import PRIVATE, replace_file

    lines = [f'"{device_id}": "{token}"\n' for device_id, token in sorted(tokens.items())]
    text = "".join(lines) or "{}\n"
    replace_file(path, text, site="operator.enrolment_tokens", mode=PRIVATE)
