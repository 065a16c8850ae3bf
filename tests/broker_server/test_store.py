"""What the server must not forget, on a real SQLite file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from broker_server.store import Store
from wire_protocol.errors import ConfigError


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.in_folder(tmp_path)


def test_an_update_counts_once_per_run_round_and_device(store: Store) -> None:
    assert store.record_update("run", 1, "a", "first")
    assert not store.record_update("run", 1, "a", "again")
    assert store.record_update("run", 2, "a", "next round")
    assert store.record_update("run", 1, "b", "other device")
    assert store.updates("run", 1) == {"a": "first", "b": "other device"}


def test_a_round_and_the_state_after_it_are_committed_together(store: Store) -> None:
    store.create_run("run", "{}")
    store.save_checkpoint("run", "after", result=(1, "result"))
    record = store.run("run")
    assert record is not None
    assert (record.checkpoint, list(store.rounds("run"))) == ("after", ["result"])


def test_runs_keep_their_order_and_their_end(store: Store) -> None:
    for name in ("zebra", "ant"):
        store.create_run(name, "{}")
    store.set_status("zebra", "failed", "nobody came")
    assert [(r.run_id, r.status, r.reason) for r in store.runs()] == [
        ("zebra", "failed", "nobody came"),
        ("ant", "queued", ""),
    ]
    assert store.run("none") is None


def test_a_model_name_means_its_newest_digest_and_the_old_one_stays_reachable(
    store: Store,
) -> None:
    store.save_model("1" * 64, "base", files="[]", config="{}")
    store.save_model("2" * 64, "base", files="[]", config="{}")
    newest, oldest = store.model("base"), store.model("1" * 64)
    assert newest is not None
    assert oldest is not None
    assert (newest.digest, oldest.name) == ("2" * 64, "base@111111111111")


def test_what_was_committed_survives_kill_9(tmp_path: Path) -> None:
    script = (
        "import sys, os, signal\n"
        "from pathlib import Path\n"
        "from broker_server.store import Store\n"
        "store = Store.in_folder(Path(sys.argv[1]))\n"
        "store.create_run('run', '{}')\n"
        "store.record_update('run', 1, 'a', 'kept')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], check=False, env={**os.environ}
    )
    assert done.returncode == -signal.SIGKILL
    assert Store.in_folder(tmp_path).updates("run", 1) == {"a": "kept"}


def test_a_database_that_cannot_be_opened_is_one_line_without_its_password() -> None:
    with pytest.raises(ConfigError) as caught:
        Store("sqlite:////nowhere/at/all/server.db")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        Store("nonsense://user:secret@host/db")
    assert "secret" not in str(caught.value)
