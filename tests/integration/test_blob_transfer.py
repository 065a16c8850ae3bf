"""Blobs over a real HTTP server, which is killed and damaged on the way."""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import pytest
from anyio import to_thread

from broker_server.blobs import BlobStore
from edge_agent.blobs import BlobClient
from edge_agent.link import LinkShape, ShapedLink, measure_link
from edge_agent.model_manifest import ModelFile, manifest_digest
from edge_agent.server_connection import Patience
from tests.support.blob_server import CONTENT, DIGEST, BlobServer
from tests.support.ports import free_port
from wire_protocol.errors import DeviceError, FailureCode, Refused, ServerUnavailable

pytestmark = [pytest.mark.integration, pytest.mark.anyio]

PATIENT = Patience(total_s=30.0, first_retry_s=0.05, longest_retry_s=0.2)
HASTY = Patience(total_s=0.3, first_retry_s=0.05, longest_retry_s=0.1)


async def test_a_file_goes_up_and_comes_down_the_same(
    server: BlobServer, store: BlobStore, tmp_path: Path
) -> None:
    (tmp_path / "update").write_bytes(CONTENT)
    seen: list[int] = []
    async with BlobClient(server.url) as client:
        ref = await client.upload(
            tmp_path / "update", on_progress=lambda done, _: seen.append(done)
        )
        assert (ref.sha256, ref.size_bytes) == (DIGEST, len(CONTENT))
        assert store.read(DIGEST) == CONTENT
        assert seen == sorted(seen)
        assert seen[-1] == len(CONTENT)
        target = await client.download(DIGEST, len(CONTENT), tmp_path / "copy")
        assert target.read_bytes() == CONTENT
        assert not (tmp_path / "copy.part").exists()


async def test_what_is_there_already_is_not_sent_again(
    server: BlobServer, store: BlobStore, tmp_path: Path
) -> None:
    store.put(CONTENT)
    (tmp_path / "update").write_bytes(CONTENT)
    seen: list[int] = []
    async with BlobClient(server.url) as client:
        await client.upload(tmp_path / "update", on_progress=lambda done, _: seen.append(done))
        await client.download(DIGEST, len(CONTENT), tmp_path / "copy")
        store.remove(DIGEST)
        await client.download(DIGEST, len(CONTENT), tmp_path / "copy")
    assert seen == []


@dataclass
class KilledOnce:
    """What was seen of an upload whose server was killed on the way, and started again."""

    held_bytes: int = 0
    sent_bytes: int = 0
    progress: list[tuple[int, int]] = field(default_factory=list)


async def upload_with_a_kill(
    folder: Path, *, after_bytes: int, up_bytes_per_s: float, patience: Patience
) -> KilledOnce:
    """Send CONTENT; the server dies once so many bytes are on their way, and comes back."""
    server = BlobServer(free_port(), folder / "blobs")
    server.start()
    (folder / "update").write_bytes(CONTENT)
    seen = KilledOnce()
    enough = anyio.Event()

    def on_progress(done: int, total: int) -> None:
        seen.progress.append((done, total))
        if done > after_bytes:
            enough.set()

    async def kill_and_restart() -> None:
        await enough.wait()
        server.kill()
        (part,) = (folder / "blobs" / "parts").iterdir()
        seen.held_bytes = part.stat().st_size
        await to_thread.run_sync(server.start)

    link = ShapedLink(LinkShape(up_bytes_per_s=up_bytes_per_s, down_bytes_per_s=1e9))
    try:
        async with (
            BlobClient(server.url, link=link, patience=patience) as client,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(kill_and_restart)
            await client.upload(folder / "update", on_progress=on_progress)
            seen.sent_bytes = client.sent_bytes
    finally:
        server.kill()
    assert BlobStore(folder / "blobs").read(DIGEST) == CONTENT
    return seen


async def test_an_upload_survives_a_server_that_is_killed_in_the_middle(tmp_path: Path) -> None:
    # Slow enough to be in the middle when the server dies.
    seen = await upload_with_a_kill(
        tmp_path, after_bytes=2_000_000, up_bytes_per_s=4e6, patience=PATIENT
    )
    assert 0 < seen.held_bytes < len(CONTENT)
    # Only what was between the two programs is lost: a piece in the server's memory, and buffers.
    assert seen.sent_bytes < len(CONTENT) + 1_000_000
    assert seen.progress[-1] == (len(CONTENT), len(CONTENT))


async def test_a_file_larger_than_a_request_goes_up_in_several(
    server: BlobServer, store: BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_agent.blobs._REQUEST_BYTES", 1_000_001)
    (tmp_path / "update").write_bytes(CONTENT)
    async with BlobClient(server.url) as client:
        await client.upload(tmp_path / "update")
        assert client.sent_bytes == len(CONTENT)
    assert store.read(DIGEST) == CONTENT


async def test_an_upload_that_takes_longer_than_patience_goes_on_after_a_loss(
    tmp_path: Path,
) -> None:
    # The one request takes three seconds; being away takes less than the patience.
    await upload_with_a_kill(
        tmp_path,
        after_bytes=len(CONTENT) - 500_000,
        up_bytes_per_s=2e6,
        patience=Patience(total_s=2.0, first_retry_s=0.05, longest_retry_s=0.2),
    )


async def test_a_download_survives_a_server_that_is_killed_in_the_middle(tmp_path: Path) -> None:
    server = BlobServer(free_port(), tmp_path / "blobs")
    BlobStore(tmp_path / "blobs").put(CONTENT)
    server.start()
    killed = anyio.Event()
    received: list[int] = []

    def on_progress(done: int, _total: int) -> None:
        received.append(done)
        if done > 2_000_000:
            killed.set()

    async def kill_and_restart() -> None:
        await killed.wait()
        server.kill()
        await to_thread.run_sync(server.start)

    link = ShapedLink(LinkShape(up_bytes_per_s=1e9, down_bytes_per_s=4e6))
    try:
        async with (
            BlobClient(server.url, link=link, patience=PATIENT) as client,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(kill_and_restart)
            target = tmp_path / "adapter"
            await client.download(DIGEST, len(CONTENT), target, on_progress=on_progress)
    finally:
        server.kill()
    assert target.read_bytes() == CONTENT
    assert received == sorted(set(received)), "bytes that were here were fetched again"


async def test_what_an_earlier_agent_fetched_is_continued(
    server: BlobServer, store: BlobStore, tmp_path: Path
) -> None:
    store.put(CONTENT)
    (tmp_path / "adapter.part").write_bytes(CONTENT[:5_000_000])
    received: list[int] = []
    async with BlobClient(server.url) as client:
        target = await client.download(
            DIGEST, len(CONTENT), tmp_path / "adapter", on_progress=lambda d, _: received.append(d)
        )
    assert target.read_bytes() == CONTENT
    assert min(received) > 5_000_000


@pytest.mark.parametrize("present", [b"?" * 5_000_000, b"?" * 7_000_000])
async def test_a_damaged_part_is_thrown_away_and_fetched_cleanly(
    server: BlobServer, store: BlobStore, tmp_path: Path, present: bytes
) -> None:
    store.put(CONTENT)
    (tmp_path / "adapter.part").write_bytes(present)
    async with BlobClient(server.url) as client:
        target = await client.download(DIGEST, len(CONTENT), tmp_path / "adapter")
    assert target.read_bytes() == CONTENT


async def test_content_that_is_damaged_on_the_server_is_never_used(
    server: BlobServer, store: BlobStore, tmp_path: Path
) -> None:
    store.put(CONTENT)
    with store.path(DIGEST).open("r+b") as file:
        file.seek(3_000_000)
        file.write(b"damage")
    async with BlobClient(server.url) as client:
        with pytest.raises(DeviceError) as caught:
            await client.download(DIGEST, len(CONTENT), tmp_path / "adapter")
    assert caught.value.code is FailureCode.WRONG_DIGEST
    assert list(tmp_path.iterdir()) == []


async def test_a_blob_that_is_longer_than_announced_is_not_fetched(
    server: BlobServer, store: BlobStore, tmp_path: Path
) -> None:
    store.put(CONTENT)
    async with BlobClient(server.url) as client:
        with pytest.raises(DeviceError, match="longer than announced") as caught:
            await client.download(DIGEST, 100, tmp_path / "adapter")
    assert caught.value.code is FailureCode.DOWNLOAD_FAILED


async def test_a_blob_that_does_not_exist_fails_at_once(server: BlobServer, tmp_path: Path) -> None:
    async with BlobClient(server.url) as client:
        with pytest.raises(DeviceError, match="404") as caught:
            await client.download("0" * 64, 10, tmp_path / "adapter")
    assert caught.value.code is FailureCode.DOWNLOAD_FAILED


async def test_without_a_server_patience_ends_with_a_named_failure(tmp_path: Path) -> None:
    (tmp_path / "update").write_bytes(b"x")
    async with BlobClient(f"http://127.0.0.1:{free_port()}", patience=HASTY) as client:
        with pytest.raises(DeviceError, match="does not answer") as up:
            await client.upload(tmp_path / "update")
        with pytest.raises(DeviceError, match="does not answer") as down:
            await client.download(DIGEST, 10, tmp_path / "adapter")
        with pytest.raises(ServerUnavailable):
            await client.get_json("/v1/health")
    assert (up.value.code, down.value.code) == (
        FailureCode.UPLOAD_FAILED,
        FailureCode.DOWNLOAD_FAILED,
    )


async def test_a_full_disk_is_named(server: BlobServer, store: BlobStore) -> None:
    store.put(CONTENT)
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    folder = Path("/dev/shm") / f"legend-{os.getpid()}"
    folder.mkdir()
    try:
        (folder / "adapter.part").symlink_to(full)
        async with BlobClient(server.url) as client:
            with pytest.raises(DeviceError, match="space") as caught:
                await client.download(DIGEST, len(CONTENT), folder / "adapter")
        assert caught.value.code is FailureCode.DISK_FULL
    finally:
        (folder / "adapter.part").unlink()
        folder.rmdir()


async def test_an_unknown_token_is_refused_with_the_servers_reason(tmp_path: Path) -> None:
    server = BlobServer(free_port(), tmp_path / "blobs", token="right")
    server.start()
    (tmp_path / "update").write_bytes(CONTENT)
    try:
        async with BlobClient(server.url, token="wrong", patience=PATIENT) as client:
            with pytest.raises(Refused, match="this token is not known"):
                await client.upload(tmp_path / "update")
            with pytest.raises(Refused, match="this token is not known"):
                await client.download(DIGEST, 10, tmp_path / "adapter")
        async with BlobClient(server.url, token="right") as client:
            await client.upload(tmp_path / "update")
    finally:
        server.kill()


async def test_devices_that_send_the_same_blob_at_once_all_succeed(
    server: BlobServer, store: BlobStore, tmp_path: Path
) -> None:
    (tmp_path / "update").write_bytes(CONTENT)
    digests: list[str] = []

    async def device() -> None:
        async with BlobClient(server.url, patience=PATIENT) as client:
            digests.append((await client.upload(tmp_path / "update")).sha256)

    async with anyio.create_task_group() as tasks:
        for _ in range(4):
            tasks.start_soon(device)
    assert digests == [DIGEST] * 4
    assert store.read(DIGEST) == CONTENT


async def test_a_shaped_link_takes_the_time_of_its_shape_and_measures_itself(
    server: BlobServer, store: BlobStore, tmp_path: Path
) -> None:
    store.put(CONTENT[:500_000])
    digest = hashlib.sha256(CONTENT[:500_000]).hexdigest()
    link = ShapedLink(LinkShape(1_000_000.0, 1_000_000.0, round_trip_s=0.02))
    async with BlobClient(server.url, link=link) as client:
        began = time.monotonic()
        await client.download(digest, 500_000, tmp_path / "adapter")
        assert time.monotonic() - began >= 0.5
        report = await measure_link(client)
    assert report.round_trip_s >= 0.02
    assert report.up_bytes_per_s <= 2e6
    assert report.down_bytes_per_s <= 2e6


def publish_model(root: Path, contents: dict[str, bytes]) -> str:
    """Put a base model on the server; returns its digest."""
    store = BlobStore(root)
    files = [
        ModelFile(path=path, sha256=store.put(content), size_bytes=len(content))
        for path, content in contents.items()
    ]
    digest = manifest_digest(files)
    described = {"digest": digest, "files": [file.model_dump() for file in files]}
    (root / f"{digest}.json").write_text(json.dumps(described))
    return digest


async def test_a_base_model_appears_only_when_it_is_complete(
    shared_server: tuple[BlobServer, Path], tmp_path: Path
) -> None:
    server, root = shared_server
    contents = {"config.json": b"{}", "model.safetensors": CONTENT[:3_000_000], "sub/vocab": b""}
    digest = publish_model(root, contents)
    missing = hashlib.sha256(b"{}").hexdigest()
    async with BlobClient(server.url, patience=HASTY) as client:
        BlobStore(root).remove(missing)
        with pytest.raises(DeviceError, match="404"):
            await client.fetch_model(digest, tmp_path)
        assert not (tmp_path / "models" / digest).exists()
        BlobStore(root).put(b"{}")
        folder = await client.fetch_model(digest, tmp_path)
        assert folder == tmp_path / "models" / digest
        assert {
            str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        } == contents
    async with BlobClient(f"http://127.0.0.1:{free_port()}") as offline:
        assert await offline.fetch_model(digest, tmp_path) == folder


async def test_two_that_want_one_base_model_fetch_it_once(
    shared_server: tuple[BlobServer, Path], tmp_path: Path
) -> None:
    server, root = shared_server
    digest = publish_model(root, {"model.safetensors": CONTENT[:2_000_000]})
    async with BlobClient(server.url) as client, anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(client.fetch_model, digest, tmp_path)
    assert (tmp_path / "models" / digest / "model.safetensors").read_bytes() == CONTENT[:2_000_000]


async def test_a_base_model_that_is_not_the_one_asked_for_is_refused(
    shared_server: tuple[BlobServer, Path], tmp_path: Path
) -> None:
    server, root = shared_server
    digest = publish_model(root, {"model.safetensors": b"good"})
    other = "1" * 64
    (root / f"{other}.json").write_text((root / f"{digest}.json").read_text())
    async with BlobClient(server.url) as client:
        with pytest.raises(DeviceError, match="not those of model") as caught:
            await client.fetch_model(other, tmp_path)
    assert caught.value.code is FailureCode.DOWNLOAD_FAILED
