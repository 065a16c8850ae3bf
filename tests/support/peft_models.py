"""Tiny random base models with a tokenizer, adapters for them, and held-out files."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from wire_protocol.initial_adapter import initial_adapter
from wire_protocol.model_family import ModelShape, model_shape

LABELS = ("bad", "good", "odd")
WORDS = [f"word{i}" for i in range(60)]
_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 66,
}
_CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "bert": _SIZES,
    "roberta": {**_SIZES, "type_vocab_size": 1},
    "deberta-v2": {
        **_SIZES,
        "relative_attention": True,
        "position_buckets": 16,
        "pos_att_type": ["p2c", "c2p"],
        "type_vocab_size": 0,
        "pooler_hidden_size": 32,
    },
    "distilbert": {
        "dim": 32,
        "n_layers": 3,
        "n_heads": 4,
        "hidden_dim": 64,
        "max_position_embeddings": 66,
    },
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 66},
    "llama": {**_SIZES, "num_key_value_heads": 2},
    "qwen2": {**_SIZES, "num_key_value_heads": 2},
}
_LAYER_KEYS = {"distilbert": "n_layers", "gpt2": "n_layer"}


def save_base_model(folder: Path, family: str, *, layers: int = 3, with_head: bool = False) -> Path:
    """A random base model; without ``with_head`` it lacks every classification layer."""
    import torch  # noqa: PLC0415 - tests that need no torch import this module
    from transformers import (  # noqa: PLC0415 - as above
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForSequenceClassification,
    )

    torch.manual_seed(1)
    options = {**_CONFIGS[family], _LAYER_KEYS.get(family, "num_hidden_layers"): layers}
    config = AutoConfig.for_model(
        family, vocab_size=len(WORDS) + 6, pad_token_id=0, eos_token_id=3, **options
    )
    causal = family in {"gpt2", "llama", "qwen2"}
    kind = AutoModelForCausalLM if causal else AutoModelForMaskedLM
    if with_head:
        config.num_labels = 5
        kind = AutoModelForSequenceClassification
    model = kind.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Livelier than a real initialisation, so that adapters change predictions.
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    _save_tokenizer(folder, paired=family == "bert")
    return folder


def shape_of(folder: Path) -> ModelShape:
    """Sizes of a saved base model."""
    return model_shape(json.loads((folder / "config.json").read_text()))


def trained_adapter(
    shape: ModelShape, ranks: tuple[int, ...], label_count: int, seed: int = 0
) -> dict[str, NDArray[np.float32]]:
    """An adapter whose every tensor changes what the model says."""
    generator = np.random.default_rng(seed)
    adapter = initial_adapter(shape, ranks, label_count=label_count, seed=seed)
    return {
        name: (tensor + generator.normal(0, 0.3, tensor.shape)).astype(np.float32)
        for name, tensor in adapter.items()
    }


def write_held_out(path: Path, count: int = 40, *, paired: bool = False) -> Path:
    """Random sentences of different lengths with random labels, as canonical JSON lines."""
    generator = random.Random(7)
    with path.open("w") as stream:
        for _ in range(count):
            row = {"text": _sentence(generator), "label": generator.choice(LABELS)}
            if paired:
                row["text_pair"] = _sentence(generator)
            stream.write(json.dumps(row) + "\n")
    return path


def _sentence(generator: random.Random) -> str:
    return " ".join(generator.choices(WORDS, k=generator.randint(1, 30)))


def _save_tokenizer(folder: Path, *, paired: bool) -> None:
    from tokenizers import Tokenizer  # noqa: PLC0415 - as above
    from tokenizers.models import WordLevel  # noqa: PLC0415 - as above
    from tokenizers.pre_tokenizers import Whitespace  # noqa: PLC0415 - as above
    from tokenizers.processors import TemplateProcessing  # noqa: PLC0415 - as above
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415 - as above

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = {word: index for index, word in enumerate([*special, *LABELS[:2], *WORDS])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    if paired:
        tokenizer.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        eos_token="[SEP]",
        model_max_length=64,
        model_input_names=["input_ids", "attention_mask", *(["token_type_ids"] if paired else [])],
    ).save_pretrained(folder)


def write_base_folder(
    folder: Path, family: str, tensors: Mapping[str, NDArray[np.float32]], *, layers: int = 3
) -> Path:
    """A base model folder with only the named tensors, written without torch."""
    sizes = {**_CONFIGS[family], _LAYER_KEYS.get(family, "num_hidden_layers"): layers}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": family, **sizes}))
    (folder / "tokenizer.json").write_text("{}")
    save_file(dict(tensors), folder / "model.safetensors")
    return folder
