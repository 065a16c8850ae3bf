"""A base model in the cache: still what its name says, and read again only when it may not be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edge_agent import model_cache
from edge_agent.model_cache import ModelCheck, folder_digest, remove_strangers
from edge_agent.model_manifest import ModelFile


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "deep").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "deep" / "weights").write_bytes(b"w" * 5000)
    return folder


def test_a_folder_holds_its_digest_until_a_byte_changes(folder: Path) -> None:
    digest, check = folder_digest(folder), ModelCheck()
    assert check.holds(folder, digest)
    weights = folder / "deep" / "weights"
    times = weights.stat()
    with weights.open("r+b") as file:
        file.seek(2500)
        file.write(b"x")
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert not check.holds(folder, digest), "the same size and time of change do not hide it"


def test_a_missing_file_and_a_stranger_are_changes_too(folder: Path) -> None:
    digest, check = folder_digest(folder), ModelCheck()
    (folder / "notes.txt").write_text("mine")
    assert not check.holds(folder, digest)
    (folder / "notes.txt").unlink()
    assert check.holds(folder, digest)
    (folder / "config.json").unlink()
    assert not check.holds(folder, digest)
    assert not check.holds(folder / "absent", digest)


def test_an_unchanged_folder_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest, check = folder_digest(folder), ModelCheck()
    assert check.holds(folder, digest)
    monkeypatch.setattr(model_cache, "folder_digest", lambda _folder: pytest.fail("read again"))
    assert check.holds(folder, digest)


def test_strangers_are_removed_and_half_fetched_files_stay(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    (folder / "config.json.part").write_text("{")
    (folder / "deep" / "weights").rename(folder / "deep" / "stranger")
    listed = [ModelFile(path="config.json", sha256="0" * 64, size_bytes=2)]
    remove_strangers(folder, listed)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    assert names == ["config.json", "config.json.part", "deep"]
