"""Uploads of devices that are told apart, on a real disk."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest

from broker_server.blobs import BlobStore, NoSuchBlob, Upload, WrongDigest, WrongOffset
from broker_server.device_uploads import DeviceUploads, TooManyUploads
from wire_protocol.errors import ProtocolError

CONTENT = bytes(range(200)) * 5
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


@pytest.fixture
def uploads(tmp_path: Path, store: BlobStore) -> DeviceUploads:
    return DeviceUploads(tmp_path / "uploads", store, most=2)


def send(uploads: DeviceUploads, device: str) -> None:
    uploads.open_upload(device, DIGEST, len(CONTENT))
    assert uploads.append(device, DIGEST, 0, CONTENT) == Upload(complete=True, offset=len(CONTENT))


def test_a_finished_upload_waits_apart_until_it_is_adopted(
    uploads: DeviceUploads, store: BlobStore
) -> None:
    send(uploads, "pi")
    assert not store.has(DIGEST)
    assert uploads.adopt("pi", DIGEST)
    assert uploads.adopt("pi", DIGEST)
    assert store.read(DIGEST) == CONTENT


def test_an_unfinished_or_unknown_upload_is_not_adopted(
    uploads: DeviceUploads, store: BlobStore
) -> None:
    uploads.open_upload("pi", DIGEST, len(CONTENT))
    uploads.append("pi", DIGEST, 0, CONTENT[:10])
    assert not uploads.adopt("pi", DIGEST)
    assert not uploads.adopt("nano", DIGEST)
    assert not store.has(DIGEST)


def test_two_devices_send_the_same_bytes_without_knowing_of_each_other(
    uploads: DeviceUploads, store: BlobStore
) -> None:
    for device in ("pi", "nano"):
        send(uploads, device)
    assert uploads.adopt("pi", DIGEST)
    uploads.drop("pi")
    assert uploads.adopt("nano", DIGEST)
    store.remove(DIGEST)
    assert uploads.adopt("nano", DIGEST), "its own copy is still there"
    assert store.read(DIGEST) == CONTENT


def test_an_adopted_blob_outlives_the_devices_copy(
    uploads: DeviceUploads, store: BlobStore
) -> None:
    send(uploads, "pi")
    uploads.adopt("pi", DIGEST)
    uploads.drop("pi")
    assert store.read(DIGEST) == CONTENT
    assert store.path(DIGEST).stat().st_mode & 0o077 == 0


def test_what_another_device_does_to_the_same_digest_changes_nothing(
    uploads: DeviceUploads,
) -> None:
    uploads.open_upload("pi", DIGEST, len(CONTENT))
    uploads.append("pi", DIGEST, 0, CONTENT[:10])
    with pytest.raises(NoSuchBlob):
        uploads.append("nano", DIGEST, 10, b"?")
    assert uploads.open_upload("nano", DIGEST, 5).offset == 0
    with pytest.raises(WrongDigest):
        uploads.append("nano", DIGEST, 0, b"?????")
    with pytest.raises(WrongOffset):
        uploads.append("pi", DIGEST, 9, b"?")
    assert uploads.open_upload("pi", DIGEST, len(CONTENT)).offset == 10
    assert uploads.append("pi", DIGEST, 10, CONTENT[10:]).complete


def test_an_upload_continues_after_the_server_was_killed(
    uploads: DeviceUploads, store: BlobStore, tmp_path: Path
) -> None:
    uploads.open_upload("pi", DIGEST, len(CONTENT))
    uploads.append("pi", DIGEST, 0, CONTENT[:10])
    again = DeviceUploads(tmp_path / "uploads", store, most=2)
    assert again.open_upload("pi", DIGEST, len(CONTENT)).offset == 10
    again.append("pi", DIGEST, 10, CONTENT[10:])
    third = DeviceUploads(tmp_path / "uploads", store, most=2)
    assert third.open_upload("pi", DIGEST, len(CONTENT)).complete
    assert third.adopt("pi", DIGEST)


def test_finished_uploads_count_as_much_as_open_ones(uploads: DeviceUploads) -> None:
    send(uploads, "pi")
    uploads.open_upload("pi", "0" * 64, 9)
    with pytest.raises(TooManyUploads):
        uploads.open_upload("pi", "1" * 64, 9)
    uploads.open_upload("pi", "0" * 64, 8)
    uploads.open_upload("nano", "1" * 64, 9)
    uploads.drop("pi")
    uploads.open_upload("pi", "1" * 64, 9)


def test_many_announcements_at_once_do_not_pass_the_quota(uploads: DeviceUploads) -> None:
    outcomes: list[str] = []

    def announce(number: int) -> None:
        try:
            uploads.open_upload("pi", f"{number:064x}", 9)
            outcomes.append("open")
        except TooManyUploads:
            outcomes.append("refused")

    threads = [threading.Thread(target=announce, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (outcomes.count("open"), outcomes.count("refused")) == (2, 38)


def test_what_is_dropped_while_it_is_sent_must_be_announced_again(
    uploads: DeviceUploads, tmp_path: Path
) -> None:
    uploads.open_upload("pi", DIGEST, len(CONTENT))
    uploads.drop("pi")
    with pytest.raises(NoSuchBlob, match="announce it"):
        uploads.append("pi", DIGEST, 0, CONTENT)
    assert list((tmp_path / "uploads").iterdir()) == []
    uploads.drop("pi")
    send(uploads, "pi")


def test_only_the_uploads_of_those_who_still_work_are_kept(
    uploads: DeviceUploads, tmp_path: Path
) -> None:
    uploads.keep_only([])
    for device in ("pi", "nano"):
        uploads.open_upload(device, DIGEST, len(CONTENT))
        uploads.append(device, DIGEST, 0, CONTENT[:10])
    uploads.keep_only(["pi"])
    assert [path.name for path in (tmp_path / "uploads").iterdir()] == ["pi"]
    assert uploads.open_upload("pi", DIGEST, len(CONTENT)).offset == 10


@pytest.mark.parametrize("name", ["", "..", "../blobs", "a/b", "PI", ".", "-x"])
def test_what_is_no_device_name_never_becomes_a_folder(uploads: DeviceUploads, name: str) -> None:
    for attempt in (
        lambda: uploads.open_upload(name, DIGEST, 1),
        lambda: uploads.append(name, DIGEST, 0, b"x"),
        lambda: uploads.adopt(name, DIGEST),
        lambda: uploads.drop(name),
    ):
        with pytest.raises(ProtocolError):
            attempt()
