"""The blob store on a real disk."""

from __future__ import annotations

import hashlib
import os
import random
import threading
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_server.blobs import (
    BlobStore,
    DiskFull,
    NoSuchBlob,
    TooLarge,
    Upload,
    WrongDigest,
    WrongOffset,
)
from wire_protocol.errors import ConfigError, ProtocolError

CONTENT = random.Random(1).randbytes(1000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


def test_what_was_put_is_found_by_its_digest(store: BlobStore) -> None:
    assert store.put(CONTENT) == DIGEST
    assert store.put(CONTENT) == DIGEST
    assert store.has(DIGEST)
    assert store.read(DIGEST) == CONTENT
    assert store.size_bytes(DIGEST) == 1000
    assert store.path(DIGEST).parent.name == DIGEST[:2]


def test_an_upload_in_pieces_becomes_a_blob(store: BlobStore) -> None:
    assert store.open_upload(DIGEST, 1000) == Upload(complete=False, offset=0)
    assert store.append(DIGEST, 0, CONTENT[:400]) == Upload(complete=False, offset=400)
    assert not store.has(DIGEST)
    assert store.append(DIGEST, 400, CONTENT[400:]) == Upload(complete=True, offset=1000)
    assert store.read(DIGEST) == CONTENT
    assert store.open_upload(DIGEST, 1000) == Upload(complete=True, offset=1000)


def test_an_upload_continues_in_another_process(store: BlobStore, tmp_path: Path) -> None:
    store.open_upload(DIGEST, 1000)
    store.append(DIGEST, 0, CONTENT[:400])
    after_kill = BlobStore(tmp_path / "blobs")
    assert after_kill.open_upload(DIGEST, 1000).offset == 400
    assert after_kill.append(DIGEST, 400, CONTENT[400:]).complete


def test_a_piece_elsewhere_is_refused_with_the_true_offset(store: BlobStore) -> None:
    store.open_upload(DIGEST, 1000)
    store.append(DIGEST, 0, CONTENT[:400])
    for offset in (0, 399, 401, 1000):
        with pytest.raises(WrongOffset) as caught:
            store.append(DIGEST, offset, CONTENT[400:500])
        assert caught.value.offset == 400


def test_wrong_bytes_are_dropped_and_the_upload_starts_again(store: BlobStore) -> None:
    store.open_upload(DIGEST, 1000)
    with pytest.raises(WrongDigest):
        store.append(DIGEST, 0, CONTENT[:999] + b"?")
    assert not store.has(DIGEST)
    assert store.open_upload(DIGEST, 1000).offset == 0
    assert store.append(DIGEST, 0, CONTENT).complete


def test_another_announced_size_starts_again(store: BlobStore) -> None:
    store.open_upload(DIGEST, 2000)
    store.append(DIGEST, 0, CONTENT)
    assert store.open_upload(DIGEST, 1000).offset == 0
    assert store.append(DIGEST, 0, CONTENT).complete


def test_more_bytes_than_announced_are_refused(store: BlobStore) -> None:
    store.open_upload(DIGEST, 999)
    with pytest.raises(TooLarge):
        store.append(DIGEST, 0, CONTENT)


def test_a_blob_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, largest_bytes=999)
    with pytest.raises(TooLarge, match="999"):
        store.open_upload(DIGEST, 1000)


def test_a_blob_that_cannot_fit_on_the_disk_is_refused_at_once(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, largest_bytes=2**62)
    with pytest.raises(DiskFull):
        store.open_upload(DIGEST, 2**60)


def test_a_piece_of_an_upload_that_nobody_announced_is_refused(store: BlobStore) -> None:
    with pytest.raises(NoSuchBlob):
        store.append(DIGEST, 0, CONTENT)
    with pytest.raises(NoSuchBlob):
        store.read(DIGEST)
    with pytest.raises(NoSuchBlob):
        store.size_bytes(DIGEST)


def test_the_empty_blob_needs_no_piece(store: BlobStore) -> None:
    nothing = hashlib.sha256(b"").hexdigest()
    assert store.open_upload(nothing, 0).complete
    assert store.read(nothing) == b""
    with pytest.raises(WrongDigest):
        store.open_upload(DIGEST, 0)


@pytest.mark.parametrize("digest", ["", "..", "../../etc/passwd", DIGEST.upper(), DIGEST + "0"])
def test_what_is_no_digest_never_becomes_a_path(store: BlobStore, digest: str) -> None:
    for attempt in (
        lambda: store.path(digest),
        lambda: store.open_upload(digest, 1),
        lambda: store.append(digest, 0, b"x"),
    ):
        with pytest.raises(ProtocolError):
            attempt()


def test_many_devices_with_the_same_blob_help_each_other(store: BlobStore) -> None:
    content = random.Random(2).randbytes(200_000)
    digest = hashlib.sha256(content).hexdigest()
    failures: list[BaseException] = []

    def device(seed: int) -> None:
        pieces = random.Random(seed)
        upload = store.open_upload(digest, len(content))
        while not upload.complete:
            end = upload.offset + pieces.randint(1, 9000)
            try:
                upload = store.append(digest, upload.offset, content[upload.offset : end])
            except WrongOffset as other_was_faster:
                upload = Upload(complete=False, offset=other_was_faster.offset)
            except NoSuchBlob as error:
                failures.append(error)
                return

    threads = [threading.Thread(target=device, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert store.read(digest) == content


@given(cuts=st.lists(st.integers(0, 1000), max_size=6), restarts=st.booleans())
def test_however_an_upload_is_cut_the_blob_is_the_same(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], restarts: bool
) -> None:
    root = tmp_path_factory.mktemp("blobs")
    store = BlobStore(root)
    store.open_upload(DIGEST, 1000)
    edges = [0, *sorted(cuts), 1000]
    for begin, end in pairwise(edges):
        if restarts:
            store = BlobStore(root)
        store.append(DIGEST, begin, CONTENT[begin:end])
    assert store.read(DIGEST) == CONTENT


def test_uploads_that_nobody_continues_are_removed(store: BlobStore, tmp_path: Path) -> None:
    store.open_upload(DIGEST, 1000)
    (part,) = (tmp_path / "blobs" / "parts").iterdir()
    os.utime(part, (1000, 1000))
    assert store.remove_parts_older_than(3600, now=2000) == 0
    assert store.remove_parts_older_than(3600, now=9000) == 1
    assert not part.exists()


def test_a_removed_blob_is_gone(store: BlobStore) -> None:
    store.put(CONTENT)
    store.remove(DIGEST)
    store.remove(DIGEST)
    assert not store.has(DIGEST)


def test_blobs_are_for_the_server_only(store: BlobStore) -> None:
    store.put(CONTENT)
    assert store.path(DIGEST).stat().st_mode & 0o077 == 0


def test_a_root_that_is_a_file_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "blobs").write_text("not a folder")
    with pytest.raises(ConfigError, match="cannot keep blobs"):
        BlobStore(tmp_path / "blobs")
