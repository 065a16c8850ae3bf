"""A whole model out of a base model and an adapter: merged safetensors, and ONNX.

Imports torch, which takes seconds: import this module inside the command that
needs it. Knows PEFT folders (see ``export``) and nothing of runs.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import peft
import torch
import transformers

from broker_server.base_model import TOKENIZER_FILES, read_config
from broker_server.export import LABELS_FILE, put_in_place
from wire_protocol.errors import ConfigError
from wire_protocol.model_family import FAMILIES, family_of

ONNX_TOLERANCE = 1e-3
"""Largest difference of a logit between torch and onnxruntime that passes."""

_INLINE_BYTES = 1_500_000_000  # protobuf ends at 2 GiB: larger weights go to a file beside
_CHECKED_LENGTHS = (2, 7, 16, 40)
_BATCH = 2


@dataclass(frozen=True)
class OnnxCheck:
    """How far an ONNX file is from the model it was made of.

    Attributes:
        max_abs_difference: over all logits of tokens that are not padding.
        examples: sequences that were compared.
    """

    max_abs_difference: float
    examples: int


def merge(adapter_dir: Path, base_dir: Path, out_dir: Path) -> None:
    """Add a PEFT adapter to its base model and save the result as one model.

    Args:
        adapter_dir: a PEFT folder, as ``export`` writes it.
        base_dir: the base model that it was trained on.
        out_dir: gets float32 safetensors, the labels and the tokenizer; replaced if there.

    Raises:
        ConfigError: a folder is wrong, or the adapter belongs to another base model.
    """
    family = family_of(read_config(base_dir))
    labels = _labels(adapter_dir) if FAMILIES[family].head_path else {}
    options: dict[str, Any] = {}
    if labels:
        options = {
            "num_labels": len(labels),
            "id2label": labels,
            "label2id": {name: index for index, name in labels.items()},
            "ignore_mismatched_sizes": True,
        }
    model = _load(base_dir, family, options)
    try:
        adapted = peft.PeftModel.from_pretrained(model, str(adapter_dir))
    except (OSError, ValueError, RuntimeError) as error:
        line = " ".join(str(error).split())[:300]
        raise ConfigError(f"{adapter_dir} is no adapter of {base_dir}: {line}") from error
    merged = adapted.merge_and_unload()
    with _fresh_folder(out_dir) as fresh:
        merged.save_pretrained(str(fresh), safe_serialization=True)
        for name in sorted(TOKENIZER_FILES):
            if (base_dir / name).is_file():
                shutil.copyfile(base_dir / name, fresh / name)
        put_in_place(fresh, out_dir)


def to_onnx(merged_dir: Path, out_file: Path) -> OnnxCheck:
    """Export a merged model to ONNX and compare the two on random sequences.

    Inputs ``input_ids``, ``attention_mask`` and, for the families that read it,
    ``token_type_ids``, int64 (batch, tokens), both axes free; output ``logits``.
    Weights beyond 1.5 GB lie in ``<out_file>.data``.

    torch's older exporter (``dynamo=False``) is not used: with current
    transformers it traces attention masks into constants, without an error.

    Raises:
        ConfigError: the model cannot be exported, or the results differ by more
            than ``ONNX_TOLERANCE``.
    """
    family = family_of(read_config(merged_dir))
    # Plain attention exports on every version; the fused kinds do not.
    model = _load(merged_dir, family, {"attn_implementation": "eager"})
    model.config.use_cache = False
    names = ["input_ids", "attention_mask"]
    if family in ("bert", "deberta-v2"):
        names.append("token_type_ids")
    logits = _Logits(model, names).eval()
    with _fresh_folder(out_file) as fresh:
        exported = fresh / out_file.name
        _export(logits, exported, names)
        check = _compare(logits, exported, names)
        if not check.max_abs_difference <= ONNX_TOLERANCE:
            raise ConfigError(
                f"ONNX and torch differ by {check.max_abs_difference:.2g} (at most "
                f"{ONNX_TOLERANCE} passes), so nothing was written; use the merged model"
            )
        for path in sorted(fresh.iterdir(), reverse=True):  # .data before its .onnx
            path.replace(out_file.with_name(path.name))
    return check


class _Logits(torch.nn.Module):
    """A model as a plain function of tensors: the exporters know no named outputs."""

    def __init__(self, model: Any, names: list[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *tensors: Any) -> Any:
        """Logits: (batch, labels), or (batch, tokens, vocabulary)."""
        return self.model(**dict(zip(self.names, tensors, strict=True))).logits


def _export(logits: _Logits, out_file: Path, names: list[str]) -> None:
    inputs = _random_inputs(logits.model.config, names, length=7, seed=0)
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    size = sum(p.numel() * p.element_size() for p in logits.parameters())
    try:
        torch.onnx.export(
            logits,
            tuple(inputs[name] for name in names),
            str(out_file),
            input_names=names,
            output_names=["logits"],
            dynamic_shapes=(tuple(free for _ in names),),
            dynamo=True,
            external_data=size > _INLINE_BYTES,
            verbose=False,
        )
    except (RuntimeError, TypeError, AttributeError, ImportError) as error:
        # Nested causes make these texts pages long; the first line names the step.
        line = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"torch {torch.__version__} cannot export this model to ONNX ({line}); "
            "use the merged model, or torch 2.6 or newer with onnxscript"
        ) from error


def _compare(logits: _Logits, onnx_file: Path, names: list[str]) -> OnnxCheck:
    session = onnxruntime.InferenceSession(str(onnx_file), providers=["CPUExecutionProvider"])
    config = logits.model.config
    longest = int(getattr(config, "max_position_embeddings", None) or 512) - 2
    worst, examples = 0.0, 0
    for seed, length in enumerate(_CHECKED_LENGTHS, start=1):
        inputs = _random_inputs(config, names, length=min(length, longest), seed=seed)
        with torch.inference_mode():
            wanted = logits(*(inputs[name] for name in names)).numpy()
        feed = {name: tensor.numpy() for name, tensor in inputs.items()}
        difference = np.abs(wanted - session.run(None, feed)[0])
        if difference.ndim == 3:
            # What a model says about padding is never read.
            difference = difference[feed["attention_mask"] == 1]
        worst = max(worst, float(difference.max()))
        examples += len(wanted)
    return OnnxCheck(worst, examples)


def _random_inputs(config: Any, names: list[str], *, length: int, seed: int) -> dict[str, Any]:
    """Two sequences, the second with padding at its end."""
    generator = torch.Generator().manual_seed(seed)
    shape = (_BATCH, length)
    mask = torch.ones(shape, dtype=torch.int64)
    mask[1, (length + 1) // 2 :] = 0
    ids = torch.randint(0, int(config.vocab_size), shape, generator=generator)
    inputs = {
        "input_ids": ids.where(mask == 1, int(config.pad_token_id or 0)),
        "attention_mask": mask,
        "token_type_ids": torch.zeros(shape, dtype=torch.int64),
    }
    return {name: inputs[name] for name in names}


def _load(folder: Path, family: str, options: Mapping[str, Any]) -> Any:
    auto: Any = transformers.AutoModelForCausalLM
    if FAMILIES[family].head_path:
        auto = transformers.AutoModelForSequenceClassification
    try:
        model = auto.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, **options
        )
    except (OSError, ValueError) as error:
        line = " ".join(str(error).split())[:300]
        raise ConfigError(f"cannot load the model in {folder}: {line}") from error
    return model.float().eval()


def _labels(adapter_dir: Path) -> dict[int, str]:
    path = adapter_dir / LABELS_FILE
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
        return {int(index): str(name) for index, name in names.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"cannot read {path}; export the adapter again") from error


@contextmanager
def _fresh_folder(target: Path) -> Iterator[Path]:
    """A new folder beside ``target``, on the same file system; removed at the end."""
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    fresh.chmod(0o755)
    try:
        yield fresh
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
