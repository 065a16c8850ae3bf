from __future__ import annotations

import json
from pathlib import Path

import pytest

from broker_server.export import AdapterCard, export_adapter
from tests.support.peft_models import LABELS, save_base_model, shape_of, trained_adapter
from wire_protocol.errors import ConfigError

pytestmark = pytest.mark.train


def exported(tmp_path: Path, family: str, *, with_head: bool = False) -> tuple[Path, Path]:
    """A base model and an adapter folder for it."""
    causal = family == "gpt2"
    base = save_base_model(tmp_path / "base", family, with_head=with_head)
    adapter = trained_adapter(shape_of(base), (0, 4, 8), 0 if causal else 3)
    card = AdapterCard("run", str(base), () if causal else LABELS)
    export_adapter(adapter, base, tmp_path / "adapter", card=card)
    return tmp_path / "adapter", base


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2"])
def test_the_merged_model_says_what_base_and_adapter_say(tmp_path: Path, family: str) -> None:
    import torch  # noqa: PLC0415 - tests without the mark need no torch
    import transformers  # noqa: PLC0415 - as above
    from peft import PeftModel  # noqa: PLC0415 - as above

    from broker_server.model_export import merge  # noqa: PLC0415 - imports torch

    adapter_dir, base = exported(tmp_path, family)
    merge(adapter_dir, base, tmp_path / "merged")

    causal = family == "gpt2"
    kind = "CausalLM" if causal else "SequenceClassification"
    auto = getattr(transformers, f"AutoModelFor{kind}")
    plain = auto.from_pretrained(str(base), **({} if causal else {"num_labels": 3}))
    adapted = PeftModel.from_pretrained(plain, str(adapter_dir)).eval()
    merged = auto.from_pretrained(str(tmp_path / "merged")).eval()
    ids = torch.arange(4, 24).reshape(2, 10)
    with torch.inference_mode():
        difference = (adapted(input_ids=ids).logits - merged(input_ids=ids).logits).abs().max()
    assert float(difference) < 1e-4
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "merged"))
    assert tokenizer("word1")["input_ids"]
    if not causal:
        assert merged.config.id2label == dict(enumerate(LABELS))


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2"])
def test_onnx_agrees_with_torch_at_every_length(tmp_path: Path, family: str) -> None:
    import onnxruntime  # noqa: PLC0415 - as above

    from broker_server.model_export import merge, to_onnx  # noqa: PLC0415 - imports torch

    adapter_dir, base = exported(tmp_path, family)
    merge(adapter_dir, base, tmp_path / "merged")
    check = to_onnx(tmp_path / "merged", tmp_path / "model.onnx")
    assert 0 < check.max_abs_difference < 1e-3
    assert check.examples == 8
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    inputs = [one.name for one in session.get_inputs()]
    paired = ["token_type_ids"] if family == "bert" else []
    assert inputs == ["input_ids", "attention_mask", *paired]
    assert sorted(path.name for path in tmp_path.iterdir() if "onnx" in path.name) == ["model.onnx"]


def test_an_onnx_file_that_differs_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from broker_server import model_export  # noqa: PLC0415 - imports torch

    adapter_dir, base = exported(tmp_path, "bert")
    model_export.merge(adapter_dir, base, tmp_path / "merged")
    monkeypatch.setattr(model_export, "ONNX_TOLERANCE", 0.0)
    with pytest.raises(ConfigError, match="ONNX and torch differ"):
        model_export.to_onnx(tmp_path / "merged", tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_a_base_with_a_head_for_other_labels_can_be_merged(tmp_path: Path) -> None:
    from broker_server.model_export import merge  # noqa: PLC0415 - imports torch

    adapter_dir, base = exported(tmp_path, "distilbert", with_head=True)
    merge(adapter_dir, base, tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert list(config["id2label"].values()) == list(LABELS)


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    from broker_server.model_export import merge  # noqa: PLC0415 - imports torch

    adapter_dir, _ = exported(tmp_path, "bert")
    other = save_base_model(tmp_path / "other", "roberta")
    with pytest.raises(ConfigError, match="is no adapter of"):
        merge(adapter_dir, other, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
