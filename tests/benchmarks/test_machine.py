"""What a tree of processes took is told from /proc."""

from __future__ import annotations

import subprocess
import sys
import time

from benchmarks._machine import machine, tree_of, usage_of, usage_of_trees

GRANDCHILD = "import time; end = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
PARENT = f"""
import subprocess, sys
subprocess.run([sys.executable, "-c", {GRANDCHILD!r}])
print("done", flush=True)
sys.stdin.read()
"""


def test_work_of_a_child_that_has_ended_is_counted_with_its_parent() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdin is not None
        assert parent.stdout.readline() == b"done\n"
        usage = usage_of_trees([parent.pid])
        assert usage.processes == 1
        assert usage.cpu_s >= 0.3
        assert usage.rss_bytes > 1_000_000
        parent.stdin.close()
    assert tree_of(parent.pid) == []
    assert usage_of([parent.pid]).processes == 0


def test_a_tree_holds_the_children_that_live() -> None:
    sleeper = "import sys; sys.stdin.read()"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {sleeper!r}])"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE) as parent:
        assert parent.stdin is not None
        give_up_at = time.monotonic() + 60
        while len(tree_of(parent.pid)) < 2:
            assert time.monotonic() < give_up_at
            time.sleep(0.05)
        parent.stdin.close()


def test_the_machine_is_named_with_its_cores() -> None:
    assert "cores" in machine()
