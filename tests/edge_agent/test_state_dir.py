"""The state directory: layout, lock, counters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge_agent.state_dir import Counter, StateDir, disk_error, write_durably
from wire_protocol.errors import AlreadyRunning, ConfigError, DeviceError, FailureCode

HOLDS_THE_LOCK = """
import sys
from pathlib import Path
from edge_agent.state_dir import StateDir
with StateDir(Path(sys.argv[1])).locked():
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_the_directory_is_made_for_its_owner_only(tmp_path: Path) -> None:
    state = StateDir(tmp_path / "deep" / "state")
    assert state.root.stat().st_mode & 0o777 == 0o700
    assert all(
        folder.is_dir() for folder in (state.outbox, state.rounds, state.blobs, state.models)
    )


def test_a_path_that_is_a_file_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("not a folder")
    with pytest.raises(ConfigError, match="state directory"):
        StateDir(tmp_path / "state")


def test_a_second_agent_is_turned_away_with_the_pid_of_the_first(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS_THE_LOCK, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as first:
        assert first.stdout is not None
        first.stdout.readline()
        state = StateDir(tmp_path)
        with pytest.raises(AlreadyRunning, match=f"pid {first.pid}"), state.locked():
            pass
        first.kill()
        first.wait()
        with state.locked():
            assert int((tmp_path / "lock").read_text()) == os.getpid()


def test_the_lock_can_be_taken_again_after_it_was_given_back(tmp_path: Path) -> None:
    state = StateDir(tmp_path)
    for _ in range(2):
        with state.locked():
            pass
    with state.locked(), pytest.raises(AlreadyRunning), state.locked():
        pass


def test_a_counter_grows_by_one_over_restarts(tmp_path: Path) -> None:
    assert StateDir(tmp_path).counter("sid").value == 0
    handed_out = [StateDir(tmp_path).counter("sid").increment() for _ in range(3)]
    assert handed_out == [1, 2, 3]
    assert StateDir(tmp_path).counter("sid").value == 3
    assert StateDir(tmp_path).counter("other").increment() == 1


def test_a_damaged_counter_does_not_stop_the_agent(tmp_path: Path) -> None:
    (tmp_path / "sid").write_bytes(b"\x00\x00")
    assert Counter(tmp_path / "sid").increment() == 1


def test_a_durable_write_replaces_the_whole_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "file"
    write_durably(target, b"a long first content", site="test")
    write_durably(target, b"short", site="test")
    assert target.read_bytes() == b"short"
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_write_says_which_file(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="missing/file"):
        write_durably(tmp_path / "missing" / "file", b"x", site="test")


def test_a_full_disk_has_its_own_code() -> None:
    full = disk_error(Path("/x"), OSError(28, "No space left on device"))
    broken = disk_error(Path("/x"), OSError(5, "Input/output error"))
    assert (full.code, broken.code) == (FailureCode.DISK_FULL, FailureCode.INTERNAL)


def test_the_adapters_used_longest_ago_are_removed_first(tmp_path: Path) -> None:
    state = StateDir(tmp_path)
    for age, name in enumerate(["oldest", "older", "newest"]):
        path = state.blobs / name
        path.write_bytes(b"x" * 100)
        os.utime(path, (1000 + age, 1000 + age))
    assert state.trim_blobs(250) == 100
    assert {path.name for path in state.blobs.iterdir()} == {"older", "newest"}
