"""Labelled examples as text: csv, tsv and JSON lines become plain records.

Pure: takes text, returns values. Both sides read examples in the same way, so
that a held-out file means what a device's file means. Valid on Python 3.8.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from typing import Any, Iterable, Iterator, List, Mapping, Optional

from wire_protocol.errors import ConfigError


@dataclass(frozen=True)
class Columns:
    """Which columns hold what.

    Classification uses ``text``, optionally ``text_pair``, and ``label``;
    instruction tuning uses ``text`` (the prompt) and ``label`` (the response).
    """

    text: str = "text"
    text_pair: Optional[str] = None
    label: str = "label"


@dataclass(frozen=True)
class Example:
    """One record: an input text, maybe a second one, and the wanted answer."""

    text: str
    text_pair: Optional[str]
    label: str


def parse_rows(content: str, suffix: str) -> Iterator[Mapping[str, Any]]:
    """Split the text of a data file into rows.

    Args:
        content: the whole file.
        suffix: ``.csv``, ``.tsv``, ``.jsonl`` or ``.json`` (as JSON lines). A
            tsv file has a header and no quoting.

    Raises:
        ConfigError: another suffix, or a line that is not what it should be.
    """
    if suffix in (".csv", ".tsv"):
        yield from _table_rows(content, suffix)
    elif suffix in (".jsonl", ".json"):
        # Not splitlines(): JSON allows U+2028 and its like inside a string.
        for number, line in enumerate(content.split("\n"), start=1):
            if line.strip():
                yield _json_row(line, number)
    else:
        raise ConfigError(f"data files end in .csv, .tsv, .jsonl or .parquet, not {suffix!r}")


def to_examples(rows: Iterable[Mapping[str, Any]], columns: Columns) -> List[Example]:
    """Pick the named columns out of every row.

    Raises:
        ConfigError: a row lacks one of the columns or holds nothing there.
    """
    examples = []
    for number, row in enumerate(rows, start=1):
        text = _cell(row, columns.text, number)
        pair = _cell(row, columns.text_pair, number) if columns.text_pair else None
        examples.append(Example(text, pair, _cell(row, columns.label, number)))
    return examples


def _table_rows(content: str, suffix: str) -> Iterator[Mapping[str, Any]]:
    lines = io.StringIO(content)
    if suffix == ".tsv":
        reader = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.DictReader(lines)
    try:
        yield from reader
    except csv.Error as error:
        raise ConfigError(f"line {reader.line_num} is not well-formed: {error}") from error


def _cell(row: Mapping[str, Any], column: str, number: int) -> str:
    value = row.get(column)
    if value is None:
        known = ", ".join(str(key) for key in row if key is not None)
        raise ConfigError(f"row {number} has no column {column!r}; it has: {known}")
    return str(value)


def _json_row(line: str, number: int) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"line {number} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ConfigError(f"line {number} is not a JSON object")
    return row
