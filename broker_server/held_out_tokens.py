"""Held-out examples as token ids and padded batches, the way devices read theirs.

Knows token ids; a tokenizer is handed in. Must not know torch or files. The
rules are those of the devices, so that accuracy here is accuracy there: longer
inputs are truncated, and of an instruction only response and end count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from wire_protocol.errors import ConfigError
from wire_protocol.records import Columns, Example, parse_rows, to_examples

IGNORED_LABEL = -100
"""Marks tokens whose prediction does not count; PyTorch's cross entropy skips it."""


@dataclass(frozen=True)
class TokenisedExample:
    """One example, not padded.

    Attributes:
        inputs: what the model reads, each of the same length.
        labels: one class index, or one label per token (instruction tuning).
    """

    inputs: dict[str, list[int]]
    labels: list[int]

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.inputs["input_ids"])


def parse_held_out(content: str) -> list[Example]:
    """Read canonical JSON lines with the keys text, text_pair (if any) and label.

    Raises:
        ConfigError: a line is not such an object, or there is none.
    """
    rows = list(parse_rows(content, ".jsonl"))
    if not rows:
        raise ConfigError("the held-out file holds no examples")
    paired = any(row.get("text_pair") is not None for row in rows)
    return to_examples(rows, Columns(text_pair="text_pair" if paired else None))


def tokenise_classification(
    examples: Sequence[Example], tokenizer: Any, *, labels: Sequence[str], max_tokens: int
) -> list[TokenisedExample]:
    """Turn texts, or pairs of texts, and their labels into ids.

    Raises:
        ConfigError: an example has a label that the run does not have.
    """
    index_of = {label: index for index, label in enumerate(labels)}
    unknown = next((one.label for one in examples if one.label not in index_of), None)
    if unknown is not None:
        raise ConfigError(
            f"held-out label {unknown[:80]!r} is not one of this run's; list it under labels"
        )
    texts = [example.text for example in examples]
    pairs = [example.text_pair or "" for example in examples]
    paired = any(example.text_pair is not None for example in examples)
    encoded = tokenizer(texts, pairs if paired else None, truncation=True, max_length=max_tokens)
    return [
        TokenisedExample({name: encoded[name][row] for name in encoded}, [index_of[example.label]])
        for row, example in enumerate(examples)
    ]


def tokenise_instruction(
    examples: Sequence[Example], tokenizer: Any, *, max_tokens: int
) -> list[TokenisedExample]:
    """Turn prompts and responses into one sequence each: prompt, response, end of text.

    Too long: the prompt loses its beginning, then the response its end.
    """
    prompts = tokenizer([example.text for example in examples])["input_ids"]
    answers = tokenizer([example.label for example in examples], add_special_tokens=False)
    end = tokenizer.eos_token_id
    ends = [] if end is None else [end]
    tokenised = []
    for prompt_ids, answer_ids in zip(prompts, answers["input_ids"], strict=True):
        answer = (answer_ids + ends)[: max_tokens - 1]
        # The first token is never predicted: something must stand before the response.
        prompt = (prompt_ids or [end or 0])[-(max_tokens - len(answer)) :]
        ids = prompt + answer
        inputs = {"input_ids": ids, "attention_mask": [1] * len(ids)}
        tokenised.append(TokenisedExample(inputs, [IGNORED_LABEL] * len(prompt) + answer))
    return tokenised


def batches(
    examples: Sequence[TokenisedExample], batch_size: int
) -> Iterator[list[TokenisedExample]]:
    """Every example once, similar lengths together, the longest first.

    Memory runs out in the first batch or not at all.
    """
    ordered = sorted(examples, key=lambda example: example.length, reverse=True)
    for start in range(0, len(ordered), batch_size):
        yield ordered[start : start + batch_size]


def collate(batch: Sequence[TokenisedExample], tokenizer: Any) -> dict[str, list[list[int]]]:
    """Pad to the longest example of the batch.

    Returns:
        Rows by input name, each (batch, longest); ``labels`` is (batch, 1) for
        classification and (batch, longest) for instruction tuning.
    """
    filling = {
        "input_ids": tokenizer.pad_token_id or 0,
        "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0) or 0,
    }
    longest = max(example.length for example in batch)
    columns = {
        name: [_padded(example.inputs[name], longest, filling.get(name, 0)) for example in batch]
        for name in batch[0].inputs
    }
    width = max(len(example.labels) for example in batch)
    columns["labels"] = [_padded(example.labels, width, IGNORED_LABEL) for example in batch]
    return columns


def _padded(values: list[int], length: int, filling: int) -> list[int]:
    return values + [filling] * (length - len(values))
