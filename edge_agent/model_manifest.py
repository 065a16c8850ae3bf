"""What a base model's folder must contain, and how its digest follows from that.

Pure. The digest names every path, size and content, so a device that knows it needs to trust
neither the server nor the network.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from wire_protocol.errors import ProtocolError
from wire_protocol.parts import BlobRef

_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")


class ModelFile(BlobRef):
    """One file of a base model; ``path`` is relative to its folder."""

    path: Annotated[str, Field(max_length=200)]


_FILES = TypeAdapter(list[ModelFile])


def model_files(answer: Mapping[str, Any], digest: str) -> list[ModelFile]:
    """Read the server's description of a base model.

    Args:
        answer: JSON with ``files``.
        digest: which base model was asked for.

    Raises:
        ProtocolError: not a description, not the one of this digest, or a path that would lead
            out of the folder.
    """
    try:
        files = _FILES.validate_python(answer.get("files"))
    except ValidationError as error:
        raise ProtocolError(
            f"the server's description of model {digest[:12]} is wrong: {error.errors()[0]['msg']}"
        ) from error
    for file in files:
        if not _PATH.fullmatch(file.path) or PurePosixPath(file.path).is_absolute():
            raise ProtocolError(f"model {digest[:12]} has a file with the path {file.path[:60]!r}")
    if manifest_digest(files) != digest:
        raise ProtocolError(f"the files that the server lists are not those of model {digest[:12]}")
    return files


def manifest_digest(files: list[ModelFile]) -> str:
    """The digest of a base model: SHA-256 of its canonical JSON manifest."""
    entries = [
        {"path": file.path, "sha256": file.sha256, "size_bytes": file.size_bytes}
        for file in sorted(files, key=lambda file: file.path)
    ]
    text = json.dumps({"files": entries}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
