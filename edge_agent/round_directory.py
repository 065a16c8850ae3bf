"""The round directory: what the trainer child reads and writes.

``assignment.json`` goes in; ``update.safetensors`` and ``result.json`` come out, each whole or not
at all. Valid on Python 3.8, standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wire_protocol.durable import write_durably
from wire_protocol.errors import DeviceError, FailureCode
from wire_protocol.lora import Codec, TailRule
from wire_protocol.records import Columns

ASSIGNMENT_FILE = "assignment.json"
UPDATE_FILE = "update.safetensors"
RESULT_FILE = "result.json"
RESIDUAL_FILE = "residual.safetensors"
BENCHMARK_RESULT_FILE = "benchmark_result.json"


@dataclass(frozen=True)
class Recipe:
    """How every device of a run trains; see ``wire_protocol.messages.TrainingRecipe``."""

    task: str
    labels: tuple[str, ...]
    learning_rate: float
    head_learning_rate: float
    max_tokens: int
    codec: Codec = Codec.FP32
    clip_norm: float | None = None
    tail: TailRule | None = None
    loss: str = "plain"

    @property
    def label_count(self) -> int:
        """Classes of the head; 0 for causal language models."""
        return len(self.labels) if self.task == "classification" else 0


@dataclass(frozen=True)
class LocalLimits:
    """What this device decided about the round.

    Attributes:
        batch_size: examples of a step, after admission.
        precision: ``fp32``, ``fp16`` or ``bf16``; the last two on CUDA only.
        memory_limit_bytes: memory that the trainer may use; None is no limit.
        flops_per_s: speed of the imitated board; None imitates nothing.
    """

    batch_size: int
    gradient_checkpointing: bool = False
    precision: str = "fp32"
    threads: int = 1
    memory_limit_bytes: int | None = None
    flops_per_s: float | None = None


@dataclass(frozen=True)
class PrefixRequest:
    """A prefix that is kept, and where its hidden states are.

    Attributes:
        adapter_file: what is applied below the trained layers; None applies nothing there.
        cache_dir: of the states.
        cache_bytes: most that they may take on disk.
        model_digest: of the base model.
        rounds_left: rounds after this one in which it stays; None where no end is known.
    """

    adapter_file: Path | None
    cache_dir: Path
    cache_bytes: int
    model_digest: str
    rounds_left: int | None = None

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> PrefixRequest:
        """Read what the agent's shell wrote."""
        file = value["adapter_file"]
        return cls(
            adapter_file=Path(file) if file else None,
            cache_dir=Path(value["cache_dir"]),
            cache_bytes=int(value["cache_bytes"]),
            model_digest=str(value["model_digest"]),
            rounds_left=value.get("rounds_left"),
        )


@dataclass(frozen=True)
class TrainRequest:
    """One assignment as the trainer sees it: local paths instead of blobs.

    Attributes:
        ranks: LoRA rank to train at every layer; 0 freezes it.
        deadline_s: seconds from the start of the training command.
        factors: LoRA factors to train: ``both``, ``A`` or ``B``.
        quantised_layers: lowest trained layers whose activations are kept in eight bits.
        prefix: what lies below the trained layers, if it stays for many rounds.
        residual_file: what a coarse codec left out of this run's updates so far; None forgets it.
    """

    ranks: tuple[int, ...]
    steps: int
    deadline_s: float
    seed: int
    recipe: Recipe
    limits: LocalLimits
    model_dir: Path
    adapter_file: Path
    dataset_file: Path
    columns: Columns
    factors: str = "both"
    quantised_layers: int = 0
    prefix: PrefixRequest | None = None
    residual_file: Path | None = None

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TrainRequest:
        """Read what the agent's shell wrote.

        Raises:
            KeyError, TypeError, ValueError: a field is missing or has a wrong type.
        """
        recipe, dataset = value["recipe"], value["dataset"]
        return cls(
            ranks=tuple(int(rank) for rank in value["ranks"]),
            steps=int(value["steps"]),
            deadline_s=float(value["deadline_s"]),
            seed=int(value["seed"]),
            recipe=Recipe(
                task=recipe["task"],
                labels=tuple(recipe["labels"]),
                learning_rate=float(recipe["learning_rate"]),
                head_learning_rate=float(recipe["head_learning_rate"]),
                max_tokens=int(recipe["max_tokens"]),
                codec=Codec(recipe["codec"]),
                clip_norm=recipe.get("clip_norm"),
                tail=TailRule(**recipe["tail"]) if recipe.get("tail") else None,
                loss=recipe.get("loss", "plain"),
            ),
            limits=LocalLimits(
                batch_size=int(value["batch_size"]),
                gradient_checkpointing=bool(value["gradient_checkpointing"]),
                precision=value["precision"],
                threads=int(value["threads"]),
                memory_limit_bytes=value["memory_limit_bytes"],
                flops_per_s=(value.get("stretch") or {}).get("flops_per_s"),
            ),
            model_dir=Path(value["model_dir"]),
            adapter_file=Path(value["adapter_file"]),
            dataset_file=Path(dataset["path"]),
            columns=Columns(**dataset["columns"]),
            factors=str(value.get("factors", "both")),
            quantised_layers=int(value.get("quantised_layers", 0)),
            prefix=PrefixRequest.from_json(value["prefix"]) if value.get("prefix") else None,
            residual_file=Path(value["residual_file"]) if value.get("residual_file") else None,
        )


@dataclass(frozen=True)
class TrainingReport:
    """``wire_protocol.messages.StepReport`` without the transfers.

    Attributes:
        tokens: tokens computed in all steps, padding included: they cost time too.
        forward_s: all forward passes with their losses.
        backward_s: all backward passes with clipping and the optimiser's step.
        training_s: from the start of the first step to the end of the last one.
        batch_size: of the last step; smaller than asked after a lack of memory.
        forward_token_layers: token-layer pairs of all forward passes; fewer than
            tokens times layers when frozen layers were read back.
        layer_gradients: root mean square of a value's gradient in each trained layer,
            the output layer last; None where one was not finite.
    """

    steps_done: int
    tokens: int
    forward_s: float
    backward_s: float
    training_s: float
    peak_memory_bytes: int
    batch_size: int
    gradient_checkpointing: bool
    first_loss: float
    last_loss: float
    forward_token_layers: int | None = None
    layer_gradients: tuple[float, ...] | None = None


def read_request(round_dir: Path) -> TrainRequest:
    """Read ``assignment.json``.

    Raises:
        DeviceError: MISSING_FILE, or INTERNAL when a field is missing or wrong.
    """
    path = round_dir / ASSIGNMENT_FILE
    try:
        return TrainRequest.from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise DeviceError(FailureCode.MISSING_FILE, f"{path} does not exist") from error
    except (KeyError, TypeError, ValueError) as error:
        line = f"{path} is not a training request: {type(error).__name__}: {error}"
        raise DeviceError(FailureCode.INTERNAL, line) from error


def write_result(
    round_dir: Path,
    update: bytes,
    *,
    examples: int,
    ranks: tuple[int, ...],
    report: TrainingReport,
) -> None:
    """Write the encoded update, then the result that says it is there."""
    write_durably(round_dir / UPDATE_FILE, update, site="trainer.update")
    result: dict[str, Any] = {"examples": examples, "ranks": ranks, "report": asdict(report)}
    write_durably(round_dir / RESULT_FILE, json.dumps(result).encode(), site="trainer.result")
