"""Restoring with real processes: killed ones, refusing ones, and a fleet that goes on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from broker_server.backup import UNFINISHED
from broker_server.backup_archive import unpack
from broker_server.restore import STARTS_AHEAD, restore
from broker_server.server_state import ServerState
from broker_server.store import Store
from tests.support.in_process_server import server_in
from tests.support.saved_server import fill, save, settings
from tests.support.site import Site
from wire_protocol.durable import DIE_AT

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("step", ["server.restore/done", "server.restore.done/begin"])
def test_a_restore_that_was_killed_is_run_again_before_the_server_starts(
    tmp_path: Path, step: str
) -> None:
    with server_in(tmp_path / "old") as server:
        fill(server)
        archive = save(server, tmp_path / "backup.tar")
    state = tmp_path / "new"
    state.mkdir()
    (state / "start_number").write_text("3\n")
    file = tmp_path / "server.yml"
    file.write_text(yaml.safe_dump({"fleet": "home", "state_dir": str(state), "port": 0}))
    command = [sys.executable, "-m", "broker_server.cli", "restore", str(archive), "--force"]
    # The third time: the two counters are written at the same site, beside the old state.
    died = step + ("#3" if step == "server.restore/done" else "")
    done = subprocess.run(
        [*command, "--settings", str(file)], env={**os.environ, DIE_AT: died}, check=False
    )
    assert done.returncode == -signal.SIGKILL
    refused = serve(state)
    assert refused.returncode == 78
    assert "interrupted; run it again" in refused.stderr
    restore(archive, settings(state), force=True)
    assert ServerState(state).count_start() > STARTS_AHEAD
    assert not (state / UNFINISHED).exists()


def serve(state_dir: Path) -> subprocess.CompletedProcess[str]:
    file = state_dir.parent / "server.yml"
    file.write_text(yaml.safe_dump({"fleet": "home", "state_dir": str(state_dir), "port": 0}))
    return subprocess.run(
        [sys.executable, "-m", "broker_server.cli", "serve", "--settings", str(file)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("place", [0, 100_000])
def test_a_damaged_database_stops_the_server_with_one_line_that_says_what_to_do(
    tmp_path: Path, place: int
) -> None:
    store = Store.in_folder(tmp_path)
    for number in range(300):
        store.save_device(f"pi-{number}", 1, "x" * 900)
    store.close()
    with (tmp_path / "server.db").open("r+b") as file:
        file.seek(place)
        file.write(b"\xff" * 600)
    done = serve(tmp_path)
    assert done.returncode == 78
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "is damaged" in error
    assert "broker-server restore FILE" in error
    assert "Traceback" not in done.stderr


@pytest.mark.e2e
@pytest.mark.timeout(900)
@pytest.mark.train
def test_a_run_goes_on_from_a_backup_with_devices_that_were_further(tmp_path: Path) -> None:
    site = Site(tmp_path, patience_s=300.0)
    backup = tmp_path / "backup.tar"
    try:
        site.start_server()
        site.add_model()
        for name in ("left", "right"):
            site.start_agent(name)
        site.wait_for_devices("left", "right")
        run_id = site.launch(rounds=5)
        site.until(lambda: len(site.run(run_id)["rounds"]) >= 1, "a round is committed")
        with site.api() as api:
            api.backup(backup)
        saved = unpack(backup, None)
        assert saved.runs == {run_id: "running"}
        before = site.wait_for_end(run_id)
        assert before["status"] == "finished"
        site.kill("server")
        shutil.rmtree(tmp_path / "server")
        done = subprocess.run(
            [sys.executable, "-m", "broker_server.cli", "restore", str(backup), "--settings",
             str(tmp_path / "server.yml")],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert f"run {run_id} goes on with round" in done.stdout
        site.start_server()
        after = site.wait_for_end(run_id)
        assert (after["status"], len(after["rounds"])) == ("finished", 5)
        # Nobody waited for a device that thought it had done its part.
        statuses = {d["status"] for r in after["rounds"] for d in r["devices"]}
        assert statuses == {"updated"}
        for name in ("left", "right"):
            site.wait_for_empty_outbox(name)
        # The site's agents went on as if nothing had happened: another run works too.
        assert site.wait_for_end(site.launch(rounds=1))["status"] == "finished"
    finally:
        site.close()
