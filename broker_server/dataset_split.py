"""One labelled file becomes one file per device (``legend data split``).

Knows files; which row goes where is ``partition``'s business.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from broker_server.partition import PartitionOptions, split_by_label
from broker_server.run_spec import read_rows
from wire_protocol.errors import ConfigError


def split_file(
    source: Path, out_dir: Path, *, label: str, options: PartitionOptions, seed: int
) -> dict[str, dict[str, int]]:
    """Write ``device-1.jsonl``, ... (or ``.tsv`` for a tsv file) into a folder.

    Args:
        source: csv, tsv, JSON lines or parquet; all columns are kept.
        out_dir: made as needed; files of the same names are replaced.
        label: the column whose values are skewed.
        options: how many devices, how unlike each other.
        seed: equal seeds give equal files.

    Returns:
        Per file name, how often each label occurs.

    Raises:
        ConfigError: the file cannot be read, lacks the column or is too short.
    """
    rows = read_rows(source)
    labels = [_label_of(row, label, number) for number, row in enumerate(rows, start=1)]
    parts = split_by_label(labels, options, generator=np.random.default_rng(seed))
    suffix = ".tsv" if source.suffix == ".tsv" else ".jsonl"
    counts: dict[str, dict[str, int]] = {}
    width = len(str(options.devices))
    for number, part in enumerate(parts, start=1):
        name = f"device-{number:0{width}d}{suffix}"
        chosen = [rows[int(index)] for index in part]
        text = _as_tsv(chosen) if suffix == ".tsv" else _as_json_lines(chosen)
        write_text(out_dir / name, text)
        counts[name] = dict(Counter(labels[int(index)] for index in part))
    return counts


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing.

    Raises:
        ConfigError: the place cannot be written.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8", newline="") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def _label_of(row: Mapping[str, Any], column: str, number: int) -> str:
    value = row.get(column)
    if value is None:
        known = ", ".join(str(key) for key in row if key is not None)
        raise ConfigError(f"row {number} has no column {column!r}; it has: {known}")
    return str(value)


def _as_json_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    # A csv row with too many cells keeps the surplus under the key None.
    named = ({key: value for key, value in row.items() if key is not None} for row in rows)
    lines = (json.dumps(row, separators=(",", ":"), default=str) for row in named)
    return "".join(f"{line}\n" for line in lines)


def _as_tsv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of a tsv file as they were: a tab cannot occur inside a cell."""
    if not rows:
        return ""
    columns = [key for key in rows[0] if key is not None]
    lines = ("\t".join(str(row.get(key) or "") for key in columns) for row in rows)
    return "".join(f"{line}\n" for line in ("\t".join(columns), *lines))
