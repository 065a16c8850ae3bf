"""The trained adapter as a PEFT folder that stock transformers and peft load.

Knows PEFT's file format and the classification heads of the families; needs
no torch. The folder stands alone next to the base model: head layers that the
base checkpoint lacks were the identity during training (see ``HEAD_LAYERS``),
so they are written into the folder, where PEFT finds them as saved modules.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from broker_server.base_model import read_config, read_tensor, tensor_shapes
from wire_protocol.durable import move_into_place, reached, write_in_halves
from wire_protocol.errors import ConfigError
from wire_protocol.lora import LORA_SCALE
from wire_protocol.model_family import (
    FAMILIES,
    ModelFamily,
    ModelShape,
    adapter_shapes,
    layer_of,
    model_shape,
    peft_key,
)
from wire_protocol.tensors import Adapter, check_shapes

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
LABELS_FILE = "labels.json"
CARD_FILE = "README.md"

Tensors = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class HeadLayer:
    """A square linear layer between a model's body and its final linear.

    Attributes:
        path: where it is in the task model.
        names: what a checkpoint may call it.
        in_saved_head: PEFT stores it with the head whatever the base holds.
    """

    path: str
    names: tuple[str, ...]
    in_saved_head: bool


HEAD_LAYERS: Mapping[str, HeadLayer] = {
    "bert": HeadLayer("bert.pooler.dense", ("bert.pooler.dense", "pooler.dense"), False),
    "roberta": HeadLayer("classifier.dense", ("classifier.dense",), True),
    # PEFT matches saved modules by suffix: "classifier" also takes in pre_classifier.
    "distilbert": HeadLayer("pre_classifier", ("pre_classifier",), True),
    "deberta-v2": HeadLayer("pooler.dense", ("pooler.dense", "deberta.pooler.dense"), False),
}
"""The frozen head layer of each classification family."""


@dataclass(frozen=True)
class AdapterCard:
    """What a person wants to know about an adapter.

    Attributes:
        base_model: name or path for ``base_model_name_or_path``.
        labels: class names in the order of the head's rows; empty for instruction tuning.
        metrics: shown in the README, in this order.
    """

    title: str
    base_model: str
    labels: tuple[str, ...] = ()
    metrics: Mapping[str, float | int | str | None] = field(default_factory=dict)


def export_adapter(
    adapter: Adapter, base_dir: Path, out_dir: Path, *, card: AdapterCard, flush: bool = True
) -> None:
    """Write a PEFT folder, replacing an older one as a whole.

    Args:
        adapter: the global adapter by our tensor names.
        base_dir: the base model that it was trained on.
        out_dir: the folder to write; its parent must exist.
        card: labels and metrics for people.
        flush: False for a folder that is read at once and never again.

    Raises:
        ConfigError: the base model's folder is wrong, or no layer has LoRA.
        ProtocolError: the adapter does not fit the base model.
    """
    replace_folder(out_dir, peft_files(adapter, base_dir, card=card), flush=flush)


def peft_files(adapter: Adapter, base_dir: Path, *, card: AdapterCard) -> dict[str, bytes]:
    """Content of the PEFT folder by file name; see ``export_adapter``."""
    shape = model_shape(read_config(base_dir))
    family = FAMILIES[shape.family]
    ranks = ranks_of(adapter, shape.layer_count)
    label_count = len(card.labels) if family.head_path else 0
    check_shapes(adapter, adapter_shapes(shape, ranks, label_count))
    frozen = frozen_head(base_dir, shape) if label_count else {}
    tensors = {peft_key(shape.family, name): adapter[name] for name in adapter}
    tensors |= {f"base_model.model.{name}": tensor for name, tensor in frozen.items()}
    config = adapter_config(shape, ranks, base_model=card.base_model, frozen=frozen)
    resized = label_count and _has_other_head(base_dir, family, label_count)
    files = {
        CONFIG_FILE: _json_bytes(config),
        WEIGHTS_FILE: save(
            {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)},
            metadata={"format": "pt"},
        ),
        CARD_FILE: model_card(card, family, ranks=ranks, resized=bool(resized)).encode(),
    }
    if label_count:
        files[LABELS_FILE] = _json_bytes({str(i): name for i, name in enumerate(card.labels)})
    return files


def ranks_of(adapter: Adapter, layer_count: int) -> tuple[int, ...]:
    """LoRA rank at every layer of an adapter; 0 where it has none.

    Raises:
        ConfigError: no layer has LoRA, or one lies outside the base model.
    """
    ranks = [0] * layer_count
    for name, tensor in adapter.items():
        layer = layer_of(name)
        if layer is None or not name.endswith("lora_A"):
            continue
        if layer >= layer_count:
            raise ConfigError(f"tensor {name} is outside a base model of {layer_count} layers")
        ranks[layer] = tensor.shape[0]
    if not any(ranks):
        raise ConfigError("the adapter has no LoRA layer, so there is nothing to export")
    return tuple(ranks)


def frozen_head(base_dir: Path, shape: ModelShape) -> Tensors:
    """The frozen head layer that must travel with the adapter, by task model path.

    Returns:
        ``<path>.weight`` (hidden, hidden) and ``<path>.bias`` (hidden,): from the
        checkpoint, or the identity where it has none; empty where the base model
        brings its own and PEFT does not store it anyway.

    Raises:
        ConfigError: the base model's folder is wrong.
    """
    layer = HEAD_LAYERS.get(shape.family)
    if layer is None:
        return {}
    present = tensor_shapes(base_dir)
    found = next((name for name in layer.names if f"{name}.weight" in present), None)
    if found is None:
        weight = np.eye(shape.hidden_size, dtype=np.float32)
        bias = np.zeros(shape.hidden_size, dtype=np.float32)
    elif layer.in_saved_head:
        weight = read_tensor(base_dir, f"{found}.weight")
        bias = read_tensor(base_dir, f"{found}.bias")
    else:
        return {}
    return {f"{layer.path}.weight": weight, f"{layer.path}.bias": bias}


def adapter_config(
    shape: ModelShape, ranks: tuple[int, ...], *, base_model: str, frozen: Tensors
) -> dict[str, object]:
    """PEFT's ``adapter_config.json`` for a rank per layer.

    Ranks are keyed by full module names: PEFT before 0.14 looks them up as they
    are, later versions match them against the whole name, so that layer 1 never
    takes the rank of layer 11.
    """
    family = FAMILIES[shape.family]
    rank_by_module = {
        f"{family.layers_path}.{layer}.{module}": rank
        for layer, rank in enumerate(ranks)
        for module in family.modules
        if rank
    }
    default = max(ranks)
    others = {name: rank for name, rank in rank_by_module.items() if rank != default}
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if family.saved_head else "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": default,
        "lora_alpha": _alpha(default),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": shape.family == "gpt2",  # its Conv1D stores weights transposed
        "target_modules": list(rank_by_module),
        "rank_pattern": others,
        "alpha_pattern": {name: _alpha(rank) for name, rank in others.items()},
        "modules_to_save": _saved_modules(family, frozen),
    }


def model_card(
    card: AdapterCard, family: ModelFamily, *, ranks: tuple[int, ...], resized: bool
) -> str:
    """The README of an adapter folder: how to load it, what it scored, its labels."""
    kind = "SequenceClassification" if family.saved_head else "CausalLM"
    size = f", num_labels={len(card.labels)}" if family.saved_head else ""
    size += ", ignore_mismatched_sizes=True" if resized else ""
    metrics = [f"| {name} | {_cell(value)} |" for name, value in card.metrics.items()]
    labels = [f"| {i} | {_cell(name)} |" for i, name in enumerate(card.labels)]
    lines = [
        *("---", "library_name: peft", "tags: [lora, federated-learning, legend]", "---", ""),
        *(f"# {_one_line(card.title)}", ""),
        f"LoRA adapter for `{_one_line(card.base_model)}`, trained by LEGEND Edge on a fleet.",
        f"Rank at every layer, input to output (0 = frozen): {', '.join(map(str, ranks))}.",
        *("", "```python"),
        f"from transformers import AutoModelFor{kind}; from peft import PeftModel",
        f"base = AutoModelFor{kind}.from_pretrained({_loadable(card.base_model)!r}{size})",
        'model = PeftModel.from_pretrained(base, "PATH/OF/THIS/FOLDER").eval()',
        *("```", ""),
    ]
    if metrics:
        lines += ["| Metric | Value |", "|---|---|", *metrics, ""]
    if labels and family.saved_head:
        lines += [f"Classes, also in `{LABELS_FILE}`:", "", "| Id | Label |", "|---|---|", *labels]
    return "\n".join(lines).rstrip() + "\n"


def replace_folder(folder: Path, files: Mapping[str, bytes], *, flush: bool = True) -> None:
    """Write files into a new folder, flush it to disk if asked, then put it in place.

    A reader sees the old folder, for an instant none, or the new one whole.
    """
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for name, content in files.items():
            with (fresh / name).open("wb") as stream:
                write_in_halves(stream, content, site="server.adapter")
                if flush:
                    stream.flush()
                    os.fsync(stream.fileno())
        fresh.chmod(0o755)
        put_in_place(fresh, folder, flush=flush)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def put_in_place(fresh: Path, folder: Path, *, flush: bool = True) -> None:
    """Rename a finished folder to its name, removing what had it before."""
    outdated = fresh.with_name(fresh.name + ".old")
    if folder.exists():
        folder.rename(outdated)
        reached("server.adapter", "aside")
    move_into_place(fresh, folder, site="server.adapter", flush=flush)
    shutil.rmtree(outdated, ignore_errors=True)


def _saved_modules(family: ModelFamily, frozen: Tensors) -> list[str] | None:
    if family.saved_head is None:
        return None
    outside = {name.rpartition(".")[0] for name in frozen}
    return [
        family.saved_head,
        *sorted(name for name in outside if not name.startswith(f"{family.saved_head}.")),
    ]


def _has_other_head(base_dir: Path, family: ModelFamily, label_count: int) -> bool:
    """Whether the checkpoint brings a final linear of another size."""
    present = tensor_shapes(base_dir).get(f"{family.head_path}.weight")
    return present is not None and present[0] != label_count


def _alpha(rank: int) -> int | float:
    alpha = LORA_SCALE * rank
    return int(alpha) if alpha == int(alpha) else alpha


def _loadable(base_model: str) -> str:
    """A hub id or a path as it is; a name that only our server knows says what to fill in."""
    return base_model if "/" in base_model else f"PATH/OF/{base_model}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _cell(value: float | str | None) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return _one_line("" if value is None else str(value)).replace("|", "\\|")


def _json_bytes(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
