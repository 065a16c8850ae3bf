"""Random base models of every family, small enough to train in a moment, with real tokenizers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
)

from wire_protocol.lora import Codec
from wire_protocol.model_family import FAMILIES, adapter_shapes, model_shape
from wire_protocol.tensors import encode

LAYERS = 3
HIDDEN = 16
LABELS = ("negative", "positive")
SENTENCES = (
    "the film was good and the story was moving",
    "the film was bad and the plot was dull",
    "a wonderful cast with a great ending",
    "an awful script with no ending at all",
)
_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<sep>", "<cls>")

_ENCODER = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 66,
    "pad_token_id": 1,
}
_DECODER = {**_ENCODER, "num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 2}
_SIZES: Mapping[str, Mapping[str, Any]] = {
    "bert": _ENCODER,
    "roberta": {**_ENCODER, "type_vocab_size": 1},
    "distilbert": {
        "dim": HIDDEN,
        "n_layers": LAYERS,
        "n_heads": 2,
        "hidden_dim": 32,
        "max_position_embeddings": 66,
        "pad_token_id": 1,
    },
    "deberta-v2": {
        **_ENCODER,
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 8,
        "pooler_hidden_size": HIDDEN,
    },
    "gpt2": {
        "n_embd": HIDDEN,
        "n_layer": LAYERS,
        "n_head": 2,
        "n_positions": 66,
        "bos_token_id": 0,
        "eos_token_id": 2,
    },
    "llama": _DECODER,
    "qwen2": _DECODER,
}


def make_base_model(
    folder: Path, family: str, *, layers: int = LAYERS, hidden: int = HIDDEN, pooler: bool = True
) -> Path:
    """Write a random base model of a family with its tokenizer; the same every time.

    Without ``pooler`` the checkpoint lacks the pooling layer, where the family has one.
    """
    tokenizer = _tokenizer(family)
    torch.manual_seed(7)
    kind = FAMILIES[family]
    sizes = {**_SIZES[family], kind.layers_key: layers, kind.hidden_key: hidden}
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **sizes)
    factory = AutoModelForCausalLM if FAMILIES[family].task == "instruction" else AutoModel
    model = factory.from_config(config)
    if not pooler and hasattr(model, "pooler"):
        model.pooler = None
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


def make_adapter(
    model_dir: Path, ranks: tuple[int, ...], *, label_count: int, zero_b: bool = True
) -> dict[str, NDArray[np.float32]]:
    """A random adapter; with ``zero_b`` it does not change the model, as at a run's start."""
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    generator = np.random.default_rng(3)
    adapter = {
        name: generator.normal(0, 0.2, shape).astype(np.float32)
        for name, shape in adapter_shapes(model_shape(config), ranks, label_count).items()
    }
    for name, tensor in adapter.items():
        if zero_b and name.endswith("lora_B"):
            tensor[:] = 0
    return adapter


def write_assignment(
    round_dir: Path, model_dir: Path, *, reviews: Path, ranks: tuple[int, ...], **changes: Any
) -> Path:
    """Write a round directory as the agent's shell does; ``changes`` replace request fields."""
    family = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))["model_type"]
    task = FAMILIES[family].task
    labels = list(LABELS) if task == "classification" else []
    round_dir.mkdir(parents=True)
    adapter = make_adapter(model_dir, tuple(r or 2 for r in ranks), label_count=len(labels))
    (round_dir / "adapter.safetensors").write_bytes(encode(adapter, Codec.FP32))
    request: dict[str, Any] = {
        "assignment_id": round_dir.name,
        "round_number": 1,
        "model_dir": str(model_dir),
        "adapter_file": str(round_dir / "adapter.safetensors"),
        "ranks": list(ranks),
        "steps": 3,
        "deadline_s": 600.0,
        "seed": 5,
        "recipe": {
            "task": task,
            "dataset": "reviews",
            "labels": labels,
            "batch_size": 4,
            "learning_rate": 1e-2,
            "head_learning_rate": 1e-2,
            "max_tokens": 16,
            "codec": "fp32",
        },
        "dataset": {
            "path": str(reviews),
            "columns": {"text": "text", "text_pair": None, "label": "label"},
        },
        "batch_size": 4,
        "gradient_checkpointing": False,
        "precision": "fp32",
        "threads": 1,
        "memory_limit_bytes": None,
        "stretch": None,
        **changes,
    }
    (round_dir / "assignment.json").write_text(json.dumps(request), encoding="utf-8")
    return round_dir


def write_reviews(path: Path, *, repeat: int = 4) -> Path:
    """A small sentiment dataset with single texts, pairs and labels, as JSON lines."""
    rows = [
        {"text": text, "text_pair": SENTENCES[0], "label": LABELS[index % 2]}
        for index, text in enumerate(SENTENCES * repeat)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _tokenizer(family: str) -> Any:
    byte_level = FAMILIES[family].task == "instruction"
    if byte_level:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer: Any = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=list(_SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
    else:
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(special_tokens=list(_SPECIAL))
    tokenizer.train_from_iterator([*SENTENCES, *LABELS], trainer)
    if not byte_level:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<cls> $A <sep>",
            pair="<cls> $A <sep> $B:1 <sep>:1",
            special_tokens=[("<cls>", 5), ("<sep>", 4)],
        )
    inputs = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="</s>",
        model_input_names=[*inputs, "token_type_ids"]
        if family in ("bert", "deberta-v2")
        else inputs,
        model_max_length=64,
    )
