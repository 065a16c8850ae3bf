"""One backup as a file: a tar that proves whether it is whole.

The digests of all members come last, in ``manifest.json``: they are counted while the bytes go out,
and an archive that broke off has none. Knows files, nothing of servers.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from wire_protocol.errors import ConfigError

MANIFEST_FILE = "manifest.json"
FORMAT = "legend.backup/1"
_PIECE_BYTES = 1024 * 1024
_BLOCK = tarfile.BLOCKSIZE
_LARGEST_MANIFEST_BYTES = 256 * 1024 * 1024


class MemberDigest(BaseModel):
    """What one file of the archive must be."""

    model_config = ConfigDict(frozen=True)

    size_bytes: int
    sha256: str


class BackupManifest(BaseModel):
    """What the archive is of.

    Attributes:
        database: ``sqlite``: a copy is inside; anything else: it is not.
        start_number: how often the server had started.
        runs: status by run id.
        files: everything else in the archive.
    """

    model_config = ConfigDict(frozen=True)

    format: str = FORMAT
    version: str
    fleet: str
    made_at: str
    database: str
    start_number: int
    runs: dict[str, str]
    files: dict[str, MemberDigest] = {}

    @property
    def size_bytes(self) -> int:
        """Sum over all files."""
        return sum(file.size_bytes for file in self.files.values())


@dataclass(frozen=True)
class Member:
    """One file to put into an archive."""

    name: str
    path: Path


def archive_pieces(members: list[Member], about: BackupManifest) -> Iterator[bytes]:
    """The archive, piece by piece; never a whole file in memory.

    Args:
        members: files that are not rewritten; what is appended meanwhile is left out.
        about: the manifest without ``files``.

    Raises:
        OSError: a file cannot be read, or became shorter.
    """
    files: dict[str, dict[str, Any]] = {}
    for member in members:
        with member.path.open("rb") as stream:
            size_bytes = member.path.stat().st_size
            digest, left = hashlib.sha256(), size_bytes
            yield _header(member.name, size_bytes, member.path.stat().st_mode & 0o777)
            while left:
                piece = stream.read(min(left, _PIECE_BYTES))
                if not piece:
                    raise OSError(f"{member.path} became shorter while it was read")
                digest.update(piece)
                left -= len(piece)
                yield piece
        yield _padding(size_bytes)
        files[member.name] = {"size_bytes": size_bytes, "sha256": digest.hexdigest()}
    manifest = about.model_dump() | {"files": files}
    text = json.dumps(manifest, indent=1).encode()
    yield _header(MANIFEST_FILE, len(text), 0o600) + text + _padding(len(text))
    yield bytes(2 * _BLOCK)


def unpack(archive: Path, target: Path | None) -> BackupManifest:
    """Check every byte of an archive and, with a target, write its files there.

    Args:
        archive: made of ``archive_pieces``.
        target: an empty folder; None only checks.

    Raises:
        ConfigError: it is no backup, is incomplete, or was changed.
        OSError: the target cannot be written.
    """
    found: dict[str, MemberDigest] = {}
    manifest: BackupManifest | None = None
    try:
        with archive.open("rb") as raw, tarfile.open(fileobj=raw, mode="r|") as tar:
            for info in tar:
                if manifest is not None or not info.isfile() or not _is_inside(info.name):
                    raise ConfigError(f"{archive} holds {info.name[:100]!r}: it is no backup")
                if info.name == MANIFEST_FILE:
                    manifest = _read_manifest(tar, info, archive)
                else:
                    found[info.name] = _take(tar, info, target)
    except FileNotFoundError as error:
        raise ConfigError(f"there is no file {archive}") from error
    except (tarfile.TarError, EOFError) as error:
        raise _incomplete(archive) from error
    if manifest is None:
        raise _incomplete(archive)
    _compare(manifest.files, found, archive)
    return manifest


def _take(tar: tarfile.TarFile, info: tarfile.TarInfo, target: Path | None) -> MemberDigest:
    source = tar.extractfile(info)
    if source is None:
        raise EOFError
    digest, size_bytes = hashlib.sha256(), 0
    path = target / info.name if target else Path("/dev/null")
    if target:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with path.open("wb") as out:
        while piece := source.read(_PIECE_BYTES):
            digest.update(piece)
            size_bytes += len(piece)
            out.write(piece)
    if target:
        path.chmod(info.mode & 0o755)
    return MemberDigest(size_bytes=size_bytes, sha256=digest.hexdigest())


def _read_manifest(tar: tarfile.TarFile, info: tarfile.TarInfo, archive: Path) -> BackupManifest:
    source = tar.extractfile(info)
    if source is None or info.size > _LARGEST_MANIFEST_BYTES:
        raise _incomplete(archive)
    try:
        manifest = BackupManifest.model_validate_json(source.read())
    except ValidationError as error:
        raise ConfigError(f"{archive} is no backup of this program: {MANIFEST_FILE}") from error
    if manifest.format != FORMAT:
        raise ConfigError(f"{archive} has format {manifest.format[:40]!r}; this is {FORMAT}")
    return manifest


def _compare(
    wanted: Mapping[str, MemberDigest], found: Mapping[str, MemberDigest], archive: Path
) -> None:
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise ConfigError(f"{archive} is damaged at {name[:100]}; use another backup")


def _incomplete(archive: Path) -> ConfigError:
    return ConfigError(f"{archive} is no backup, or it broke off; use another one")


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.name) and not path.is_absolute() and ".." not in path.parts


def _header(name: str, size_bytes: int, mode: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size_bytes, mode
    return info.tobuf(tarfile.PAX_FORMAT)


def _padding(size_bytes: int) -> bytes:
    return bytes(-size_bytes % _BLOCK)
