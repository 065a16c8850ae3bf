"""Evaluates an exported adapter with nothing but transformers and peft.

Run as a process of its own (``python -m broker_server.demo_check``): it shows
that the exported folder needs none of our code, so it must import none.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

_BATCH_SIZE = 32


def evaluate(base: Path, adapter: Path, held_out: Path, *, max_tokens: int) -> dict[str, float]:
    """Accuracy of base model plus adapter on a tsv file with ``line`` and ``label``."""
    import torch  # noqa: PLC0415 - slow import
    from peft import PeftModel  # noqa: PLC0415 - slow import
    from transformers import (  # noqa: PLC0415 - slow import
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )

    torch.set_num_threads(1)
    labels: dict[str, str] = json.loads((adapter / "labels.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(labels)), adapter
    ).eval()
    with held_out.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))
    correct = 0
    for start in range(0, len(rows), _BATCH_SIZE):
        batch = rows[start : start + _BATCH_SIZE]
        tokens = tokenizer(
            [row["line"] for row in batch],
            padding=True,
            truncation=True,
            max_length=max_tokens,
            return_tensors="pt",
        )
        with torch.inference_mode():
            answers = model(**tokens).logits.argmax(dim=1).tolist()
        correct += sum(
            labels[str(a)] == row["label"] for a, row in zip(answers, batch, strict=True)
        )
    return {"accuracy": correct / len(rows), "examples": len(rows)}


def main() -> None:
    """Read the command line, print the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--max-tokens", type=int, required=True)
    given = parser.parse_args()
    result = evaluate(given.base, given.adapter, given.held_out, max_tokens=given.max_tokens)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
