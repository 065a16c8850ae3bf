"""What every program of ours does alike: errors become one line, logs have one format."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import threading
from collections.abc import Iterator
from types import TracebackType
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
    """JSON lines for journald, coloured text for a person at a terminal; to stderr.

    What libraries log, and what crashes a thread or the program, is written the same way.

    Args:
        level: of our own messages. Libraries stay at ``warning``: at lower levels they quote
            requests, and with them what must not be in a log.
    """
    terminal = sys.stderr.isatty()
    with contextlib.nullcontext() if terminal else _unavailable("rich"):
        # It loads rich for tracebacks at a terminal: 5 MB that a service never uses.
        import structlog  # noqa: PLC0415 - --help must answer at once

    renderer: Any = (
        structlog.dev.ConsoleRenderer() if terminal else structlog.processors.JSONRenderer()
    )
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last: list[Any] = [structlog.processors.format_exc_info, renderer]
    structlog.configure(
        processors=[*shared, *last],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
    if not terminal:
        _log_crashes(structlog.get_logger())


@contextlib.contextmanager
def _unavailable(package: str) -> Iterator[None]:
    """Who tries to import a package meanwhile does without; where it is loaded, nothing changes."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]  # what the import system documents
    try:
        yield
    finally:
        del sys.modules[package]


def _log_crashes(log: Any) -> None:
    """A bug keeps its traceback, but as one JSON line; a Ctrl-C is no bug."""

    def crashed(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if issubclass(kind, KeyboardInterrupt):
            sys.__excepthook__(kind, error, trace)
        else:
            log.critical("crashed", exc_info=(kind, error, trace))

    def thread_crashed(happened: threading.ExceptHookArgs) -> None:
        name = happened.thread.name if happened.thread else "?"
        error = happened.exc_value or happened.exc_type()
        log.critical(
            "thread_crashed",
            thread=name,
            exc_info=(happened.exc_type, error, happened.exc_traceback),
        )

    sys.excepthook = crashed
    threading.excepthook = thread_crashed


def echo_json(value: object) -> None:
    """Print a value for programs."""
    click.echo(json.dumps(value, indent=2, default=str))
