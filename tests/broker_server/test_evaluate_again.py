"""Adapters of one configuration are scored one after the other in the same places."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from broker_server.export import AdapterCard, export_adapter
from tests.support.peft_models import (
    LABELS,
    save_base_model,
    shape_of,
    trained_adapter,
    write_held_out,
)
from wire_protocol.errors import ConfigError

pytestmark = pytest.mark.train

RANKS = {"one": (2, 2, 2), "two": (2, 2, 2), "other": (0, 4, 8)}

Scorer = Callable[[Path], tuple[object, object]]


@pytest.fixture(scope="module", params=["roberta", "distilbert"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, held-out examples and adapters, two of which differ in their values alone."""
    root = tmp_path_factory.mktemp(f"again-{request.param}")
    base = save_base_model(root / "base", request.param)
    write_held_out(root / "h.jsonl")
    card = AdapterCard("run", "base", LABELS)
    for seed, (name, ranks) in enumerate(RANKS.items()):
        adapter = trained_adapter(shape_of(base), ranks, len(LABELS), seed=seed)
        export_adapter(adapter, base, root / name, card=card)
    return root


def a_bench(folder: Path) -> Any:
    from broker_server import evaluate  # noqa: PLC0415 - imports torch

    return evaluate.prepare(
        {
            "model_dir": str(folder / "base"),
            "task": "classification",
            "labels": list(LABELS),
            "max_tokens": 32,
            "file": str(folder / "h.jsonl"),
            "batch_size": 16,
            "threads": 1,
        }
    )


def score(bench: Any, adapter: Path) -> tuple[object, object]:
    from broker_server import evaluate  # noqa: PLC0415 - imports torch

    result = evaluate.evaluate(bench, adapter)
    return result["accuracy"], result["loss"]


def test_a_score_is_the_same_to_the_last_bit_whatever_was_scored_before(folder: Path) -> None:
    alone = {name: score(a_bench(folder), folder / name) for name in RANKS}
    assert len(set(alone.values())) == len(RANKS)
    bench = a_bench(folder)
    for name in ("one", "two", "one", "other", "two", "two", "other", "one"):
        assert score(bench, folder / name) == alone[name], name


def test_a_tensor_that_is_missing_does_not_keep_the_value_of_the_adapter_before(
    folder: Path, tmp_path: Path
) -> None:
    tensors = load_file(folder / "two" / "adapter_model.safetensors")
    lost = next(name for name in sorted(tensors) if "lora_B" in name)
    for file in (folder / "two").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    rest = {name: tensor for name, tensor in tensors.items() if name != lost}
    save_file(rest, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})

    bench = a_bench(folder)
    before = score(bench, folder / "one")
    with pytest.raises(ConfigError, match="missing adapter keys"):
        score(bench, tmp_path)
    assert score(bench, folder / "one") == before
