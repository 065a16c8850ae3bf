"""How commands of ``legend`` answer: as JSON for a program, as a picture for a person."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from wire_protocol.command_line import echo_json

if TYPE_CHECKING:
    from rich.console import RenderableType

as_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, not a table.")


def print_answer(value: object, picture: RenderableType, *, as_json: bool) -> None:
    """Print an answer."""
    if as_json:
        echo_json(value)
        return
    from rich.console import Console  # noqa: PLC0415 - slow to import

    # A pipe has no width; tables must not be folded for it.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(picture, highlight=False)
