"""What a person does with an adapter folder: stock transformers and peft, nothing of ours.

Run as a program in a process of its own: MODEL_DIR ADAPTER_DIR HELD_OUT. Prints JSON
with accuracy and loss, one example at a time, and whatever PEFT warned about.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer


def main(model_dir: str, adapter_dir: str, held_out: str) -> None:
    labels = Path(adapter_dir, "labels.json")
    names = json.loads(labels.read_text()) if labels.exists() else {}
    base: Any
    if names:
        base = AutoModelForSequenceClassification.from_pretrained(model_dir, num_labels=len(names))
    else:
        base = AutoModelForCausalLM.from_pretrained(model_dir)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, adapter_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    scores: list[tuple[bool, float]] = []
    for line in Path(held_out).read_text().splitlines():
        row = json.loads(line)
        if names:
            scores.append(_classify(model, tokenizer, row, names))
        else:
            scores += _answer(model, tokenizer, row)
    said = {
        "accuracy": sum(hit for hit, _ in scores) / len(scores),
        "loss": sum(loss for _, loss in scores) / len(scores),
        # FutureWarnings are between the libraries.
        "warnings": [str(one.message) for one in caught if one.category is not FutureWarning],
        "ours": sorted(name for name in sys.modules if name.startswith("broker_server")),
    }
    sys.stdout.write(json.dumps(said) + "\n")


def _classify(
    model: Any, tokenizer: Any, row: dict[str, str], names: dict[str, str]
) -> tuple[bool, float]:
    texts = [row["text"], *([row["text_pair"]] if "text_pair" in row else [])]
    encoded = tokenizer(*texts, truncation=True, max_length=64, return_tensors="pt")
    with torch.inference_mode():
        logits = model(**encoded).logits[0]
    wanted = list(names.values()).index(row["label"])
    said = names[str(int(logits.argmax()))]
    return said == row["label"], -float(logits.log_softmax(-1)[wanted])


def _answer(model: Any, tokenizer: Any, row: dict[str, str]) -> list[tuple[bool, float]]:
    prompt = tokenizer(row["text"])["input_ids"]
    answer = tokenizer(row["label"], add_special_tokens=False)["input_ids"]
    answer = [*answer, tokenizer.eos_token_id]
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0]
    logits = logits[len(prompt) - 1 : -1]
    return [
        (int(row_logits.argmax()) == token, -float(row_logits.log_softmax(-1)[token]))
        for row_logits, token in zip(logits, answer, strict=True)
    ]


if __name__ == "__main__":
    main(*sys.argv[1:4])
