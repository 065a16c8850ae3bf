"""Our adapter inside PEFT: the right place, the right scale, and PEFT's own file format."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from peft import PeftModel
from safetensors.numpy import save_file

from edge_agent.finetune import BaseModel, load_base_model
from edge_agent.peft_adapter import attach, delta, detach, lora_config, tensors
from tests.support.tiny_models import LABELS, make_adapter, make_base_model
from wire_protocol.errors import ProtocolError
from wire_protocol.lora import LORA_SCALE
from wire_protocol.model_family import FAMILIES, peft_key

pytestmark = pytest.mark.train

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def load(folder: Path, family: str, layers: int = 3) -> BaseModel:
    torch.set_num_threads(1)
    task = FAMILIES[family].task
    make_base_model(folder, family, layers=layers)
    return load_base_model(folder, task, len(LABELS) if task == "classification" else 0)


def logits(base: BaseModel) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = base.model(input_ids=IDS).logits
    return result


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_peft_folder_from_our_tensors_gives_identical_logits(tmp_path: Path, family: str) -> None:
    ranks = (0, 2, 3)
    base = load(tmp_path / "model", family)
    adapter = make_adapter(tmp_path / "model", ranks, label_count=base.label_count, zero_b=False)
    attached = attach(base, adapter, ranks)
    ours = logits(base)
    detach(attached)

    config = lora_config(base, ranks)
    config.modules_to_save = [base.family.saved_head] if base.family.saved_head else None
    folder = tmp_path / "peft"
    config.save_pretrained(str(folder))
    weights = {peft_key(family, name): tensor for name, tensor in adapter.items()}
    # PEFT wants every tensor of a saved module, and matches its name as a suffix: RoBERTa's
    # classifier.dense and DistilBERT's pre_classifier belong to it, though we never train them.
    frozen = {
        f"base_model.model.{name}": value.numpy()
        for name, value in base.model.named_parameters()
        if base.family.saved_head and not name.startswith(base.model.base_model_prefix)
    }
    weights = {**frozen, **weights}
    save_file(weights, str(folder / "adapter_model.safetensors"))
    PeftModel.from_pretrained(base.model, str(folder))
    torch.testing.assert_close(logits(base), ours, rtol=0, atol=0)


def test_the_adapter_adds_its_scaled_product_to_the_linear(tmp_path: Path) -> None:
    base = load(tmp_path / "model", "bert")
    adapter = make_adapter(tmp_path / "model", (0, 0, 3), label_count=2, zero_b=False)
    hidden = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0))
    plain = base.layers[2].attention.self.query(hidden)
    attached = attach(base, adapter, (0, 0, 3))
    with_lora = base.layers[2].attention.self.query(hidden).detach()
    detach(attached)
    a, b = (adapter[f"layers.2.attention.self.query.lora_{side}"] for side in "AB")
    expected = plain.numpy() + LORA_SCALE * hidden.numpy() @ a.T @ b.T
    np.testing.assert_allclose(with_lora.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_layer_1_is_not_mistaken_for_layer_11(tmp_path: Path) -> None:
    base = load(tmp_path / "model", "bert", layers=12)
    ranks = tuple(range(1, 13))
    adapter = make_adapter(tmp_path / "model", ranks, label_count=2, zero_b=False)
    attached = attach(base, adapter, ranks)
    modules = [layer.attention.self.value for layer in base.layers]
    assert [module.r["default"] for module in modules] == list(ranks)
    assert {module.scaling["default"] for module in modules} == {LORA_SCALE}
    assert tensors(attached).keys() == adapter.keys()
    detach(attached)


def test_a_smaller_rank_trains_the_first_rows_and_leaves_the_others_out(tmp_path: Path) -> None:
    base = load(tmp_path / "model", "bert")
    held = make_adapter(tmp_path / "model", (0, 4, 4), label_count=2, zero_b=False)
    attached = attach(base, held, (0, 2, 3))
    nested, changes = logits(base), delta(attached)
    detach(attached)
    first = {
        name: tensor[:rank] if name.endswith("A") else tensor[:, :rank]
        for layer, rank in ((1, 2), (2, 3))
        for name, tensor in held.items()
        if name.startswith(f"layers.{layer}")
    }
    attached = attach(base, {**held, **first}, (0, 2, 3))
    torch.testing.assert_close(nested, logits(base))
    detach(attached)
    for name, tensor in first.items():
        assert changes[name].shape == tensor.shape
        assert not changes[name].any()


def test_a_rank_above_the_adapters_is_refused_and_the_base_model_stays_usable(
    tmp_path: Path,
) -> None:
    base = load(tmp_path / "model", "bert")
    before = logits(base)
    held = make_adapter(tmp_path / "model", (0, 2, 2), label_count=2)
    with pytest.raises(ProtocolError):
        attach(base, held, (0, 2, 3))
    with pytest.raises(ProtocolError):
        attach(base, held, (2, 2, 2))
    with pytest.raises(ProtocolError):
        attach(replace(base, label_count=5), held, (0, 2, 2))
    torch.testing.assert_close(logits(base), before)


def test_detaching_leaves_no_trace_of_peft(tmp_path: Path) -> None:
    base = load(tmp_path / "model", "bert")
    names, before = set(base.model.state_dict()), logits(base)
    adapter = make_adapter(tmp_path / "model", (0, 2, 2), label_count=2, zero_b=False)
    attached = attach(base, adapter, (0, 2, 2))
    assert not torch.equal(logits(base), before)
    detach(attached)
    assert set(base.model.state_dict()) == names
    assert not hasattr(base.model, "peft_config")
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert torch.equal(logits(base), before)
