"""Disks that are really full: what was acknowledged stays, the rest waits until there is space."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import anyio
import pytest
import yaml

from broker_server.blobs import BlobStore, DiskFull
from broker_server.disk_space import DatabaseUnavailable, until_stored
from broker_server.run_folder import write_file
from broker_server.store import Store
from edge_agent.outbox import Outbox, OutgoingMessage
from edge_agent.outcome import outcome_of
from edge_agent.round_directory import RESULT_FILE
from edge_agent.session import WorkFailed
from edge_agent.state_dir import StateDir
from tests.support.full_disk import SmallDisk, small_disk
from tests.support.site import Site
from wire_protocol.durable import write_durably
from wire_protocol.errors import DeviceError, FailureCode
from wire_protocol.messages import UpdateManifest

pytestmark = pytest.mark.integration

SLOW = {
    "board": "jetson-nano",
    "time_dilation": 40000,
    "link": {"up_mbps": 1e7, "down_mbps": 1e7, "round_trip_ms": 0.0},
}
"""Stretches a step of the tiny model to about a third of a second: time to fill a disk."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", megabytes=2) as disk:
        yield disk


def test_a_commit_that_does_not_fit_is_one_line_and_what_was_committed_stays(
    disk: SmallDisk,
) -> None:
    store = Store.in_folder(disk.root)
    assert store.record_update("run", 1, "pi", "acknowledged")
    disk.fill()
    with pytest.raises(DatabaseUnavailable) as caught:
        record_many(store)
    assert "no space" in str(caught.value)
    assert "\n" not in str(caught.value)
    committed = len(store.updates("run", 2))
    assert store.updates("run", 1) == {"pi": "acknowledged"}
    disk.make_space()
    assert store.record_update("run", 2, "late", "x" * 10_000)
    store.close()
    again = Store.in_folder(disk.root)
    assert again.updates("run", 1) == {"pi": "acknowledged"}
    assert len(again.updates("run", 2)) == committed + 1
    again.close()


def record_many(store: Store) -> None:
    for number in range(100):
        store.record_update("run", 2, f"pi-{number}", "x" * 10_000)


def test_the_server_waits_for_space_and_then_commits(disk: SmallDisk) -> None:
    store = Store.in_folder(disk.root)
    disk.fill()
    tried = anyio.Event()

    async def commit() -> bool:
        try:
            return store.record_update("run", 1, "pi", "x" * 100_000)
        finally:
            tried.set()

    stored: list[bool] = []

    async def wait_and_commit() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(make_space_later)
            stored.append(await until_stored(commit, what="an update"))

    async def make_space_later() -> None:
        await tried.wait()
        disk.make_space()

    anyio.run(wait_and_commit)
    assert stored == [True]
    assert set(store.updates("run", 1)) == {"pi"}
    store.close()


def test_an_upload_keeps_what_arrived_and_goes_on_when_there_is_space(disk: SmallDisk) -> None:
    blobs = BlobStore(disk.root / "blobs")
    content = random.Random(1).randbytes(1_000_000)
    sha256 = hashlib.sha256(content).hexdigest()
    offset = blobs.open_upload(sha256, len(content)).offset
    assert offset == 0
    disk.fill()
    with pytest.raises(DiskFull):
        blobs.append(sha256, 0, content)
    with pytest.raises(DiskFull):
        blobs.open_upload(sha256, len(content))
    with pytest.raises(DiskFull):
        blobs.put(content[:5000])
    assert not blobs.has(sha256)
    disk.make_space()
    upload = blobs.open_upload(sha256, len(content))
    assert not upload.complete
    assert blobs.append(sha256, upload.offset, content[upload.offset :]).complete
    assert blobs.read(sha256) == content


def test_a_result_file_is_the_old_one_or_the_new_one(disk: SmallDisk) -> None:
    path = disk.root / "summary.json"
    write_file(path, b"old")
    disk.fill()
    with pytest.raises(OSError, match="No space"):
        write_file(path, b"new" * 10_000)
    assert path.read_bytes() == b"old"
    disk.make_space()
    write_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert [one.name for one in disk.root.iterdir()] == ["summary.json"]


def test_an_update_that_cannot_be_written_down_is_sent_and_written_later(disk: SmallDisk) -> None:
    state = StateDir(disk.root / "agent")
    outbox = Outbox(state.outbox, rng=random.Random(1), now=0.0)
    kept = OutgoingMessage("update-kept", "up/update", b"first")
    outbox.add(kept, now=0.0)
    disk.fill()
    message = OutgoingMessage("update-a", "up/update", b"x" * 12_000)
    with pytest.raises(DeviceError) as caught:
        outbox.add(message, now=0.0)
    assert caught.value.code is FailureCode.DISK_FULL
    assert message in outbox.due(0.0)
    assert not (state.outbox / "update-a.json").exists()
    disk.make_space()
    assert message in outbox.due(1000.0)
    after_a_kill = Outbox(state.outbox, rng=random.Random(1), now=0.0)
    assert set(after_a_kill.message_ids) == {"update-kept", "update-a"}
    assert outbox.acknowledged("update-a")
    assert set(Outbox(state.outbox, rng=random.Random(1), now=0.0).message_ids) == {"update-kept"}


def test_a_session_number_is_never_handed_out_twice_by_a_full_disk(disk: SmallDisk) -> None:
    counter = StateDir(disk.root / "agent").counter("sid")
    assert counter.increment() == 1
    disk.fill()
    with pytest.raises(DeviceError):
        counter.increment()
    assert counter.value == 1
    disk.make_space()
    assert counter.increment() == 2


def test_a_round_directory_never_holds_half_a_result(disk: SmallDisk) -> None:
    round_dir = disk.root / "round"
    round_dir.mkdir()
    disk.fill()
    with pytest.raises(OSError, match="No space"):
        write_durably(round_dir / RESULT_FILE, b"{}" * 10_000, site="trainer.result")
    assert not (round_dir / RESULT_FILE).exists()


def test_a_folder_that_cannot_be_made_is_the_named_failure_disk_full(disk: SmallDisk) -> None:
    async def work() -> UpdateManifest:
        (disk.root / "full").write_bytes(b"x" * 10_000_000)
        raise AssertionError("it fitted")

    outcome = anyio.run(partial(outcome_of, "a", work))
    assert isinstance(outcome, WorkFailed)
    assert outcome.code is FailureCode.DISK_FULL


def test_a_server_that_starts_on_a_full_disk_says_so_and_may_be_restarted(disk: SmallDisk) -> None:
    settings = disk.root.parent / "server.yml"
    settings.write_text(yaml.safe_dump({"state_dir": str(disk.root / "state"), "port": 0}))
    (disk.root / "state").mkdir()
    for folder in ("blobs/parts", "models", "runs"):
        (disk.root / "state" / folder).mkdir(parents=True)
    disk.fill()
    done = subprocess.run(
        [sys.executable, "-m", "broker_server.cli", "serve", "--settings", str(settings)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 69  # 78 would tell systemd not to try again
    assert "no space is left" in done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1


@pytest.mark.e2e
@pytest.mark.timeout(900)
@pytest.mark.train
@pytest.mark.trust
def test_a_run_waits_while_the_server_s_disk_is_full_and_ends_well(tmp_path: Path) -> None:
    with small_disk(tmp_path / "server", megabytes=24) as disk:
        site = Site(tmp_path, patience_s=300.0)
        try:
            site.start_server()
            site.add_model()
            for name in ("left", "right"):
                site.start_agent(name, emulate=SLOW)
            site.wait_for_devices("left", "right")
            run_id = site.launch(rounds=3, local_steps=12)
            site.wait_until_training(run_id, "left")
            disk.fill()
            site.until(lambda: "waiting_for_disk_space" in site.log("server"), "the server waits")
            assert site.run(run_id)["status"] == "running"
            with stored_on(disk) as store:
                acknowledged = store.updates(run_id, 1)
            disk.make_space()
            run = site.wait_for_end(run_id)
            assert (run["status"], len(run["rounds"])) == ("finished", 3)
            with stored_on(disk) as store:
                for result in run["rounds"]:
                    members = {d["device_id"]: d["status"] for d in result["devices"]}
                    updated = {name for name, status in members.items() if status == "updated"}
                    assert updated == set(store.updates(run_id, result["round"]))
                for name, manifest in acknowledged.items():
                    assert store.updates(run_id, 1)[name] == manifest
            assert "disk_space_again" in site.log("server")
            assert "Traceback" not in site.log("server")
            waits = [line for line in site.log("server").splitlines() if "waiting_for_disk" in line]
            assert all(json.loads(line)["error"] for line in waits)
            assert (disk.root / "runs" / run_id / "summary.json").exists()
        finally:
            site.close()


@contextmanager
def stored_on(disk: SmallDisk) -> Iterator[Store]:
    """The server's database, seen from here."""
    store = Store.in_folder(disk.root)
    try:
        yield store
    finally:
        store.close()


@pytest.mark.e2e
@pytest.mark.timeout(900)
@pytest.mark.train
@pytest.mark.trust
def test_a_device_with_a_full_disk_says_so_stays_and_takes_part_again(tmp_path: Path) -> None:
    with small_disk(tmp_path / "left", megabytes=24) as disk:
        site = Site(tmp_path, patience_s=300.0)
        try:
            site.start_server()
            site.add_model()
            # Its owner's own limit would keep such a device out of the round altogether.
            site.start_agent("left", training={"disk_free_bytes": 0})
            site.start_agent("right")
            site.wait_for_devices("left", "right")
            disk.fill()
            run = site.wait_for_end(site.launch(rounds=1))
            assert run["status"] == "finished"
            (members,) = ({d["device_id"]: d for d in r["devices"]} for r in run["rounds"])
            assert members["left"]["status"] == "failed"
            assert "disk_full" in members["left"]["detail"]
            assert members["right"]["status"] == "updated"
            assert "Traceback" not in site.log("left")
            disk.make_space()
            again = site.wait_for_end(site.launch(rounds=1))
            statuses = {d["device_id"]: d["status"] for d in again["rounds"][0]["devices"]}
            assert statuses == {"left": "updated", "right": "updated"}
            assert site.processes["left"].poll() is None
            site.wait_for_empty_outbox("left")
        finally:
            site.close()
