"""Registered base models: from uploaded blobs to a folder that transformers loads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from broker_server.base_model import ModelFile, digest_of, read_config, tensor_shapes
from broker_server.blobs import BlobStore
from broker_server.store import ModelRow, Store
from wire_protocol.durable import move_into_place, sync
from wire_protocol.errors import ConfigError
from wire_protocol.model_family import ModelShape, model_shape


class ModelRegistry:
    """Base models by name and digest.

    Args:
        store: remembers them.
        blobs: holds their files.
        folder: one folder per digest, made of hard links into the blob store.
    """

    def __init__(self, store: Store, blobs: BlobStore, folder: Path) -> None:
        self._store = store
        self.blobs = blobs
        self._folder = folder

    def register(self, name: str, files: Sequence[ModelFile]) -> str:
        """Make uploaded files a base model; returns its digest.

        Raises:
            ConfigError: a file is not uploaded, has a strange path, or the
                architecture is not supported. Nothing is registered then.
        """
        for file in files:
            path = Path(file.path)
            if not file.path.isprintable():
                raise ConfigError(f"model file path {file.path!r} holds characters without a shape")
            if path.is_absolute() or ".." in path.parts or not path.name:
                raise ConfigError(f"model file path {file.path!r} must stay inside the model")
            if not self.blobs.has(file.sha256):
                raise ConfigError(f"model file {file.path} is not uploaded; send its blob first")
            if self.blobs.size_bytes(file.sha256) != file.size_bytes:
                raise ConfigError(f"model file {file.path} is not {file.size_bytes} bytes long")
        if len({file.path for file in files}) != len(files):
            raise ConfigError("a model file is listed twice")
        digest = digest_of(files)
        try:
            folder = self._link(digest, files)
        except OSError as error:
            raise ConfigError(f"the model's files cannot be laid out: {error.strerror}") from error
        try:
            config = read_config(folder)
            model_shape(config)
            tensor_shapes(folder)
        except ConfigError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        listing = json.dumps([asdict(file) for file in sorted(files, key=lambda f: f.path)])
        self._store.save_model(digest, name, files=listing, config=json.dumps(config))
        return digest

    def rows(self) -> Sequence[ModelRow]:
        """Every model by name."""
        return self._store.models()

    def find(self, name_or_digest: str) -> ModelRow:
        """One model.

        Raises:
            ConfigError: no such model; the line lists those there are.
        """
        row = self._store.model(name_or_digest)
        if row is None:
            known = ", ".join(model.name for model in self.rows()) or "none yet"
            raise ConfigError(
                f"no base model {name_or_digest!r} (known: {known}); add one: legend model add DIR"
            )
        return row

    def folder(self, digest: str) -> Path:
        """Where the files of a registered model lie."""
        return self._folder / digest

    def _link(self, digest: str, files: Sequence[ModelFile]) -> Path:
        folder = self.folder(digest)
        if folder.exists():
            return folder
        partial = folder.with_name(f".{digest}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        for file in files:
            target = partial / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(self.blobs.path(file.sha256), target)
        for inner in (partial, *(path for path in partial.rglob("*") if path.is_dir())):
            sync(inner)
        move_into_place(partial, folder, site="server.base_model")
        return folder


def shape_of(row: ModelRow) -> ModelShape:
    """Sizes of a registered model."""
    return model_shape(json.loads(row.config))
