"""``legend devices``: the fleet, and who is let into it."""

# ruff: noqa: PLC0415 - lazy imports keep --help instant

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from broker_server.cli_output import as_json_option, print_answer

if TYPE_CHECKING:
    from broker_server.operator_cli import ServerAddress


@click.group(invoke_without_command=True)
@click.option("--pending", is_flag=True, help="List those that wait to be accepted.")
@as_json_option
@click.pass_context
def devices(ctx: click.Context, pending: bool, as_json: bool) -> None:
    """List the fleet: what each device measured and what data it has.

    With a subcommand: decide who belongs to it. Compare the key of a device
    that waits with what edge-agent enroll shows on the device itself.
    """
    if ctx.invoked_subcommand is not None:
        return
    from broker_server.tables import devices_table, enrolments_table

    server: ServerAddress = ctx.obj
    with server.connect() as api:
        if pending:
            waiting = [one for one in api.enrolments() if one["status"] == "pending"]
            print_answer(waiting, enrolments_table(waiting), as_json=as_json)
        else:
            found = api.devices()
            print_answer(found, devices_table(found), as_json=as_json)


@devices.command()
@click.argument("name")
@click.pass_obj
def accept(server: ServerAddress, name: str) -> None:
    """Let a device in that waits; one that had the name before is thrown out."""
    _decide(server, name, "accept")
    click.echo(f"{name} is accepted")


@devices.command()
@click.argument("name")
@click.pass_obj
def reject(server: ServerAddress, name: str) -> None:
    """Turn a device away that waits."""
    _decide(server, name, "reject")
    click.echo(f"{name} is rejected; it needs a new token to ask again")


@devices.command()
@click.argument("name")
@click.pass_obj
def revoke(server: ServerAddress, name: str) -> None:
    """Throw a device out: its certificates are void and its connections end."""
    _decide(server, name, "revoke")
    click.echo(f"{name} is revoked; it needs a new token and a new key to come back")


def _decide(server: ServerAddress, name: str, decision: str) -> None:
    with server.connect() as api:
        api.decide(name, decision)
