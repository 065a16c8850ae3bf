from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

from broker_server.demo_children import Children, child_environment, last_words
from wire_protocol.errors import LegendError

pytestmark = pytest.mark.integration

READY = "import sys, time; print('ready', flush=True); "
FOREVER = READY + "time.sleep(1000)"
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + FOREVER


def start(children: Children, name: str, code: str) -> subprocess.Popen[bytes]:
    return children.start(name, [sys.executable, "-c", code]).process


def wait_until_ready(log: Path, process: subprocess.Popen[bytes]) -> None:
    while "ready" not in last_words(log):
        assert process.poll() is None


def test_every_process_ends_with_the_block_even_when_it_breaks(tmp_path: Path) -> None:
    children, processes = Children(tmp_path), []
    with contextlib.suppress(KeyboardInterrupt), children:
        processes = [start(children, name, FOREVER) for name in ("a", "b")]
        children.check()
        raise KeyboardInterrupt
    assert len(processes) == 2
    assert all(process.returncode == -15 for process in processes)


def test_a_process_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    with Children(tmp_path, stop_patience_s=0.2) as children:
        process = start(children, "deaf", DEAF)
        wait_until_ready(tmp_path / "deaf.log", process)
    assert process.returncode == -9


def test_a_process_that_ended_by_itself_is_named_with_its_last_words(tmp_path: Path) -> None:
    code = "import sys; print('first'); print('cannot  go on', file=sys.stderr); sys.exit(3)"
    with Children(tmp_path) as children:
        start(children, "fine", FOREVER)
        start(children, "nano-5w", code).wait()
        with pytest.raises(LegendError) as caught:
            children.check()
    assert "nano-5w ended with exit code 3: " in str(caught.value)
    assert "cannot go on" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_killed_process_is_named_with_its_signal(tmp_path: Path) -> None:
    with Children(tmp_path) as children:
        process = start(children, "nano", FOREVER)
        process.kill()
        process.wait()
        with pytest.raises(LegendError, match="nano was killed by signal 9"):
            children.check()


def test_settings_meant_for_real_programs_do_not_reach_the_demonstration() -> None:
    ours = {
        "EDGE_AGENT_FLEET": "real",
        "BROKER_SERVER_TOKEN": "x",
        "LEGEND_SERVER": "y",
        "HOME": "h",
    }
    kept = child_environment(ours)
    assert kept["HOME"] == "h"
    assert kept.keys().isdisjoint({"EDGE_AGENT_FLEET", "BROKER_SERVER_TOKEN", "LEGEND_SERVER"})
    assert kept["OMP_NUM_THREADS"] == "1"
