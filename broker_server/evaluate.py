"""Central evaluation, as a child process: ``python -m broker_server.evaluate``.

Keeps one base model loaded and scores one PEFT folder after another with it,
through PEFT's own loading, so that what is reported is the accuracy of the
folder that people get. Knows nothing of runs or rounds; ``evaluator`` is the
other end of the conversation, one JSON object a line:

    -> {"do":"prepare","model_dir","task","labels","max_tokens","file","batch_size","threads"}
    <- {"event":"prepared","examples"}
    -> {"do":"evaluate","adapter_dir"}
    <- {"event":"result","accuracy","loss","examples","seconds"}
    <- {"event":"failed","cause":"config"|"internal","detail"}

The end of stdin ends the process. After a failure the base model may hold half
an adapter: start a new process.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import peft
import torch
import transformers
from torch.nn import functional

from broker_server.export import CONFIG_FILE, WEIGHTS_FILE
from broker_server.held_out_tokens import (
    IGNORED_LABEL,
    TokenisedExample,
    batches,
    collate,
    parse_held_out,
    tokenise_classification,
    tokenise_instruction,
)
from wire_protocol.errors import ConfigError, LegendError

LARGEST_HEADER_BYTES = 100_000_000
"""As safetensors itself allows."""


@dataclass
class Bench:
    """A warm base model and tokenised held-out examples.

    Attributes:
        model: the task model; without an adapter until the first evaluation.
        adapted: the same around the last adapter, whose places the next one with equal tensors
            takes: making them anew costs more than a small model's predictions.
        places: the last adapter's, see ``_places``.
    """

    model: Any
    tokenizer: Any
    examples: list[TokenisedExample]
    batch_size: int
    adapted: Any = None
    places: tuple[bytes, bytes] | None = None


@dataclass(frozen=True)
class Score:
    """Sums over predictions: one per example, or one per response token."""

    correct: float = 0.0
    loss: float = 0.0
    predictions: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(
            self.correct + other.correct,
            self.loss + other.loss,
            self.predictions + other.predictions,
        )


def main() -> None:
    """Answer requests on stdin until it ends."""
    answers = _claim_stdout()
    transformers.logging.set_verbosity_error()
    bench: Bench | None = None
    for line in sys.stdin:
        try:
            request = json.loads(line)
            if request["do"] == "prepare":
                bench = None  # frees the old base model before the new one is read
                bench = prepare(request)
                answer = {"event": "prepared", "examples": len(bench.examples)}
            elif bench is not None:
                answer = evaluate(bench, Path(request["adapter_dir"]))
            else:
                answer = _failed("internal", "evaluate was asked for before prepare")
        except LegendError as error:
            answer = _failed("config", str(error))
        except Exception as error:  # noqa: BLE001 - the parent must hear about every failure
            answer = _failed("internal", f"{type(error).__name__}: {error}")
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def prepare(request: Mapping[str, Any]) -> Bench:
    """Load the base model in float32 and tokenise the held-out examples.

    Raises:
        ConfigError: the model folder or the held-out file is wrong.
    """
    if request["threads"]:
        torch.set_num_threads(int(request["threads"]))
    model_dir = str(request["model_dir"])
    tokenizer, model = _load(model_dir, request["task"], len(request["labels"]))
    examples = parse_held_out(_read_text(Path(request["file"])))
    max_tokens = min(int(request["max_tokens"]), _max_positions(model.config, tokenizer))
    if request["task"] == "classification":
        tokenised = tokenise_classification(
            examples, tokenizer, labels=request["labels"], max_tokens=max_tokens
        )
    else:
        tokenised = tokenise_instruction(examples, tokenizer, max_tokens=max_tokens)
    return Bench(model, tokenizer, tokenised, int(request["batch_size"]))


def evaluate(bench: Bench, adapter_dir: Path) -> dict[str, object]:
    """Score one PEFT folder.

    Returns:
        The ``result`` event: accuracy (0 to 1) and mean cross entropy (nats), per
        example or, for instruction tuning, per response token.

    Raises:
        ConfigError: the folder is not a PEFT adapter of this base model.
    """
    began = time.monotonic()
    adapted = _adapted(bench, adapter_dir)
    score = Score()
    for batch in batches(bench.examples, bench.batch_size):
        score += _score(adapted, collate(batch, bench.tokenizer))
    return {
        "event": "result",
        "accuracy": score.correct / max(score.predictions, 1),
        "loss": score.loss / max(score.predictions, 1),
        "examples": len(bench.examples),
        "seconds": time.monotonic() - began,
    }


def _claim_stdout() -> TextIO:
    """Keep the real stdout for answers; whatever else prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _failed(cause: str, detail: str) -> dict[str, object]:
    return {"event": "failed", "cause": cause, "detail": " ".join(detail.split())[:400]}


def _load(model_dir: str, task: str, label_count: int) -> tuple[Any, Any]:
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}
    auto = transformers.AutoModelForCausalLM
    if task == "classification":
        # A checkpoint fine-tuned for other labels brings a final linear of another shape.
        options |= {"num_labels": label_count, "ignore_mismatched_sizes": True}
        auto = transformers.AutoModelForSequenceClassification
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
        model = auto.from_pretrained(model_dir, **options)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot load the base model in {model_dir}: {error}") from error
    # transformers 5 keeps the checkpoint's dtype unless told; devices train in float32.
    model = model.float().eval()
    return tokenizer, model.cuda() if torch.cuda.is_available() else model


def _adapted(bench: Bench, adapter_dir: Path) -> Any:
    """The base model with this adapter, loaded by PEFT in either case.

    Raises:
        ConfigError: the folder is not a PEFT adapter of this base model.
    """
    with warnings.catch_warnings():
        # Without its tensors an adapter would silently score as the one before, or the base model.
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            places = _places(adapter_dir)
            if bench.adapted is not None and places == bench.places:
                bench.adapted.load_adapter(str(adapter_dir), "default")
            else:
                _unload(bench)
                bench.adapted = peft.PeftModel.from_pretrained(bench.model, str(adapter_dir))
                bench.places = places
        except (OSError, ValueError, RuntimeError, UserWarning) as error:
            # It may hold half an adapter.
            bench.places = None
            raise ConfigError(f"cannot load the adapter in {adapter_dir}: {error}") from error
    return bench.adapted.eval()


def _places(adapter_dir: Path) -> tuple[bytes, bytes]:
    """Configuration, names and shapes: an adapter of equal ones overwrites all that was there."""
    with (adapter_dir / WEIGHTS_FILE).open("rb") as stream:
        # Source: the safetensors format, the header's size before the header.
        size = int.from_bytes(stream.read(8), "little")
        header = stream.read(min(size, LARGEST_HEADER_BYTES))
    return (adapter_dir / CONFIG_FILE).read_bytes(), header


def _unload(bench: Bench) -> None:
    adapted, bench.adapted = bench.adapted, None
    if adapted is None:
        return
    # Saved modules stay behind on some versions of PEFT; the next adapter overwrites them.
    bench.model = adapted.unload()
    # PEFT leaves its configuration behind, and warns about it at the next adapter.
    if hasattr(bench.model, "peft_config"):
        del bench.model.peft_config


def _score(model: Any, columns: Mapping[str, list[list[int]]]) -> Score:
    tensors = {name: torch.tensor(rows, device=model.device) for name, rows in columns.items()}
    labels = tensors.pop("labels")
    with torch.inference_mode():
        logits = model(**tensors).logits.float()
    if logits.dim() == 3:
        # The logits at one token predict the next.
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:]
    labels = labels.flatten()
    counted = labels != IGNORED_LABEL
    logits, labels = logits[counted], labels[counted]
    loss = functional.cross_entropy(logits, labels, reduction="sum").item()
    return Score((logits.argmax(-1) == labels).sum().item(), loss, len(labels))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the held-out file {path}: {error}") from error


def _max_positions(config: Any, tokenizer: Any) -> int:
    positions = int(getattr(config, "max_position_embeddings", None) or 512)
    if config.model_type == "roberta":
        # RoBERTa numbers its positions from padding_idx + 1.
        positions -= int(config.pad_token_id) + 1
    return min(positions, int(tokenizer.model_max_length))


if __name__ == "__main__":
    main()
