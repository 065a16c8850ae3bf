"""``broker-server restore``: put a backup into the place of a server's state.

Everything is unpacked and checked beside the old state first; only then the two change places. What
the restored server says must look newer to devices than anything they heard, and what it asks for
must not look like work that they have done already: both are numbered past the old ones.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from broker_server.backup import DATABASE_FILE, OUTSIDE_PKI, UNFINISHED, remove_stale_snapshots
from broker_server.backup_archive import MANIFEST_FILE, BackupManifest, unpack
from broker_server.blobs import BlobStore
from broker_server.database_file import damage_in_file
from broker_server.disk_space import one_line_when_full
from broker_server.run_state import RunCheckpoint, RunStatus
from broker_server.server_state import ServerState
from broker_server.settings import ServerSettings
from broker_server.store import Store
from broker_server.tokens import FILE_NAME
from wire_protocol.durable import remove_file, sync, write_durably
from wire_protocol.errors import ConfigError, LegendError

STARTS_AHEAD = 1000
"""Starts of the lost server since the backup that cannot be known; more than anybody has."""

REVOCABLE = ("pki/", f"{OUTSIDE_PKI}/", FILE_NAME)
"""Files of a backup that say who is let in."""

KEPT_PREFIX = "before-restore-"
_FRESH_PREFIX = ".restore-"


def restore(archive: Path, settings: ServerSettings, *, force: bool) -> list[str]:
    """Restore a backup.

    Args:
        archive: made by ``legend backup``.
        settings: of the server that will use it.
        force: move what is there aside.

    Returns:
        What was done, in lines for people.

    Raises:
        AlreadyRunning: a server uses the state directory.
        ConfigError: the archive is damaged or of another fleet, or the directory is not empty.
        DiskFull: there is no space for it.
    """
    state = ServerState(settings.state_dir)
    with state.locked(), one_line_when_full():
        remove_stale_snapshots(state.root)
        for left in state.root.glob(_FRESH_PREFIX + "*"):
            shutil.rmtree(left, ignore_errors=True)
        if _occupied(state.root) and not force:
            raise ConfigError(
                f"{state.root} holds a server's state; --force moves it to {KEPT_PREFIX}N in there"
            )
        fresh = Path(tempfile.mkdtemp(prefix=_FRESH_PREFIX, dir=state.root))
        try:
            manifest = unpack(archive, fresh)
            lines = _prepare(fresh, manifest, settings, before=state)
            kept = _change_places(state.root, fresh)
            lines += _place_pki(state.root / OUTSIDE_PKI, settings.pki)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    if any(name.startswith(REVOCABLE) for name in manifest.files):
        lines.append(
            "devices and tokens that were revoked after the backup are good again: revoke them anew"
        )
    if kept:
        lines.append(f"what was there before is in {kept}; delete it when all is well")
    return lines


def _prepare(
    fresh: Path, manifest: BackupManifest, settings: ServerSettings, *, before: ServerState
) -> list[str]:
    """Make the unpacked files a state that a server can start from."""
    if manifest.fleet != settings.fleet:
        raise ConfigError(
            f"the backup is of fleet {manifest.fleet!r}, the settings say {settings.fleet!r}"
        )
    state = ServerState(fresh)
    size_mb = manifest.size_bytes / 1e6
    what = f"fleet {manifest.fleet} as of {manifest.made_at}"
    lines = [f"restored {what}: {len(manifest.files)} files, {size_mb:.1f} MB"]
    restores = max(_number(fresh / "restores"), _largest(before.root, "restores")) + 1
    starts = max(manifest.start_number, _largest(before.root, "start_number")) + STARTS_AHEAD
    for name, number in (("restores", restores), ("start_number", starts)):
        write_durably(fresh / name, f"{number}\n".encode(), site="server.restore")
    if manifest.database != "sqlite":
        lines.append(
            f"the database was {manifest.database} and is not in the backup: restore its own "
            "backup before the server starts"
        )
        return lines
    if settings.database and not settings.database.startswith("sqlite"):
        raise ConfigError("the backup holds an SQLite database; remove 'database' from settings")
    lines += _check_database(fresh, state)
    if settings.database:
        lines.append(f"the settings name a database elsewhere: move {DATABASE_FILE} there")
    return lines


def _check_database(fresh: Path, state: ServerState) -> Iterator[str]:
    if (damage := damage_in_file(fresh / DATABASE_FILE)) is not None:
        raise ConfigError(f"the backup's database is damaged ({damage}); use another backup")
    blobs = BlobStore(state.blobs)
    with closing(Store.in_folder(fresh)) as store:
        for model in store.models():
            _build_model(state.models / model.digest, json.loads(model.files), blobs)
        for record in store.runs():
            if record.status != RunStatus.RUNNING.value:
                continue
            if record.checkpoint is None:
                yield f"run {record.run_id} begins anew when the server starts"
                continue
            checkpoint = RunCheckpoint.model_validate_json(record.checkpoint)
            if not blobs.has(checkpoint.adapter.sha256):
                raise ConfigError(f"the backup lacks the adapter of run {record.run_id}")
            renamed = _ask_anew(record.run_id, checkpoint, store, state.life)
            store.save_checkpoint(record.run_id, renamed.model_dump_json())
            yield (
                f"run {record.run_id} goes on with round {checkpoint.round_number} "
                "when the server starts"
            )


def _ask_anew(run_id: str, checkpoint: RunCheckpoint, store: Store, life: str) -> RunCheckpoint:
    """New names for the assignments that are still open.

    Under the old ones devices would say that they have done them, to a server that is gone.
    """
    done = store.updates(run_id, checkpoint.round_number)
    members = {
        device_id: member
        if device_id in done
        else member.model_copy(
            update={
                "assignment_id": (
                    f"{run_id}.{checkpoint.round_number}-{checkpoint.attempt}{life}.{device_id}"
                )
            }
        )
        for device_id, member in checkpoint.members.items()
    }
    return checkpoint.model_copy(update={"members": members})


def _build_model(folder: Path, files: list[dict[str, object]], blobs: BlobStore) -> None:
    """Lay a base model out of its blobs, as when it was registered."""
    for file in files:
        target = folder / str(file["path"])
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(blobs.path(str(file["sha256"])), target)
        except (OSError, LegendError) as error:
            name = file["path"]
            raise ConfigError(f"the backup lacks {name} of a base model: {error}") from error


def _change_places(root: Path, fresh: Path) -> Path | None:
    """Move the old state aside and the new one in; the lock stays where it is."""
    write_durably(root / UNFINISHED, b"", site="server.restore")
    old = [path for path in root.iterdir() if _is_state(path)]
    kept = None
    if _occupied(root):
        number = 1 + sum(1 for _ in root.glob(KEPT_PREFIX + "*"))
        kept = root / f"{KEPT_PREFIX}{number}"
        kept.mkdir(mode=0o700)
    for path in old:
        if kept:
            path.rename(kept / path.name)
        else:
            shutil.rmtree(path)
    for path in fresh.iterdir():
        if path.name not in (MANIFEST_FILE, "lock"):
            path.rename(root / path.name)
    sync(root)
    remove_file(root / UNFINISHED, site="server.restore.done")
    return kept


def _place_pki(folder: Path, wanted: Path | None) -> Iterator[str]:
    """Put certificates that lay outside back there, unless there are some already."""
    if not folder.exists():
        return
    if wanted is None or (wanted.exists() and any(wanted.iterdir())):
        yield f"the certificates of the backup are in {folder}; those in 'pki' were not touched"
        return
    shutil.copytree(folder, wanted, dirs_exist_ok=True)
    wanted.chmod(0o700)
    shutil.rmtree(folder)
    yield f"the certificates are in {wanted} again"


def _occupied(root: Path) -> bool:
    """Whether there is any file that a server made, besides empty folders."""
    return any(
        path.is_file() or any(inner.is_file() for inner in path.rglob("*"))
        for path in root.iterdir()
        if _is_state(path)
    )


def _is_state(path: Path) -> bool:
    return path.name not in ("lock", UNFINISHED) and not path.name.startswith(
        (KEPT_PREFIX, _FRESH_PREFIX)
    )


def _largest(root: Path, name: str) -> int:
    """Of what is there and what was moved aside: a restore that broke off has moved it."""
    return max(map(_number, (root / name, *root.glob(f"{KEPT_PREFIX}*/{name}"))))


def _number(path: Path) -> int:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0
