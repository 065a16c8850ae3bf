"""csv, tsv and JSON lines mean the same examples."""

from __future__ import annotations

import csv
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wire_protocol.errors import ConfigError
from wire_protocol.records import Columns, Example, parse_rows, to_examples

CELLS = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1, max_size=20)


@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=5))
def test_csv_and_json_lines_hold_the_same_examples(rows: list[tuple[str, str]]) -> None:
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["text", "label"])
    writer.writerows(rows)
    lines = "\n".join(json.dumps({"text": text, "label": label}) for text, label in rows)
    expected = [Example(text, None, label) for text, label in rows]
    assert to_examples(parse_rows(table.getvalue(), ".csv"), Columns()) == expected
    assert to_examples(parse_rows(lines, ".jsonl"), Columns()) == expected


def test_quotes_in_a_tsv_file_are_text() -> None:
    rows = parse_rows('text\tlabel\n"half a quote\tok\n', ".tsv")
    assert to_examples(rows, Columns()) == [Example('"half a quote', None, "ok")]


def test_a_line_separator_inside_a_json_string_is_text() -> None:
    rows = parse_rows('{"text": "a\u2028b\x85c", "label": "x"}\n', ".jsonl")
    assert to_examples(rows, Columns()) == [Example("a\u2028b\x85c", None, "x")]


def test_a_pair_has_two_texts() -> None:
    rows = parse_rows('{"a": "x", "b": "y", "l": 1}\n', ".jsonl")
    assert to_examples(rows, Columns("a", "b", "l")) == [Example("x", "y", "1")]


@pytest.mark.parametrize(
    ("content", "suffix", "words"),
    [
        ("text\tlabel\nonly one cell\n", ".tsv", "row 1 has no column 'label'; it has: text"),
        ("{}", ".jsonl", "row 1 has no column 'text'"),
        ("[1]", ".jsonl", "line 1 is not a JSON object"),
        ("{", ".jsonl", "line 1 is not JSON"),
        ("", ".xlsx", "not '.xlsx'"),
    ],
)
def test_a_file_that_is_not_what_it_should_be_says_where(
    content: str, suffix: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words.replace(".", r"\.")):
        to_examples(parse_rows(content, suffix), Columns())
