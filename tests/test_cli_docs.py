from __future__ import annotations

import click
import pytest

from tools.generate_cli_docs import PROGRAMS, TARGET, commands, document, program

EVERY_COMMAND = [
    pytest.param(command, id=path)
    for name in PROGRAMS
    for path, command, _context in commands(program(name), name)
]


def test_the_page_of_commands_is_current() -> None:
    assert TARGET.read_text(encoding="utf-8") == document(), (
        "run: python -m tools.generate_cli_docs"
    )


@pytest.mark.parametrize("command", EVERY_COMMAND)
def test_every_command_and_every_option_explains_itself(command: click.Command) -> None:
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name


def test_every_program_has_commands() -> None:
    for name in PROGRAMS:
        assert len(list(commands(program(name), name))) > 1
