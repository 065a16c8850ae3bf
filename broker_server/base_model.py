"""Base models as folders on the server: which files count, their digest, their sizes.

Knows the layout of a transformers checkpoint and the header of a safetensors
file; reads no weights except single named tensors. Must not know torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wire_protocol.errors import ConfigError
from wire_protocol.model_family import ModelShape, Shape, model_shape

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = frozenset(
    {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.txt",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "tokenizer.model",
        "spiece.model",
        "spm.model",
        "sentencepiece.bpe.model",
    }
)
VOCABULARIES = (
    ("tokenizer.json",),
    ("vocab.txt",),
    ("vocab.json", "merges.txt"),
    ("tokenizer.model",),
    ("spiece.model",),
    ("spm.model",),
    ("sentencepiece.bpe.model",),
)
"""A tokenizer can be built from any one of these sets."""
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth")
_MAX_HEADER_BYTES = 100 * 1024 * 1024


@dataclass(frozen=True)
class ModelFile:
    """One file of a base model; ``path`` is relative to its folder."""

    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class BaseModel:
    """A base model on disk: its folder, its files and its sizes."""

    folder: Path
    files: tuple[ModelFile, ...]
    shape: ModelShape

    @property
    def digest(self) -> str:
        """The name of this model on the wire, sha256 in hexadecimal."""
        return digest_of(self.files)

    @property
    def size_bytes(self) -> int:
        """What a device has to fetch."""
        return sum(file.size_bytes for file in self.files)


def read_base_model(folder: Path) -> BaseModel:
    """Check a base model folder and hash its files (a second per gigabyte or so).

    Raises:
        ConfigError: see ``manifest_of``; also an architecture outside the table.
    """
    shape = model_shape(read_config(folder))
    return BaseModel(folder, manifest_of(folder), shape)


def manifest_of(folder: Path) -> tuple[ModelFile, ...]:
    """Hash the files that make up a base model, sorted by path.

    The configuration, the safetensors weights and the tokenizer count;
    documentation, other weight formats and hidden files do not.

    Raises:
        ConfigError: no folder, no ``config.json``, no safetensors weights (pickles
            are refused), a missing shard, or no tokenizer.
    """
    read_config(folder)
    present = {path.name for path in folder.iterdir() if path.is_file()}
    if not any(present.issuperset(needed) for needed in VOCABULARIES):
        raise ConfigError(f"{folder} holds no tokenizer; save the model's tokenizer files there")
    names = {"config.json", *weight_files(folder)}
    if WEIGHTS not in names:
        names.add(INDEX)
    names |= present & (TOKENIZER_FILES | {"generation_config.json"})
    return tuple(_hashed(folder, name) for name in sorted(names))


def digest_of(files: Sequence[ModelFile]) -> str:
    """Name a base model by its files: sha256 of the manifest's canonical JSON."""
    ordered = sorted(files, key=lambda file: file.path)
    manifest = {"files": [asdict(file) for file in ordered]}
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def read_config(folder: Path) -> Mapping[str, Any]:
    """Read ``config.json`` of a base model.

    Raises:
        ConfigError: it is missing or not a JSON object.
    """
    return _json_object(folder / "config.json")


def weight_files(folder: Path) -> tuple[str, ...]:
    """Names of the safetensors files that hold the weights.

    Raises:
        ConfigError: there are none, or the index names a file that is missing.
    """
    if (folder / WEIGHTS).is_file():
        return (WEIGHTS,)
    if (folder / INDEX).is_file():
        shards = _weight_map(folder)
        names = tuple(sorted(set(shards.values())))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ConfigError(f"{folder} lacks the shard {missing[0]}; download it again")
        return names
    pickles = [name for name in _PICKLES if (folder / name).is_file()]
    if pickles:
        raise ConfigError(
            f"{folder} holds only pickled weights ({pickles[0]}), which are never loaded; convert "
            "them on a machine you trust with save_pretrained(folder, safe_serialization=True)"
        )
    raise ConfigError(f"{folder} holds no {WEIGHTS}; give the folder of a downloaded base model")


def tensor_shapes(folder: Path) -> dict[str, Shape]:
    """Name and shape of every tensor of a base model, from the headers alone.

    Raises:
        ConfigError: a weight file is missing or not safetensors.
    """
    shapes: dict[str, Shape] = {}
    for name in weight_files(folder):
        header, _ = _header(folder / name)
        shapes |= {key: tuple(entry["shape"]) for key, entry in header.items()}
    return shapes


def read_tensor(folder: Path, name: str) -> NDArray[np.float32]:
    """Read one tensor of a base model as float32.

    Raises:
        ConfigError: no weight file holds it, or its dtype is not a float.
    """
    for file_name in weight_files(folder):
        header, data_start = _header(folder / file_name)
        if name in header:
            return _tensor(folder / file_name, data_start, header[name])
    raise ConfigError(f"base model in {folder} has no tensor {name!r}")


def _hashed(folder: Path, name: str) -> ModelFile:
    path = folder / name
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return ModelFile(name, digest.hexdigest(), path.stat().st_size)


def _json_object(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return value


def _weight_map(folder: Path) -> Mapping[str, str]:
    shards = _json_object(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ConfigError(f"{folder / INDEX} has no weight_map; download the model again")
    for name in shards.values():
        # A downloaded index must not lead outside the folder.
        if not isinstance(name, str) or Path(name).name != name:
            raise ConfigError(f"{folder / INDEX} names {str(name)[:80]!r}, which is no file name")
    return shards


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """Header of a safetensors file without metadata, and where the data starts.

    Source: safetensors format: 8 bytes little-endian length, then JSON.
    """
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        raw = stream.read(length) if length <= _MAX_HEADER_BYTES else b""
    try:
        header = json.loads(raw)
        tensors = {key: value for key, value in header.items() if key != "__metadata__"}
        ends = [int(entry["data_offsets"][1]) for entry in tensors.values()]
        for entry in tensors.values():
            tuple(entry["shape"])
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise ConfigError(f"{path} is not a safetensors file; download it again") from error
    if path.stat().st_size != 8 + length + max(ends, default=0):
        raise ConfigError(f"{path} is cut off or damaged; download it again")
    return tensors, 8 + length


def _tensor(path: Path, data_start: int, entry: Mapping[str, Any]) -> NDArray[np.float32]:
    begin, end = entry["data_offsets"]
    with path.open("rb") as stream:
        stream.seek(data_start + begin)
        raw = stream.read(end - begin)
    shape = tuple(entry["shape"])
    if entry["dtype"] == "BF16":
        # NumPy has no bfloat16: it is the upper half of a float32.
        wide = np.frombuffer(raw, dtype="<u2").astype("<u4") << np.uint32(16)
        return np.ascontiguousarray(wide.view("<f4").reshape(shape), dtype=np.float32)
    kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
    if entry["dtype"] not in kinds:
        raise ConfigError(f"{path} stores weights as {entry['dtype']}; use a float checkpoint")
    return np.frombuffer(raw, dtype=kinds[entry["dtype"]]).reshape(shape).astype(np.float32)
