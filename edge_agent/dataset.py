"""Local data: load, tokenise, and batch by length.

Knows files and token ids. Must not import torch or transformers (the agent's shell describes its
datasets without them); a tokenizer is handed in. Valid on Python 3.8.
"""

from __future__ import annotations

import functools
import hashlib
import random
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence, Tuple

from wire_protocol.errors import ConfigError, DeviceError, FailureCode
from wire_protocol.records import Columns, Example, parse_rows, to_examples

IGNORED_LABEL = -100
"""Marks tokens whose prediction does not count; PyTorch's cross entropy skips it."""

MAX_LABELS = 128
MAX_LABEL_LENGTH = 80
_POOL_BATCHES = 20


@dataclass(frozen=True)
class Tokenised:
    """One example as token ids, not padded.

    Attributes:
        inputs: what the tokenizer gave, each of the same length.
        labels: one class index, or one label per token (causal language models).
    """

    inputs: Dict[str, List[int]]
    labels: List[int]

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.inputs["input_ids"])

    @functools.cached_property
    def digest(self) -> bytes:
        """Names the example by what the model reads of it, 16 bytes; reckoned once."""
        digest = hashlib.blake2b(digest_size=16)
        for name in sorted(self.inputs):
            digest.update(name.encode())
            digest.update(array("q", self.inputs[name]).tobytes())
        return digest.digest()


@dataclass(frozen=True)
class Padding:
    """What fills a batch up to its longest example, by input name."""

    values: Dict[str, int]


def load_examples(path: Path, columns: Columns) -> List[Example]:
    """Read a csv, tsv, JSON lines or parquet file.

    Raises:
        DeviceError: MISSING_FILE, EMPTY_DATASET, or BAD_DATA when the file cannot
            be read or a row lacks a column.
    """
    try:
        examples = to_examples(_rows(path), columns)
    except FileNotFoundError as error:
        raise DeviceError(
            FailureCode.MISSING_FILE, f"dataset file {path} does not exist"
        ) from error
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        raise DeviceError(FailureCode.BAD_DATA, f"dataset file {path}: {_line(error)}") from error
    if not examples:
        raise DeviceError(FailureCode.EMPTY_DATASET, f"dataset file {path} holds no example")
    return examples


def describe(path: Path, columns: Columns) -> Tuple[int, Tuple[str, ...]]:
    """How many examples a file holds, and its labels, sorted.

    Answers that are free text are no labels: more than ``MAX_LABELS`` different
    ones, or one longer than ``MAX_LABEL_LENGTH``, give an empty tuple.

    Raises:
        DeviceError: as ``load_examples``.
    """
    examples = load_examples(path, columns)
    labels = sorted({example.label for example in examples})
    if len(labels) > MAX_LABELS or any(len(label) > MAX_LABEL_LENGTH for label in labels):
        labels = []
    return len(examples), tuple(labels)


def tokenise_classification(
    examples: Sequence[Example], tokenizer: Any, *, labels: Sequence[str], max_tokens: int
) -> List[Tokenised]:
    """Turn texts, or pairs of texts, and their labels into ids.

    Args:
        examples: what to tokenise.
        tokenizer: a transformers tokenizer.
        labels: the run's label list; a label's index is its position in it.
        max_tokens: longer inputs are truncated, the longer text of a pair first.

    Raises:
        DeviceError: UNKNOWN_LABEL, for a label that the run does not have.
    """
    index_of = {label: index for index, label in enumerate(labels)}
    for example in examples:
        if example.label not in index_of:
            known = ", ".join(list(index_of)[:10]) or "none"
            raise DeviceError(
                FailureCode.UNKNOWN_LABEL,
                f"label {example.label[:MAX_LABEL_LENGTH]!r} is not one of this run's: {known}",
            )
    texts = [example.text for example in examples]
    pairs = [example.text_pair or "" for example in examples]
    paired = any(example.text_pair is not None for example in examples)
    encoded = tokenizer(texts, pairs if paired else None, truncation=True, max_length=max_tokens)
    names = list(encoded.keys())
    return [
        Tokenised({name: encoded[name][row] for name in names}, [index_of[example.label]])
        for row, example in enumerate(examples)
    ]


def tokenise_instruction(
    examples: Sequence[Example], tokenizer: Any, *, max_tokens: int
) -> List[Tokenised]:
    """Turn prompts and responses into one sequence each: prompt, response, end of text.

    Nothing is put between them, so a prompt carries its own separator. Only the
    response and the end count in the loss. Too long: the prompt loses its
    beginning; a response that leaves no room for a prompt loses its end.
    """
    prompts = tokenizer([example.text for example in examples])["input_ids"]
    answers = tokenizer([example.label for example in examples], add_special_tokens=False)
    end = tokenizer.eos_token_id
    tokenised = []
    for prompt_ids, answer_ids in zip(prompts, answers["input_ids"]):
        answer = (answer_ids + ([] if end is None else [end]))[: max_tokens - 1]
        # The first token is never predicted: without a prompt something must stand before it.
        prompt = (prompt_ids or [end or 0])[-(max_tokens - len(answer)) :]
        ids = prompt + answer
        tokenised.append(
            Tokenised(
                {"input_ids": ids, "attention_mask": [1] * len(ids)},
                [IGNORED_LABEL] * len(prompt) + answer,
            )
        )
    return tokenised


def padding_of(tokenizer: Any) -> Padding:
    """The tokenizer's filling; models without a padding token use 0 under the mask."""
    return Padding(
        {
            "input_ids": tokenizer.pad_token_id or 0,
            "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0) or 0,
        }
    )


def collate(batch: Sequence[Tokenised], padding: Padding) -> Dict[str, List[List[int]]]:
    """Pad to the longest example of the batch.

    Returns:
        Rows by input name, each (batch, longest); ``labels`` is (batch, 1) for
        classification and (batch, longest) for causal language models.
    """
    longest = max(example.length for example in batch)
    columns: Dict[str, List[List[int]]] = {
        name: [
            _pad(example.inputs[name], longest, padding.values.get(name, 0)) for example in batch
        ]
        for name in batch[0].inputs
    }
    width = max(len(example.labels) for example in batch)
    columns["labels"] = [_pad(example.labels, width, IGNORED_LABEL) for example in batch]
    return columns


def endless_batches(
    lengths: Sequence[int], batch_size: int, *, generator: random.Random
) -> Iterator[List[int]]:
    """Row numbers of one batch after another, pass after pass, similar lengths together.

    Every pass visits each row once, in a new order: rows are shuffled, sorted by
    length inside pools of some batches, and the batches shuffled again.

    Args:
        lengths: tokens of each example; at least one.
        batch_size: examples of a batch; the last of a pool may have fewer.
        generator: the source of randomness; its state moves on.
    """
    rows = list(range(len(lengths)))
    pool = batch_size * _POOL_BATCHES
    while True:
        generator.shuffle(rows)
        batches = []
        for start in range(0, len(rows), pool):
            similar = sorted(rows[start : start + pool], key=lengths.__getitem__)
            batches += [similar[at : at + batch_size] for at in range(0, len(similar), batch_size)]
        generator.shuffle(batches)
        yield from batches


def _rows(path: Path) -> Iterator[Dict[str, Any]]:
    if path.suffix.lower() == ".parquet":
        yield from _parquet_rows(path)
    else:
        for row in parse_rows(path.read_text(encoding="utf-8-sig"), path.suffix.lower()):
            yield dict(row)


def _parquet_rows(path: Path) -> List[Dict[str, Any]]:
    if not path.exists():
        raise FileNotFoundError(path)
    try:
        from pyarrow import ArrowException, parquet  # noqa: PLC0415  # optional, and slow to import
    except ImportError as error:
        raise ConfigError("reading parquet needs the package pyarrow; install it") from error
    try:
        rows: List[Dict[str, Any]] = parquet.read_table(path).to_pylist()
    except ArrowException as error:
        raise ConfigError(f"not a readable parquet file: {error}") from error
    return rows


def _pad(values: List[int], length: int, filling: int) -> List[int]:
    return values + [filling] * (length - len(values))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
