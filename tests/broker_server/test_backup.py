"""A backup is one moment of a working server, proves that it is whole, and works when restored."""

from __future__ import annotations

import gc
import io
import shutil
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from broker_server.access import Role
from broker_server.api import make_api
from broker_server.backup import (
    SNAPSHOT_PREFIX,
    Snapshot,
    remove_stale_snapshots,
)
from broker_server.backup_archive import BackupManifest, Member, archive_pieces, unpack
from broker_server.backup_report import backup_lines
from broker_server.blobs import BlobStore
from broker_server.operator_cli import main
from broker_server.restore import STARTS_AHEAD, restore
from broker_server.run_state import RunCheckpoint
from broker_server.server import Server
from broker_server.server_state import ServerState
from broker_server.settings import ServerSettings
from broker_server.store import Store
from broker_server.tokens import TokenStore
from tests.support.in_process_server import served, server_in
from tests.support.saved_server import ADAPTER, fill, save, settings
from wire_protocol.errors import AlreadyRunning, ConfigError, Refused


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with server_in(tmp_path / "old") as server:
        (server.state.root / "start_number").write_text("7\n")
        yield server


@pytest.fixture
def archive(server: Server, tmp_path: Path) -> Path:
    """A backup of a server in the middle of round 3: ``done`` has sent its update."""
    fill(server)
    return save(server, tmp_path / "backup.tar")


def test_a_restored_server_has_everything_that_was_acknowledged(
    archive: Path, tmp_path: Path
) -> None:
    lines = restore(archive, settings(tmp_path / "new"), force=False)
    assert "run run-1 goes on with round 3 when the server starts" in lines
    new = tmp_path / "new"
    store, blobs = Store.in_folder(new), BlobStore(new / "blobs")
    assert store.updates("run-1", 3) == {"done": "the manifest"}
    record = store.run("run-1")
    assert record is not None
    assert record.status == "running"
    checkpoint = RunCheckpoint.model_validate_json(record.checkpoint or "")
    assert blobs.read(checkpoint.adapter.sha256) == ADAPTER
    assert (new / "models" / ("ab" * 32) / "sub" / "config.json").read_bytes() == b"weights"
    assert (new / "pki" / "ca.key").read_text() == "private"
    assert stat.S_IMODE((new / "pki" / "ca.key").stat().st_mode) == 0o600
    assert (new / "broker" / "broker.json").exists()
    assert not (new / "broker" / "broker.log").exists()
    assert list((new / "blobs" / "parts").iterdir()) == []
    store.close()


def test_open_assignments_get_names_that_no_device_has_seen(archive: Path, tmp_path: Path) -> None:
    restore(archive, settings(tmp_path / "new"), force=False)
    store = Store.in_folder(tmp_path / "new")
    record = store.run("run-1")
    assert record is not None
    members = RunCheckpoint.model_validate_json(record.checkpoint or "").members
    assert members["done"].assignment_id == "run-1.3-0.done"
    assert members["open"].assignment_id == "run-1.3-0r1.open"
    assert ServerState(tmp_path / "new").life == "r1"
    store.close()


def test_the_restored_server_looks_newer_than_the_lost_one(archive: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    restore(archive, settings(new), force=False)
    assert ServerState(new).count_start() == 7 + STARTS_AHEAD + 1
    again = tmp_path / "again"
    ServerState(again)
    (again / "start_number").write_text("5000\n")
    restore(archive, settings(again), force=True)
    assert ServerState(again).count_start() == 5000 + STARTS_AHEAD + 1


def test_what_a_run_deletes_while_the_archive_goes_out_is_in_it(
    server: Server, tmp_path: Path
) -> None:
    fill(server)
    snapshot = Snapshot(server)
    with pytest.raises(Refused, match="another backup"):
        Snapshot(server)
    pieces = snapshot.pieces()
    first = next(pieces)
    spent = server.blobs.put(ADAPTER)
    server.blobs.remove(spent)
    server.store.record_update("run-1", 3, "open", "later")
    shutil.rmtree(server.state.runs / "run-1")
    path = tmp_path / "backup.tar"
    path.write_bytes(first + b"".join(pieces))
    unpack(path, None)
    restore(path, settings(tmp_path / "new"), force=False)
    assert BlobStore(tmp_path / "new" / "blobs").has(spent)
    store = Store.in_folder(tmp_path / "new")
    assert set(store.updates("run-1", 3)) == {"done"}
    store.close()
    assert list(server.state.root.glob(SNAPSHOT_PREFIX + "*")) == []


def test_a_backup_that_nobody_fetched_is_gone_at_the_next_start(server: Server) -> None:
    Snapshot(server)
    remove_stale_snapshots(server.state.root)
    assert list(server.state.root.glob(SNAPSHOT_PREFIX + "*")) == []


def test_a_directory_in_use_is_not_touched_without_force(archive: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    new.mkdir()
    (new / "start_number").write_text("3\n")
    with pytest.raises(ConfigError, match="--force"):
        restore(archive, settings(new), force=False)
    assert sorted(path.name for path in new.rglob("*") if path.is_file()) == [
        "lock",
        "start_number",
    ]
    lines = restore(archive, settings(new), force=True)
    assert (new / "before-restore-1" / "start_number").read_text() == "3\n"
    assert "before-restore-1" in lines[-1]
    restore(archive, settings(new), force=True)
    assert (new / "before-restore-2" / "server.db").exists()
    assert ServerState(new).life == "r2"


def test_certificates_outside_the_state_directory_are_saved_too(tmp_path: Path) -> None:
    pki = tmp_path / "etc-pki"
    pki.mkdir()
    (pki / "ca.key").write_text("private")
    (pki / "ca.key").chmod(0o600)
    with server_in(tmp_path / "old", pki=pki) as server:
        archive = save_directly(server, tmp_path / "backup.tar")
    elsewhere = ServerSettings(fleet="home", state_dir=tmp_path / "new", pki=tmp_path / "new-pki")
    lines = restore(archive, elsewhere, force=False)
    assert f"the certificates are in {tmp_path / 'new-pki'} again" in lines
    assert (tmp_path / "new-pki" / "ca.key").read_text() == "private"
    assert stat.S_IMODE((tmp_path / "new-pki" / "ca.key").stat().st_mode) == 0o600
    again = restore(archive, elsewhere, force=True)
    assert any("were not touched" in line for line in again)


def save_directly(server: Server, path: Path) -> Path:
    path.write_bytes(b"".join(Snapshot(server).pieces()))
    return path


@pytest.mark.integration
def test_the_command_writes_a_checked_file_for_its_owner_alone(
    server: Server, tmp_path: Path
) -> None:
    fill(server)
    file = tmp_path / "backup.tar"
    with served(make_api(server)) as url:
        result = CliRunner().invoke(main, ["--server", url, "backup", str(file)])
    assert result.exit_code == 0
    assert "runs: 1 running" in result.stdout
    assert "private keys are inside" in result.stdout
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert unpack(file, None).runs == {"run-1": "running"}


@pytest.mark.integration
def test_a_viewer_gets_no_backup_and_leaves_no_file(server: Server, tmp_path: Path) -> None:
    viewer = TokenStore(server.state.root).create("sam", Role.VIEWER, 0.0)
    file = tmp_path / "backup.tar"
    with served(make_api(server)) as url:
        arguments = ["--server", url, "--token", viewer, "backup", str(file)]
        result = CliRunner().invoke(main, arguments)
        scrape = httpx.get(f"{url}/metrics", headers={"Authorization": f"Bearer {viewer}"})
        stranger = httpx.get(f"{url}/metrics")
    assert result.exit_code == 77
    assert [path for path in tmp_path.iterdir() if "backup" in path.name] == []
    assert list(server.state.root.glob(SNAPSHOT_PREFIX + "*")) == []
    assert (scrape.status_code, stranger.status_code) == (200, 401)


def test_a_running_server_keeps_its_directory(archive: Path, tmp_path: Path) -> None:
    with ServerState(tmp_path / "new").locked(), pytest.raises(AlreadyRunning):
        restore(archive, settings(tmp_path / "new"), force=True)


def flipped(data: bytes) -> bytes:
    place = data.index(ADAPTER)
    return data[:place] + b"X" + data[place + 1 :]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flipped, "damaged at blobs/"),
        (lambda data: data[: len(data) // 2], "broke off"),
        (lambda data: data[: data.index(b"manifest.json") - 10], "broke off"),
        (lambda data: data.replace(b'"legend.backup/1"', b'"legend.backup/9"'), "legend.backup/9"),
        (lambda _data: b"not a tar at all", "no backup"),
        (lambda _data: b"", "broke off"),
    ],
)
def test_a_damaged_archive_changes_nothing(
    archive: Path, tmp_path: Path, damage: object, words: str
) -> None:
    archive.write_bytes(damage(archive.read_bytes()))  # type: ignore[operator]
    with pytest.raises(ConfigError, match=words) as caught:
        restore(archive, settings(tmp_path / "new"), force=False)
    assert "\n" not in str(caught.value)
    files = [path.name for path in (tmp_path / "new").rglob("*") if path.is_file()]
    assert files == ["lock"]


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/../../evil"])
def test_an_archive_cannot_write_elsewhere(tmp_path: Path, name: str) -> None:
    path = tmp_path / "evil.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo(name)
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    with pytest.raises(ConfigError, match="no backup"):
        restore(path, settings(tmp_path / "new"), force=False)


def test_a_link_in_an_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "evil.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("server.db")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(ConfigError, match="no backup"):
        restore(path, settings(tmp_path / "new"), force=False)


def test_another_fleet_s_backup_is_refused(archive: Path, tmp_path: Path) -> None:
    other = settings(tmp_path / "new", fleet="away")
    with pytest.raises(ConfigError, match=r"'home'.*'away'"):
        restore(archive, other, force=False)


def test_a_database_elsewhere_is_said_plainly_on_both_ways(tmp_path: Path) -> None:
    about = BackupManifest(
        version="1", fleet="home", made_at="now", database="postgresql", start_number=1, runs={}
    )
    path = tmp_path / "backup.tar"
    (tmp_path / "x").write_text("x")
    path.write_bytes(b"".join(archive_pieces([Member("blobs/x", tmp_path / "x")], about)))
    assert "NOT inside: the postgresql database" in "\n".join(
        backup_lines(unpack(path, None), path)
    )
    lines = restore(path, settings(tmp_path / "new"), force=False)
    assert any("postgresql and is not in the backup" in line for line in lines)


def test_a_client_that_is_gone_before_the_first_piece_blocks_no_later_backup(
    server: Server,
) -> None:
    pieces = Snapshot(server).pieces()
    del pieces
    gc.collect()
    assert not list(server.state.root.glob(f"{SNAPSHOT_PREFIX}*"))
    assert list(Snapshot(server).pieces())


def test_a_restore_says_that_what_was_revoked_since_is_good_again(
    archive: Path, tmp_path: Path
) -> None:
    lines = restore(archive, settings(tmp_path / "new"), force=False)
    assert any("revoke them anew" in line for line in lines)


def test_a_restore_after_one_that_broke_off_still_looks_newer(
    archive: Path, tmp_path: Path
) -> None:
    new = tmp_path / "new"
    restore(archive, settings(new), force=False)
    first = ServerState(new)
    restores, starts = first.life, int((new / "start_number").read_text())
    # Killed between the two halves: the old state is aside, the new one is not there.
    aside = new / "before-restore-1"
    aside.mkdir()
    for path in list(new.iterdir()):
        if path not in (aside, new / "lock"):
            path.rename(aside / path.name)
    restore(archive, settings(new), force=True)
    assert ServerState(new).life != restores
    assert int((new / "start_number").read_text()) > starts
