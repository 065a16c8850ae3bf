"""Writes docs/cli.md from the help of the three programs; ``--check`` only compares."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import click

PROGRAMS = {
    "edge-agent": "edge_agent.cli",
    "broker-server": "broker_server.cli",
    "legend": "broker_server.operator_cli",
}
TARGET = Path(__file__).parents[1] / "docs" / "cli.md"
_WIDTH = 88
_HEADING = """\
# Commands

Generated from the programs' own help by `python -m tools.generate_cli_docs`; do not edit.

Exit codes of all three, after sysexits(3): 0 done, 2 wrong command line, 69 a peer does not
answer, 70 this device cannot do the work, 75 already running or not accepted yet, 76 a peer
broke the protocol, 77 refused, 78 a file or flag is wrong, 130 interrupted.
"""


def program(name: str) -> click.Command:
    """The click command of one of our programs."""
    command = importlib.import_module(PROGRAMS[name]).main
    if not isinstance(command, click.Command):
        raise TypeError(f"{PROGRAMS[name]}:main is no click command")
    return command


def commands(
    command: click.Command, name: str, parent: click.Context | None = None
) -> Iterator[tuple[str, click.Command, click.Context]]:
    """A command and everything below it: full name, command, context for its help."""
    context = click.Context(
        command, info_name=name, parent=parent, terminal_width=_WIDTH, max_content_width=_WIDTH
    )
    yield context.command_path, command, context
    if isinstance(command, click.Group):
        for child_name in command.list_commands(context):
            child = command.get_command(context, child_name)
            if child is not None and not child.hidden:
                yield from commands(child, child_name, context)


def document() -> str:
    """The whole page as Markdown."""
    parts = [_HEADING]
    for name in PROGRAMS:
        for path, command, context in commands(program(name), name):
            level = "##" if context.parent is None else "###"
            parts.append(f"{level} {path}\n\n```text\n{command.get_help(context)}\n```\n")
    return "\n".join(parts)


def main() -> None:
    """Write the page, or fail if it is not current."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if out of date")
    text = document()
    if not parser.parse_args().check:
        TARGET.write_text(text, encoding="utf-8")
    elif not TARGET.exists() or TARGET.read_text(encoding="utf-8") != text:
        sys.exit(f"{TARGET} is out of date; run: python -m tools.generate_cli_docs")


if __name__ == "__main__":
    main()
