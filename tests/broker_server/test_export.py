from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
from safetensors.numpy import load

from broker_server.evaluator import EvaluationResult, EvaluationSetup, Evaluator
from broker_server.export import AdapterCard, export_adapter, peft_files, ranks_of
from tests.support.peft_models import (
    LABELS,
    save_base_model,
    shape_of,
    trained_adapter,
    write_base_folder,
    write_held_out,
)
from wire_protocol.errors import ConfigError, ProtocolError

STOCK = Path(__file__).parents[1] / "support" / "stock_loading.py"
CARD = AdapterCard("run one", "org/base", LABELS, {"accuracy": 0.81234, "rounds": 8})
CAUSAL_CARD = AdapterCard("run two", "org/base")
EYE = np.eye(32, dtype=np.float32)


def bare_base(folder: Path, family: str = "bert", layers: int = 3) -> Path:
    return write_base_folder(folder, family, {"unrelated": EYE}, layers=layers)


def files_of(base: Path, ranks: tuple[int, ...], card: AdapterCard = CARD) -> dict[str, bytes]:
    return peft_files(trained_adapter(shape_of(base), ranks, len(card.labels)), base, card=card)


def config_of(files: dict[str, bytes]) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(files["adapter_config.json"])
    return config


def test_alpha_follows_the_rank_of_every_layer(tmp_path: Path) -> None:
    config = config_of(files_of(bare_base(tmp_path / "base"), (0, 4, 8)))
    assert (config["r"], config["lora_alpha"]) == (8, 16)
    name = "bert.encoder.layer.1.attention.self.query"
    assert config["rank_pattern"][name] == 4
    assert config["alpha_pattern"][name] == 8
    assert len(config["target_modules"]) == 4
    assert not any(".layer.0." in module for module in config["target_modules"])


def test_tensors_carry_the_names_and_values_of_the_adapter(tmp_path: Path) -> None:
    base = bare_base(tmp_path / "base")
    adapter = trained_adapter(shape_of(base), (0, 0, 4), 3)
    tensors = load(peft_files(adapter, base, card=CARD)["adapter_model.safetensors"])
    prefix = "base_model.model."
    query = prefix + "bert.encoder.layer.2.attention.self.query.lora_A.weight"
    assert np.array_equal(tensors[query], adapter["layers.2.attention.self.query.lora_A"])
    assert np.array_equal(tensors[prefix + "classifier.weight"], adapter["head.weight"])


@pytest.mark.parametrize(
    ("family", "path"),
    [
        ("bert", "bert.pooler.dense"),
        ("roberta", "classifier.dense"),
        ("distilbert", "pre_classifier"),
        ("deberta-v2", "pooler.dense"),
    ],
)
def test_a_head_layer_that_the_base_lacks_travels_as_the_identity(
    tmp_path: Path, family: str, path: str
) -> None:
    files = files_of(bare_base(tmp_path / "base", family), (0, 0, 4))
    tensors = load(files["adapter_model.safetensors"])
    assert np.array_equal(tensors[f"base_model.model.{path}.weight"], EYE)
    assert not tensors[f"base_model.model.{path}.bias"].any()
    saved = config_of(files)["modules_to_save"]
    # PEFT matches saved modules by the end of their name, children included.
    assert any(path.endswith(name) or path.startswith(f"{name}.") for name in saved)


@pytest.mark.parametrize(
    ("family", "name"), [("bert", "pooler.dense"), ("deberta-v2", "pooler.dense")]
)
def test_a_pooler_of_the_base_is_not_written_again(tmp_path: Path, family: str, name: str) -> None:
    present = {f"{name}.weight": EYE * 2, f"{name}.bias": EYE[0]}
    files = files_of(write_base_folder(tmp_path / "base", family, present), (0, 0, 4))
    assert not any("pooler" in key for key in load(files["adapter_model.safetensors"]))
    assert config_of(files)["modules_to_save"] == ["classifier"]


def test_a_dense_layer_inside_the_saved_head_is_copied_from_the_base(tmp_path: Path) -> None:
    present = {"classifier.dense.weight": EYE * 2, "classifier.dense.bias": EYE[0]}
    files = files_of(write_base_folder(tmp_path / "base", "roberta", present), (0, 0, 4))
    tensors = load(files["adapter_model.safetensors"])
    assert np.array_equal(tensors["base_model.model.classifier.dense.weight"], EYE * 2)
    assert np.array_equal(tensors["base_model.model.classifier.dense.bias"], EYE[0])


def test_gpt2_is_marked_as_transposed_and_has_no_head(tmp_path: Path) -> None:
    files = files_of(bare_base(tmp_path / "base", "gpt2"), (0, 2, 4), CAUSAL_CARD)
    config = config_of(files)
    assert config["fan_in_fan_out"] is True
    assert (config["task_type"], config["modules_to_save"]) == ("CAUSAL_LM", None)
    assert "labels.json" not in files


def test_people_find_labels_metrics_and_how_to_load(tmp_path: Path) -> None:
    files = files_of(bare_base(tmp_path / "base"), (0, 0, 4))
    assert json.loads(files["labels.json"]) == {"0": "bad", "1": "good", "2": "odd"}
    card = files["README.md"].decode()
    assert "from_pretrained('org/base', num_labels=3)" in card
    assert "| accuracy | 0.8123 |" in card
    assert "| 2 | odd |" in card


def test_the_card_says_when_the_base_has_a_head_of_another_size(tmp_path: Path) -> None:
    present = {"classifier.weight": np.zeros((5, 32), dtype=np.float32)}
    files = files_of(write_base_folder(tmp_path / "base", "bert", present), (0, 0, 4))
    assert "num_labels=3, ignore_mismatched_sizes=True" in files["README.md"].decode()


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    small, large = bare_base(tmp_path / "small"), bare_base(tmp_path / "large", layers=4)
    adapter = trained_adapter(shape_of(large), (0, 0, 4, 4), 3)
    with pytest.raises(ConfigError, match="outside a base model of 3 layers"):
        peft_files(adapter, small, card=CARD)
    with pytest.raises(ProtocolError, match="lacks"):
        peft_files({name: adapter[name] for name in list(adapter)[1:]}, large, card=CARD)
    with pytest.raises(ConfigError, match="nothing to export"):
        ranks_of({"head.weight": EYE}, 3)


def test_a_new_export_replaces_the_folder_and_leaves_nothing_beside(tmp_path: Path) -> None:
    base = bare_base(tmp_path / "base")
    out = tmp_path / "out"
    out.mkdir()
    for ranks in ((4, 4, 4), (0, 0, 2)):
        adapter = trained_adapter(shape_of(base), ranks, 3)
        export_adapter(adapter, base, out / "adapter", card=CARD)
        (out / "adapter" / "stale").write_text("from an older export")
    export_adapter(adapter, base, out / "adapter", card=CARD)
    assert [path.name for path in out.iterdir()] == ["adapter"]
    assert not (out / "adapter" / "stale").exists()
    assert len(load((out / "adapter" / "adapter_model.safetensors").read_bytes())) == 8


def test_an_export_that_fails_keeps_the_old_folder(tmp_path: Path) -> None:
    base = bare_base(tmp_path / "base")
    adapter = trained_adapter(shape_of(base), (0, 0, 4), 3)
    export_adapter(adapter, base, tmp_path / "adapter", card=CARD)
    before = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(ProtocolError):
        export_adapter({**adapter, "head.bias": EYE}, base, tmp_path / "adapter", card=CARD)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == before


def load_in_stock_process(base: Path, adapter_dir: Path, held_out: Path) -> dict[str, Any]:
    """Run the loading program outside the repository, without our packages on the path."""
    done = subprocess.run(
        [sys.executable, str(STOCK), str(base), str(adapter_dir), str(held_out)],
        cwd=base,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


def evaluate_folder(setup: EvaluationSetup, adapter_dir: Path) -> EvaluationResult:
    async def conversation() -> EvaluationResult:
        evaluator = Evaluator()
        try:
            await evaluator.prepare(setup)
            return await evaluator.evaluate(adapter_dir)
        finally:
            await evaluator.close()

    return anyio.run(conversation)


@pytest.mark.train
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "deberta-v2", "gpt2", "llama"])
def test_stock_libraries_reproduce_the_reported_accuracy(tmp_path: Path, family: str) -> None:
    causal = family in {"gpt2", "llama"}
    labels = () if causal else LABELS
    base = save_base_model(tmp_path / "base", family)
    held_out = write_held_out(tmp_path / "held_out.jsonl", paired=family == "bert")
    adapter = trained_adapter(shape_of(base), (0, 4, 8), len(labels), seed=3)
    card = AdapterCard("run", str(base), labels)
    export_adapter(adapter, base, tmp_path / "adapter", card=card)
    task = "instruction" if causal else "classification"
    setup = EvaluationSetup(base, task, held_out, labels, batch_size=7, threads=1)

    ours = evaluate_folder(setup, tmp_path / "adapter")
    stock = load_in_stock_process(base, tmp_path / "adapter", held_out)

    assert stock["accuracy"] == pytest.approx(ours.accuracy)
    assert stock["loss"] == pytest.approx(ours.loss, rel=1e-5)
    assert stock["warnings"] == []
    assert stock["ours"] == []
    assert ours.examples == 40


@pytest.mark.train
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_twelve_layers_of_different_ranks_load_with_every_key_in_its_place(
    tmp_path: Path, family: str
) -> None:
    from peft import PeftModel  # noqa: PLC0415 - needs torch
    from transformers import (  # noqa: PLC0415 - needs torch
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
    )

    ranks = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11)
    base = save_base_model(tmp_path / "base", family, layers=12)
    kind: Any = AutoModelForCausalLM
    options: dict[str, int] = {}
    labels: tuple[str, ...] = ()
    if family == "bert":
        kind, options, labels = AutoModelForSequenceClassification, {"num_labels": 3}, LABELS
    adapter = trained_adapter(shape_of(base), ranks, len(labels))
    export_adapter(adapter, base, tmp_path / "a", card=AdapterCard("run", "base", labels))

    model = PeftModel.from_pretrained(kind.from_pretrained(str(base), **options), tmp_path / "a")
    written = load((tmp_path / "a" / "adapter_model.safetensors").read_bytes())
    loaded = {
        name.replace(".modules_to_save.default", "").replace(".default", ""): value
        for name, value in model.state_dict().items()
        if ".default." in name
    }

    assert loaded.keys() == written.keys()
    assert all(np.array_equal(loaded[name].numpy(), written[name]) for name in written)
    for layer in model.modules():
        if hasattr(layer, "lora_A"):
            rank = layer.lora_A["default"].weight.shape[0]
            assert layer.scaling["default"] == 2.0
            assert layer.r["default"] == rank
