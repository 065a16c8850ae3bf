"""What every program of ours does alike: errors become one line, logs have one format."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import click

from wire_protocol.errors import LegendError

INTERRUPTED_EXIT_CODE = 130


class OneLineErrors(click.Group):
    """Turns every error that is raised on purpose into one line and its exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; anything but a ``LegendError`` is a bug and keeps its traceback."""
        try:
            return super().invoke(ctx)
        except LegendError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED_EXIT_CODE)


def configure_logging(level: str) -> None:
    """JSON lines for journald, coloured text for a person at a terminal; to stderr."""
    import structlog  # noqa: PLC0415 - --help must answer at once

    terminal = sys.stderr.isatty()
    renderer: Any = (
        structlog.dev.ConsoleRenderer() if terminal else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def echo_json(value: object) -> None:
    """Print a value for programs."""
    click.echo(json.dumps(value, indent=2, default=str))
