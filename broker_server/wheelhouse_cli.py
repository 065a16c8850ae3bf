"""``legend wheelhouse``: wheels for boards without a network."""

# ruff: noqa: PLC0415 - lazy imports keep --help instant

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from broker_server.wheelhouse import Purpose


@click.group()
def wheelhouse() -> None:
    """Wheels for boards that have no network."""


@wheelhouse.command()
@click.option("--for", "board_id", required=True, metavar="BOARD", help="A board's profile.")
@click.option(
    "--wheel",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="This project's own wheel: pip wheel --no-deps --wheel-dir dist .",
)
@click.option(
    "--out",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("wheelhouse"),
    show_default=True,
    help="Folder to fill; name it in the inventory.",
)
@click.option(
    "--purpose",
    type=click.Choice(["agent", "train", "server"]),
    default="train",
    show_default=True,
    help="The agent alone, with what trains, or the server.",
)
@click.option("--system", help="Part of the name of the board's system, e.g. trixie.")
def build(board_id: str, wheel: Path, folder: Path, purpose: Purpose, system: str | None) -> None:
    """Fetch every wheel that BOARD needs, on a machine that has a network."""
    from broker_server.wheelhouse import fill, wanted_for

    wanted = wanted_for(board_id, purpose, wheel=wheel, system=system)
    click.echo(f"{board_id}: Python {wanted.python}, {wanted.platforms[0]}", err=True)
    fill(folder, wanted)
    count = len(list(folder.glob("*.whl")))
    click.echo(f"{count} wheels in {folder}; set edge_agent_wheelhouse to it in the inventory")
