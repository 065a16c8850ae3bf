"""Training above stored hidden states: the same updates as training through every layer.

Stored in fp16, states are off by one part in 2048 at most; gradients of these models then agree to
2 %. Without the rounding they agree to the last digits.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from edge_agent import frozen_prefix
from edge_agent.dataset import Tokenised, collate, padding_of
from edge_agent.finetune import BaseModel, Outcome, load_base_model, prepare_data, train
from edge_agent.frozen_prefix import PrefixCache, is_cached, prefix_version
from edge_agent.layer_range import give_up_below, given_up, states_entering
from edge_agent.peft_adapter import attach, detach, set_training_mode
from edge_agent.prefix_store import PrefixStore
from edge_agent.round_directory import RESULT_FILE, TrainRequest, read_request
from edge_agent.warm_trainer import WarmTrainer
from tests.support.tiny_models import (
    LABELS,
    make_adapter,
    make_base_model,
    write_assignment,
    write_reviews,
)
from wire_protocol.model_family import FAMILIES
from wire_protocol.tensors import decode

pytestmark = pytest.mark.train

ALL = (2, 2, 2)


class Scene:
    """A base model of one family with data, an adapter and a cache."""

    def __init__(self, family: str, folder: Path) -> None:
        torch.set_num_threads(1)
        self.folder = folder
        self.model_dir = make_base_model(folder / "model", family)
        self.reviews = write_reviews(folder / "reviews.jsonl")
        task = FAMILIES[family].task
        labels = len(LABELS) if task == "classification" else 0
        self.base: BaseModel = load_base_model(self.model_dir, task, labels)
        self.adapter = make_adapter(self.model_dir, ALL, label_count=labels, zero_b=False)
        self.cache = PrefixCache(PrefixStore(folder / "prefix", 10**8), "model")

    def request(self, ranks: tuple[int, ...], **changes: Any) -> TrainRequest:
        number = len(list(self.folder.glob("round*")))
        folder = self.folder / f"round{number}"
        write_assignment(folder, self.model_dir, reviews=self.reviews, ranks=ranks, **changes)
        return read_request(folder)

    def data(self, request: TrainRequest) -> list[Tokenised]:
        return prepare_data(self.base, self.reviews, columns=request.columns, recipe=request.recipe)

    def train(
        self, request: TrainRequest, *, cached: bool, data: Sequence[Tokenised] | None = None
    ) -> Outcome:
        return train(
            self.base,
            self.data(request) if data is None else data,
            adapter=self.adapter,
            request=request,
            cache=self.cache if cached else None,
        )


@pytest.fixture
def bert(tmp_path: Path) -> Scene:
    return Scene("bert", tmp_path)


@pytest.fixture
def unrounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Store float32, so that what is left of a difference is not the rounding's."""
    monkeypatch.setattr(frozen_prefix, "_stored_dtype", lambda _autocast: torch.float32)
    monkeypatch.setattr(
        frozen_prefix, "_bytes_of", lambda states: states.contiguous().numpy().tobytes()
    )
    monkeypatch.setattr(
        frozen_prefix.FrozenPrefix,
        "_read",
        lambda self, layer, digest: (
            None
            if (data := self._shelves[layer].get(digest)) is None
            else torch.from_numpy(np.frombuffer(data, dtype=np.float32).copy()).view(
                -1, self._base.shape.hidden_size
            )
        ),
    )


def relative_error(one: Outcome, other: Outcome) -> float:
    """Largest difference of two updates, against the largest value of the tensor."""
    assert one.delta.keys() == other.delta.keys()
    return max(
        float(np.abs(one.delta[name] - other.delta[name]).max() / np.abs(one.delta[name]).max())
        for name in one.delta
    )


def gradients(scene: Scene, ranks: tuple[int, ...], *, cached: bool) -> dict[str, Any]:
    """Gradients of one batch, by our names."""
    request = scene.request(ranks)
    data = scene.data(request)[:4]
    attached = attach(scene.base, scene.adapter, ranks)
    try:
        set_training_mode(attached)
        scene.base.model.zero_grad(set_to_none=True)  # the head is the model's own
        inputs = {
            name: torch.tensor(rows)
            for name, rows in collate(data, padding_of(scene.base.tokenizer)).items()
        }
        labels = inputs.pop("labels")
        torch.manual_seed(0)
        if not cached:
            logits = scene.base.model(**inputs).logits
        else:
            boundary = ranks.count(0)
            with frozen_prefix.FrozenPrefix(
                scene.base, scene.adapter, boundary=boundary, cache=scene.cache
            ) as prefix:
                states, _ = prefix.states(data)
                with prefix.replacing(states):
                    logits = scene.base.model(**inputs).logits
        if logits.dim() == 3:
            logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:]
        torch.nn.functional.cross_entropy(logits, labels.flatten()).backward()
        return {name: parameter.grad.clone() for name, parameter in attached.trained.items()}
    finally:
        detach(attached)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("ranks", [(0, 2, 2), (0, 0, 2)])
def test_gradients_are_those_without_the_cache(
    tmp_path: Path, family: str, ranks: tuple[int, ...]
) -> None:
    scene = Scene(family, tmp_path)
    plain = gradients(scene, ranks, cached=False)
    for visit in ("miss", "hit"):
        cached = gradients(scene, ranks, cached=True)
        for name, expected in plain.items():
            largest = float(expected.abs().max())
            error = float((cached[name] - expected).abs().max())
            assert error <= 0.02 * largest + 1e-6, (visit, name)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_without_rounding_gradients_agree_to_the_last_digits(
    tmp_path: Path, family: str, unrounded: None
) -> None:
    scene = Scene(family, tmp_path)
    plain = gradients(scene, (0, 2, 2), cached=False)
    for _visit in ("miss", "hit"):
        cached = gradients(scene, (0, 2, 2), cached=True)
        for name, expected in plain.items():
            torch.testing.assert_close(cached[name], expected, rtol=1e-4, atol=1e-7)


def test_a_hit_gives_the_same_numbers_as_a_miss(bert: Scene) -> None:
    request = bert.request((0, 2, 2), steps=8)
    missed, hit = bert.train(request, cached=True), bert.train(request, cached=True)
    for name in missed.delta:
        np.testing.assert_array_equal(missed.delta[name], hit.delta[name])


def test_a_hit_runs_no_frozen_layer(bert: Scene) -> None:
    request = bert.request((0, 0, 2), steps=8)
    missed = bert.train(request, cached=True).report
    hit = bert.train(request, cached=True).report
    plain = bert.train(request, cached=False).report
    assert plain.forward_token_layers == 3 * plain.tokens
    assert hit.forward_token_layers == hit.tokens
    assert hit.tokens < (missed.forward_token_layers or 0) < 3 * missed.tokens


def test_updates_stay_right_when_the_depth_changes(bert: Scene, unrounded: None) -> None:
    for ranks in ((0, 0, 2), (0, 2, 2), (0, 0, 2), (2, 2, 2), (0, 2, 2)):
        request = bert.request(ranks, steps=4)
        error = relative_error(bert.train(request, cached=False), bert.train(request, cached=True))
        assert error < 1e-2, ranks


def test_going_shallower_begins_at_the_deeper_boundary(bert: Scene) -> None:
    bert.train(bert.request((0, 2, 2), steps=20), cached=True)
    shallower = bert.request((0, 0, 2), steps=1)
    report = bert.train(shallower, cached=True).report
    # One layer between the boundaries instead of two, and the trained one.
    assert (report.forward_token_layers or 0) <= 2 * report.tokens


def test_another_adapter_below_is_another_prefix(bert: Scene, unrounded: None) -> None:
    request = bert.request((0, 2, 2), steps=4)
    bert.train(request, cached=True)
    for name in bert.adapter:
        if name.startswith("layers.0."):
            bert.adapter[name] = bert.adapter[name] * np.float32(1.5)
    error = relative_error(bert.train(request, cached=False), bert.train(request, cached=True))
    assert error < 1e-2


def test_another_adapter_above_is_the_same_prefix(bert: Scene) -> None:
    below = prefix_version(bert.adapter, 1)
    bert.adapter["layers.1.attention.self.query.lora_A"] += 1.0
    assert prefix_version(bert.adapter, 1) == below
    assert prefix_version(bert.adapter, 2) != prefix_version({}, 2)


def test_changed_data_is_computed_anew(bert: Scene, unrounded: None) -> None:
    request = bert.request((0, 2, 2), steps=4)
    data = bert.data(request)
    bert.train(request, cached=True, data=data)
    changed = [
        Tokenised({**one.inputs, "input_ids": one.inputs["input_ids"][::-1]}, one.labels)
        for one in data
    ]
    plain = bert.train(request, cached=False, data=changed)
    assert relative_error(plain, bert.train(request, cached=True, data=changed)) < 1e-2


def test_examples_differ_by_whatever_the_model_reads() -> None:
    one = Tokenised({"input_ids": [1, 2], "token_type_ids": [0, 0]}, [0])
    assert one.digest == Tokenised(one.inputs, [1]).digest
    other = Tokenised({"input_ids": [1, 2], "token_type_ids": [0, 1]}, [0])
    assert one.digest != other.digest


def test_without_room_everything_is_computed_every_time(bert: Scene, unrounded: None) -> None:
    bert.cache = PrefixCache(PrefixStore(bert.folder / "none", 0), "model")
    request = bert.request((0, 2, 2), steps=4)
    plain = bert.train(request, cached=False)
    for _ in range(2):
        assert relative_error(plain, bert.train(request, cached=True)) < 1e-2


def test_states_beyond_fp16_are_used_but_not_stored(bert: Scene) -> None:
    with torch.no_grad():
        bert.base.layers[0].output.LayerNorm.bias[3] = 1e6
    request = bert.request((0, 0, 2), steps=4)
    bert.adapter = {
        name: tensor for name, tensor in bert.adapter.items() if not name.startswith("layers.0")
    }
    bert.base.layers[1].output.LayerNorm.bias.data[3] = 1e6
    plain, cached = bert.train(request, cached=False), bert.train(request, cached=True)
    assert relative_error(plain, cached) < 1e-2
    assert bert.cache.store.used_bytes() == 0


def test_stored_states_are_those_of_the_model_in_eval_mode(bert: Scene) -> None:
    request = bert.request((0, 2, 2))
    data = bert.data(request)
    attached = attach(bert.base, bert.adapter, (0, 2, 2))
    try:
        set_training_mode(attached)
        with frozen_prefix.FrozenPrefix(
            bert.base, bert.adapter, boundary=1, cache=bert.cache
        ) as prefix:
            stored, _ = prefix.states(data[:1])
        bert.base.model.eval()
        inputs = {name: torch.tensor([ids]) for name, ids in data[0].inputs.items()}
        expected = states_entering(bert.base, inputs, 1)
    finally:
        detach(attached)
    torch.testing.assert_close(stored, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "llama"])
def test_a_model_that_gave_up_its_prefix_trains_the_same(tmp_path: Path, family: str) -> None:
    scene = Scene(family, tmp_path)
    request = scene.request((0, 0, 2), steps=4)
    data = scene.data(request)
    before = sum(parameter.numel() for parameter in scene.base.model.parameters())
    while not is_cached(scene.cache, scene.adapter, data, boundary=2):
        request = replace(request, steps=request.steps + 4)
        expected = scene.train(request, cached=True, data=data)
    expected = scene.train(request, cached=True, data=data)
    give_up_below(scene.base, 2)
    assert given_up(scene.base) == 2
    after = sum(parameter.numel() for parameter in scene.base.model.parameters())
    assert after < before
    outcome = scene.train(request, cached=True, data=data)
    for name in expected.delta:
        np.testing.assert_array_equal(outcome.delta[name], expected.delta[name])


class Rounds:
    """Assignments of one device with a kept prefix, through the trainer's own files."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.trainer = WarmTrainer()

    def given_up(self) -> int:
        """Layers that the trainer's base model is without."""
        base = self.trainer._base
        assert base is not None
        return given_up(base)

    def do(
        self, ranks: tuple[int, ...], *, rounds_left: int | None = None, **changes: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        from edge_agent.finetune import Supervision  # noqa: PLC0415 - beside its only use

        number = len(list(self.scene.folder.glob("round*")))
        folder = self.scene.folder / f"round{number}"
        prefix = {
            "adapter_file": None,
            "cache_dir": str(self.scene.folder / "states"),
            "cache_bytes": 10**8,
            "model_digest": "model",
            "rounds_left": rounds_left,
        }
        write_assignment(
            folder,
            self.scene.model_dir,
            reviews=self.scene.reviews,
            ranks=ranks,
            **{"prefix": prefix, **changes},
        )
        self.trainer.train(folder, Supervision())
        result = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
        return result["report"], dict(decode((folder / "update.safetensors").read_bytes()))


def test_a_trainer_frees_the_prefix_and_loads_it_again_for_a_deeper_round(bert: Scene) -> None:
    rounds = Rounds(bert)
    rounds.do((0, 2, 2), steps=30)
    report, first = rounds.do((0, 2, 2), steps=6)
    assert report["forward_token_layers"] == 2 * report["tokens"]
    assert rounds.given_up() == 1
    report, _ = rounds.do((2, 2, 2), steps=2)
    assert report["forward_token_layers"] == 3 * report["tokens"]
    assert rounds.given_up() == 0
    _, again = rounds.do((0, 2, 2), steps=6)
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])


def test_states_that_nobody_would_read_are_not_written(bert: Scene) -> None:
    rounds = Rounds(bert)
    states = bert.folder / "states"
    # One step of four examples in the last round of a prefix: none is met twice.
    report, first = rounds.do((0, 2, 2), rounds_left=0, steps=1)
    assert report["forward_token_layers"] == 3 * report["tokens"]
    assert not states.exists()
    # The same in a round that others follow, and with steps enough to come round again.
    _, second = rounds.do((0, 2, 2), rounds_left=1, steps=1)
    assert states.exists()
    for name in first:
        np.testing.assert_allclose(first[name], second[name], atol=1e-3)
    report, _ = rounds.do((0, 2, 2), rounds_left=0, steps=30)
    assert report["forward_token_layers"] < 3 * report["tokens"]


def test_damaged_states_bring_the_prefix_back(bert: Scene) -> None:
    rounds = Rounds(bert)
    rounds.do((0, 2, 2), steps=30)
    _, first = rounds.do((0, 2, 2), steps=6)
    assert rounds.given_up() == 1
    for states in (bert.folder / "states").glob("*/states"):
        states.write_bytes(bytes(states.stat().st_size))
    report, again = rounds.do((0, 2, 2), steps=6)
    assert report["forward_token_layers"] > 2 * report["tokens"]
    for name in first:
        np.testing.assert_allclose(first[name], again[name], atol=1e-3)
