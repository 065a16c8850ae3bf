"""Every supported family trains a full round, and is the same afterwards."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from edge_agent.finetune import BaseModel, Outcome, load_base_model, prepare_data, train
from edge_agent.peft_adapter import attach, detach, ranks_in, tensors
from edge_agent.round_directory import read_request
from tests.support.tiny_models import (
    LABELS,
    make_adapter,
    make_base_model,
    write_assignment,
    write_reviews,
)
from wire_protocol.lora import quantising_token_layers
from wire_protocol.model_family import FAMILIES, layer_of

pytestmark = pytest.mark.train

RANKS = (0, 2, 3)
HELD = (2, 2, 4)


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    torch.set_num_threads(1)
    family = str(request.param)
    folder = make_base_model(tmp_path_factory.mktemp(family) / "model", family)
    return load_base_model(folder, FAMILIES[family].task, label_count(family))


@pytest.fixture
def model_dir(base: BaseModel) -> Path:
    return Path(base.tokenizer.name_or_path)


def label_count(family: str) -> int:
    return len(LABELS) if FAMILIES[family].task == "classification" else 0


def run_round(base: BaseModel, folder: Path, columns: dict[str, Any], **changes: Any) -> Outcome:
    model_dir = Path(base.tokenizer.name_or_path)
    reviews = write_reviews(folder / "reviews.jsonl")
    dataset = {"path": str(reviews), "columns": columns}
    round_dir = write_assignment(
        folder / "round", model_dir, reviews=reviews, ranks=RANKS, **{"dataset": dataset, **changes}
    )
    request = read_request(round_dir)
    data = prepare_data(base, request.dataset_file, columns=request.columns, recipe=request.recipe)
    adapter = make_adapter(model_dir, HELD, label_count=base.label_count)
    return train(base, data, adapter=adapter, request=request)


def weights(base: BaseModel) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in base.model.state_dict().items():
        yield name, value.clone()


def test_a_round_changes_the_assigned_layers_and_nothing_else(
    base: BaseModel, tmp_path: Path
) -> None:
    before = dict(weights(base))
    outcome = run_round(base, tmp_path, {"text": "text", "label": "label"})

    assert math.isfinite(outcome.report.first_loss)
    assert math.isfinite(outcome.report.last_loss)
    assert outcome.report.steps_done == 3
    assert {layer_of(name) for name in outcome.delta} - {None} == {1, 2}
    assert ranks_in(outcome.delta, 3) == RANKS
    for name, delta in outcome.delta.items():
        if name.endswith("lora_B") or name.startswith("head"):
            assert np.abs(delta).max() > 0, name
    after = dict(weights(base))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_second_round_on_the_same_base_model_gives_the_same_update(
    base: BaseModel, tmp_path: Path
) -> None:
    columns = {"text": "text", "label": "label"}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = run_round(base, tmp_path / "a", columns)
    second = run_round(base, tmp_path / "b", columns)
    for name in first.delta:
        np.testing.assert_array_equal(first.delta[name], second.delta[name])


def test_pairs_of_texts_train_too(base: BaseModel, tmp_path: Path) -> None:
    if not base.label_count:
        pytest.skip("causal language models take a prompt and a response")
    columns = {"text": "text", "text_pair": "text_pair", "label": "label"}
    single = run_round(base, tmp_path, {"text": "text", "label": "label"})
    (tmp_path / "pair").mkdir()
    pair = run_round(base, tmp_path / "pair", columns)
    assert math.isfinite(pair.report.last_loss)
    assert pair.report.tokens > single.report.tokens


def test_gradient_checkpointing_gives_the_same_update(base: BaseModel, tmp_path: Path) -> None:
    columns = {"text": "text", "label": "label"}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    plain = run_round(base, tmp_path / "a", columns)
    checkpointed = run_round(base, tmp_path / "b", columns, gradient_checkpointing=True)
    for name in plain.delta:
        np.testing.assert_allclose(plain.delta[name], checkpointed.delta[name], atol=1e-5)


def test_quantised_activations_change_gradients_a_little_and_no_forward_pass(
    base: BaseModel, tmp_path: Path
) -> None:
    columns = {"text": "text", "label": "label"}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    plain = run_round(base, tmp_path / "a", columns, steps=1)
    rounded = run_round(base, tmp_path / "b", columns, steps=1, quantised_layers=2)
    assert rounded.report.first_loss == plain.report.first_loss
    assert any(not np.array_equal(plain.delta[name], rounded.delta[name]) for name in plain.delta)
    # What rounding costs is told, so that the server can reckon with it.
    work = quantising_token_layers(plain.report.tokens, 2)
    assert plain.report.forward_token_layers is not None
    assert rounded.report.forward_token_layers == plain.report.forward_token_layers + work > work
    assert all("forward" not in vars(layer) for layer in base.layers)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_gradient_flows_below_the_depth(
    base: BaseModel, tmp_path: Path, checkpointing: bool
) -> None:
    seen: dict[int, set[bool]] = {0: set(), 1: set(), 2: set()}

    def note(layer: int, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        seen[layer].add(hidden.requires_grad)

    hooks = [
        module.register_forward_hook(
            lambda _module, _inputs, output, layer=layer: note(layer, output)
        )
        for layer, module in enumerate(base.layers)
    ]
    columns = {"text": "text", "label": "label"}
    try:
        run_round(base, tmp_path, columns, gradient_checkpointing=checkpointing)
    finally:
        for hook in hooks:
            hook.remove()
    assert seen == {0: {False}, 1: {True}, 2: {True}}


def test_gradients_exist_exactly_for_the_assigned_tensors(base: BaseModel, model_dir: Path) -> None:
    adapter = make_adapter(model_dir, HELD, label_count=base.label_count, zero_b=False)
    attached = attach(base, adapter, RANKS)
    try:
        logits = base.model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits
        logits.float().pow(2).sum().backward()
        with_gradient = {id(value) for value in base.model.parameters() if value.grad is not None}
        trained = {id(value) for value in attached.trained.values()}
    finally:
        detach(attached)
    assert with_gradient == trained


def test_what_was_attached_is_what_comes_back(base: BaseModel, model_dir: Path) -> None:
    adapter = make_adapter(model_dir, HELD, label_count=base.label_count, zero_b=False)
    attached = attach(base, adapter, HELD)
    back = tensors(attached)
    detach(attached)
    assert back.keys() == adapter.keys()
    for name in adapter:
        np.testing.assert_array_equal(back[name], adapter[name])
