"""Whether a base model that lies on this device still is what its name says.

A memory card that decays, or a person who edits a file, would change what every round here is
trained from, and nobody would see it in the update. Knows folders and digests; no network.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from edge_agent.model_manifest import ModelFile, manifest_digest

_READ_BYTES = 1024 * 1024

Stamps = tuple[tuple[str, int, int, int, int], ...]


class ModelCheck:
    """Compares folders with their digests; reads a folder again only when a file's status changed.

    A check of a base model reads all of it once in the life of the agent, and afterwards looks at
    inode, size and times of its files. Blocking: call it in a thread.
    """

    def __init__(self) -> None:
        self._good: dict[Path, Stamps] = {}

    def holds(self, folder: Path, digest: str) -> bool:
        """Whether the folder contains the files of this digest, and no others."""
        try:
            stamps = _stamps(folder)
            if self._good.get(folder) == stamps:
                return True
            good = folder_digest(folder) == digest
        except OSError:
            return False
        if good:
            self._good[folder] = stamps
        return good


def folder_digest(folder: Path) -> str:
    """The digest of the base model whose files these are.

    Raises:
        OSError: a file cannot be read.
    """
    return manifest_digest([_described(path, folder) for path in _files(folder)])


def set_aside(folder: Path, partial: Path) -> None:
    """Make a changed folder one that is being fetched: what is still right is not fetched again.

    Raises:
        OSError: the disk failed.
    """
    shutil.rmtree(partial, ignore_errors=True)
    folder.replace(partial)


def remove_strangers(folder: Path, files: list[ModelFile]) -> None:
    """Delete what does not belong to the base model; half of a file of it may stay."""
    wanted = {file.path for file in files} | {f"{file.path}.part" for file in files}
    for path in _files(folder):
        if path.relative_to(folder).as_posix() not in wanted:
            path.unlink(missing_ok=True)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _stamps(folder: Path) -> Stamps:
    statuses = [(path.relative_to(folder).as_posix(), path.stat()) for path in _files(folder)]
    return tuple(
        (path, one.st_ino, one.st_size, one.st_mtime_ns, one.st_ctime_ns) for path, one in statuses
    )


def _described(path: Path, folder: Path) -> ModelFile:
    digest, size_bytes = hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
            size_bytes += len(piece)
    name = path.relative_to(folder).as_posix()
    # Not validated: the path of a stranger may be anything, and then the digest differs.
    return ModelFile.model_construct(path=name, sha256=digest.hexdigest(), size_bytes=size_bytes)
