"""Local data becomes batches of token ids."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.dataset import (
    IGNORED_LABEL,
    MAX_LABELS,
    Padding,
    Tokenised,
    collate,
    describe,
    endless_batches,
    load_examples,
    tokenise_classification,
    tokenise_instruction,
)
from wire_protocol.errors import DeviceError, FailureCode
from wire_protocol.records import Columns, Example

END = 99


class LetterTokenizer:
    """A tokenizer that a reader can follow: one id per letter, ``a`` is 1."""

    eos_token_id = END

    def __call__(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        truncation: bool = False,
        max_length: int = 0,
        add_special_tokens: bool = True,
    ) -> dict[str, list[list[int]]]:
        both = [text + (pairs[row] if pairs else "") for row, text in enumerate(texts)]
        ids = [[ord(letter) - 96 for letter in text] for text in both]
        return {"input_ids": [row[:max_length] for row in ids] if truncation else ids}


def failure(path: Path, columns: Columns) -> DeviceError:
    with pytest.raises(DeviceError) as caught:
        load_examples(path, columns)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'text,label\n"good, really",yes\nbad,no\n'),
        ("a.tsv", "text\tlabel\ngood, really\tyes\nbad\tno\n"),
        ("a.jsonl", '{"text":"good, really","label":"yes"}\n{"text":"bad","label":"no"}\n'),
    ],
)
def test_text_files_hold_the_same_examples(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    assert load_examples(path, Columns()) == [
        Example("good, really", None, "yes"),
        Example("bad", None, "no"),
    ]


def test_parquet_holds_the_same_examples(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet  # noqa: PLC0415  # only where it is installed

    table = pyarrow.table({"s1": ["good"], "s2": ["fine"], "gold": [1]})
    parquet.write_table(table, tmp_path / "a.parquet")
    columns = Columns(text="s1", text_pair="s2", label="gold")
    assert load_examples(tmp_path / "a.parquet", columns) == [Example("good", "fine", "1")]


@pytest.mark.parametrize("name", ["none.csv", "none.parquet"])
def test_a_file_that_is_not_there_is_missing(tmp_path: Path, name: str) -> None:
    assert failure(tmp_path / name, Columns()).code is FailureCode.MISSING_FILE


def test_a_file_without_rows_is_empty(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\n", encoding="utf-8")
    assert failure(tmp_path / "a.csv", Columns()).code is FailureCode.EMPTY_DATASET


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", b"sentence,label\ngood,yes\n", "text"),
        ("a.jsonl", b'{"text": "good"\n', "not JSON"),
        ("a.jsonl", b"\xff\xfe\x00", "decode"),
        ("a.xlsx", b"anything", ".xlsx"),
        ("a.parquet", b"not parquet", "parquet"),
    ],
)
def test_a_file_that_cannot_be_used_is_bad_data(
    tmp_path: Path, name: str, content: bytes, expected: str
) -> None:
    (tmp_path / name).write_bytes(content)
    error = failure(tmp_path / name, Columns())
    assert error.code is FailureCode.BAD_DATA
    assert expected in str(error)


def test_a_description_counts_examples_and_names_the_labels(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\na,yes\nb,no\nc,yes\n", encoding="utf-8")
    assert describe(tmp_path / "a.csv", Columns()) == (3, ("no", "yes"))


@pytest.mark.parametrize("answers", [[str(n) for n in range(MAX_LABELS + 1)], ["x" * 81]])
def test_free_text_answers_are_no_labels(tmp_path: Path, answers: list[str]) -> None:
    rows = "".join(f"q,{answer}\n" for answer in answers)
    (tmp_path / "a.csv").write_text("text,label\n" + rows, encoding="utf-8")
    assert describe(tmp_path / "a.csv", Columns()) == (len(answers), ())


def test_a_label_is_its_position_in_the_runs_list() -> None:
    examples = [Example("ab", "c", "yes"), Example("a", "b", "no")]
    tokenised = tokenise_classification(
        examples, LetterTokenizer(), labels=("no", "yes"), max_tokens=8
    )
    assert tokenised == [
        Tokenised({"input_ids": [1, 2, 3]}, [1]),
        Tokenised({"input_ids": [1, 2]}, [0]),
    ]


def test_a_label_that_the_run_does_not_have_is_named() -> None:
    with pytest.raises(DeviceError, match=r"'maybe' is not one of this run's: no, yes") as caught:
        tokenise_classification(
            [Example("a", None, "maybe")], LetterTokenizer(), labels=("no", "yes"), max_tokens=8
        )
    assert caught.value.code is FailureCode.UNKNOWN_LABEL


def test_only_the_response_and_the_end_count_in_the_loss() -> None:
    (example,) = tokenise_instruction(
        [Example("abc", None, "de")], LetterTokenizer(), max_tokens=16
    )
    assert example.inputs["input_ids"] == [1, 2, 3, 4, 5, END]
    assert example.labels == [IGNORED_LABEL] * 3 + [4, 5, END]


def test_a_long_prompt_loses_its_beginning_and_the_response_stays() -> None:
    (example,) = tokenise_instruction([Example("abc", None, "de")], LetterTokenizer(), max_tokens=4)
    assert example.inputs["input_ids"] == [3, 4, 5, END]


@given(
    prompt=st.text("abcdefg", max_size=20),
    response=st.text("abcdefg", max_size=20),
    max_tokens=st.integers(4, 24),
)
def test_every_instruction_fits_and_has_something_to_predict(
    prompt: str, response: str, max_tokens: int
) -> None:
    (example,) = tokenise_instruction(
        [Example(prompt, None, response)], LetterTokenizer(), max_tokens=max_tokens
    )
    assert example.length == len(example.labels) <= max_tokens
    assert any(label != IGNORED_LABEL for label in example.labels[1:])


def test_a_batch_is_padded_to_its_longest_example() -> None:
    batch = [
        Tokenised({"input_ids": [5, 6], "attention_mask": [1, 1]}, [0]),
        Tokenised({"input_ids": [7, 8, 9], "attention_mask": [1, 1, 1]}, [1]),
    ]
    assert collate(batch, Padding({"input_ids": 3})) == {
        "input_ids": [[5, 6, 3], [7, 8, 9]],
        "attention_mask": [[1, 1, 0], [1, 1, 1]],
        "labels": [[0], [1]],
    }


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=120),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 9),
)
def test_every_pass_visits_each_example_once(
    lengths: list[int], batch_size: int, seed: int
) -> None:
    batches = endless_batches(lengths, batch_size, generator=random.Random(seed))
    for _ in range(2):
        rows: list[int] = []
        while len(rows) < len(lengths):
            batch = next(batches)
            assert 1 <= len(batch) <= batch_size
            rows += batch
        assert sorted(rows) == list(range(len(lengths)))


def test_examples_of_similar_length_share_a_batch() -> None:
    lengths = [1 + row % 50 for row in range(400)]
    batches = endless_batches(lengths, 8, generator=random.Random(0))
    padded = sum(
        max(lengths[row] for row in batch) * len(batch) for batch in itertools.islice(batches, 50)
    )
    assert padded < 1.2 * sum(lengths)


def test_the_seed_decides_the_order() -> None:
    def first(seed: int) -> list[list[int]]:
        batches = endless_batches([3] * 64, 4, generator=random.Random(seed))
        return list(itertools.islice(batches, 16))

    assert first(1) == first(1)
    assert first(1) != first(2)


def test_describing_data_needs_no_torch() -> None:
    program = (
        "import sys, edge_agent.dataset, edge_agent.trainer\n"
        "assert not {'torch', 'transformers', 'numpy', 'pyarrow'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
