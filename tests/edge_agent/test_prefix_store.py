"""Hidden states on disk: what is read back is what was stored, or nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from edge_agent.prefix_store import PrefixStore

PLENTY = 10**9


def digest(number: int) -> bytes:
    return number.to_bytes(16, "big")


def content(number: int, size: int = 5000) -> bytes:
    return bytes((number + at) % 251 for at in range(size))


@pytest.fixture
def store(tmp_path: Path) -> PrefixStore:
    return PrefixStore(tmp_path / "prefix", PLENTY)


def test_what_was_stored_is_read_back_also_later(store: PrefixStore) -> None:
    with store.shelf("a") as shelf:
        assert shelf.get(digest(1)) is None
        assert shelf.put([(digest(number), content(number)) for number in range(5)])
        assert shelf.get(digest(3)) == content(3)
    with store.shelf("a") as again:
        assert [again.get(digest(number)) for number in range(6)] == [
            *(content(number) for number in range(5)),
            None,
        ]


def test_shelves_know_nothing_of_each_other(store: PrefixStore) -> None:
    with store.shelf("a") as one, store.shelf("b") as other:
        one.put([(digest(1), content(1))])
        assert digest(1) in one
        assert digest(1) not in other


def test_two_processes_see_what_the_other_one_stores(store: PrefixStore) -> None:
    with store.shelf("a") as one:
        one.put([(digest(1), content(1))])
        with store.shelf("a") as other:
            other.put([(digest(2), content(2))])
            one.put([(digest(3), content(3))])
            assert other.get(digest(3)) == content(3)
        assert one.get(digest(2)) == content(2)


def test_a_torn_record_is_not_read_and_is_written_over(store: PrefixStore, tmp_path: Path) -> None:
    with store.shelf("a") as shelf:
        shelf.put([(digest(1), content(1))])
    with (tmp_path / "prefix/a/index").open("ab") as index:
        index.write(digest(2) + b"half")
    with store.shelf("a") as shelf:
        assert digest(2) not in shelf
        shelf.put([(digest(3), content(3))])
    with store.shelf("a") as shelf:
        assert shelf.get(digest(1)) == content(1)
        assert shelf.get(digest(3)) == content(3)


def test_states_that_a_power_cut_lost_count_as_absent(store: PrefixStore, tmp_path: Path) -> None:
    with store.shelf("a") as shelf:
        shelf.put([(digest(1), content(1)), (digest(2), content(2))])
    states = tmp_path / "prefix/a/states"
    data = bytearray(states.read_bytes())
    data[100:200] = bytes(100)
    states.write_bytes(bytes(data))
    with store.shelf("a") as shelf:
        assert shelf.get(digest(1)) is None
        assert digest(1) not in shelf
        assert shelf.get(digest(2)) == content(2)
        shelf.put([(digest(1), content(1))])
        assert shelf.get(digest(1)) == content(1)


def test_states_that_end_too_early_count_as_absent(store: PrefixStore, tmp_path: Path) -> None:
    with store.shelf("a") as shelf:
        shelf.put([(digest(1), content(1))])
    os.truncate(tmp_path / "prefix/a/states", 1000)
    with store.shelf("a") as shelf:
        assert shelf.get(digest(1)) is None


def test_the_least_recently_used_shelf_makes_room(tmp_path: Path) -> None:
    store = PrefixStore(tmp_path, 35_000)
    for name in ("old", "older", "new"):
        with store.shelf(name) as shelf:
            shelf.put([(digest(1), content(1)), (digest(2), content(2))])
    os.utime(tmp_path / "older", (1, 1))
    os.utime(tmp_path / "old", (2, 2))
    with store.shelf("new") as shelf:
        assert shelf.put([(digest(3), content(3))])
    assert store.used_bytes() <= 35_000
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["new", "old"]


def test_a_shelf_that_fills_the_cap_alone_keeps_what_it_has(tmp_path: Path) -> None:
    store = PrefixStore(tmp_path, 12_000)
    with store.shelf("a") as shelf:
        assert shelf.put([(digest(1), content(1)), (digest(2), content(2))])
        assert not shelf.put([(digest(3), content(3))])
        assert shelf.get(digest(1)) == content(1)
        assert shelf.get(digest(3)) is None
    assert store.used_bytes() <= 12_000


def test_a_cap_of_nothing_stores_nothing(tmp_path: Path) -> None:
    with PrefixStore(tmp_path, 0).shelf("a") as shelf:
        assert not shelf.put([(digest(1), content(1))])
        assert shelf.get(digest(1)) is None


def test_a_place_that_cannot_be_written_is_a_cache_that_stays_empty(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with PrefixStore(tmp_path / "file" / "prefix", PLENTY).shelf("a") as shelf:
        assert not shelf.put([(digest(1), content(1))])
        assert shelf.get(digest(1)) is None


def test_files_are_readable_by_their_owner_only(store: PrefixStore, tmp_path: Path) -> None:
    with store.shelf("a") as shelf:
        shelf.put([(digest(1), content(1))])
    for path in (tmp_path / "prefix").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0


WRITER = """
import sys
from pathlib import Path
from edge_agent.prefix_store import PrefixStore
with PrefixStore(Path(sys.argv[1]), 10**9).shelf("a") as shelf:
    number = 0
    while True:
        entries = []
        for _ in range(3):
            data = bytes((number + at) % 251 for at in range(5000))
            entries.append((number.to_bytes(16, "big"), data))
            number += 1
        shelf.put(entries)
        print(number, flush=True)
"""


@pytest.mark.parametrize("lives", [1, 4, 9])
def test_a_writer_that_is_killed_leaves_nothing_false(tmp_path: Path, lives: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    known = 0
    for _ in range(lives * 3):
        known = int(process.stdout.readline())
    # In the middle of whatever it does now.
    killer = threading.Timer(0.001 * lives, process.send_signal, (signal.SIGKILL,))
    killer.start()
    process.stdout.read()
    assert process.wait() == -signal.SIGKILL
    with PrefixStore(tmp_path, PLENTY).shelf("a") as shelf:
        for number in range(known):
            assert shelf.get(digest(number)) == content(number)
        for number in range(known, known + 10_000):
            assert shelf.get(digest(number)) in (None, content(number))
        assert shelf.put([(b"x" * 16, content(7))])
        assert shelf.get(b"x" * 16) == content(7)
