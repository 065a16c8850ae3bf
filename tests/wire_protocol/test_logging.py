"""Not on a terminal, every line that a program of ours writes to its log is one JSON object."""

from __future__ import annotations

import json
import subprocess
import sys

PROGRAM = """
import logging, sys, threading, warnings
import structlog
from wire_protocol.command_line import configure_logging
configure_logging(sys.argv[1])
structlog.get_logger().debug("ours_debug", secret_free=True)
structlog.get_logger().info("ours", text="two\\nlines")
logging.getLogger("httpx").info("HTTP Request: GET http://user:password@host")
logging.getLogger("httpcore").debug("Authorization: Bearer password")
logging.getLogger("uvicorn.error").warning("theirs %s", "filled in")
warnings.warn("look out")
try:
    1 / 0
except ZeroDivisionError:
    structlog.get_logger().exception("caught")
    logging.getLogger("library").exception("caught by a library")
thread = threading.Thread(target=lambda: [][1], name="worker")
thread.start()
thread.join()
raise RuntimeError("the end")
"""


def lines(level: str) -> list[dict[str, object]]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, level], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stdout == ""
    return [json.loads(line) for line in done.stderr.splitlines()]


def test_every_line_is_json_tracebacks_warnings_and_crashes_too() -> None:
    found = {str(line["event"]): line for line in lines("info")}
    assert found["ours"]["text"] == "two\nlines"
    assert found["theirs filled in"]["logger"] == "uvicorn.error"
    assert found["theirs filled in"]["level"] == "warning"
    assert any("look out" in event for event in found)
    for event in ("caught", "caught by a library"):
        assert "ZeroDivisionError" in str(found[event]["exception"])
    assert "IndexError" in str(found["thread_crashed"]["exception"])
    assert "RuntimeError: the end" in str(found["crashed"]["exception"])
    assert all({"event", "level", "timestamp"} <= set(line) for line in found.values())


def test_at_debug_level_libraries_do_not_quote_requests() -> None:
    found = lines("debug")
    assert any(line["event"] == "ours_debug" for line in found)
    assert "password" not in json.dumps(found)


def test_a_service_does_not_carry_what_only_a_terminal_needs() -> None:
    program = """
import sys
from wire_protocol.command_line import configure_logging
configure_logging("info")
import structlog
assert "rich" not in sys.modules
from rich.console import Console
Console().print("[bold]a table, later[/bold]")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("a table, later\n", "")
