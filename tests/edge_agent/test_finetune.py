"""The training recipe on a tiny model: what it learns, when it stops, how it fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from edge_agent.dataset import Tokenised
from edge_agent.finetune import (
    BaseModel,
    Outcome,
    Supervision,
    load_base_model,
    prepare_data,
    train,
)
from edge_agent.peak_memory import is_out_of_memory
from edge_agent.peft_adapter import attach, detach
from edge_agent.round_directory import TrainRequest, read_request
from tests.support.tiny_models import (
    LABELS,
    make_adapter,
    make_base_model,
    write_assignment,
    write_reviews,
)
from wire_protocol.errors import DeviceError, FailureCode, ProtocolError
from wire_protocol.tensors import Adapter

pytestmark = pytest.mark.train

RANKS = (0, 2, 2)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_base_model(tmp_path_factory.mktemp("bert") / "model", "bert")


@pytest.fixture(scope="module")
def base(model_dir: Path) -> BaseModel:
    return load_base_model(model_dir, "classification", len(LABELS))


@pytest.fixture
def adapter(model_dir: Path) -> dict[str, Any]:
    return make_adapter(model_dir, RANKS, label_count=len(LABELS))


class Setup:
    """A request with its data, and a training of it."""

    def __init__(self, base: BaseModel, model_dir: Path, folder: Path, **changes: Any) -> None:
        reviews = write_reviews(folder / "reviews.jsonl")
        round_dir = write_assignment(
            folder / "round", model_dir, reviews=reviews, ranks=RANKS, **changes
        )
        self.base = base
        self.request: TrainRequest = read_request(round_dir)
        self.data: list[Tokenised] = prepare_data(
            base, reviews, columns=self.request.columns, recipe=self.request.recipe
        )

    def train(self, adapter: Adapter, supervision: Supervision | None = None) -> Outcome:
        return train(
            self.base, self.data, adapter=adapter, request=self.request, supervision=supervision
        )


@contextmanager
def before_each_forward(base: BaseModel, check: Callable[[int], None]) -> Iterator[None]:
    """Call ``check`` with the batch size before the first layer runs."""
    hook = base.layers[0].register_forward_pre_hook(
        lambda _module, inputs: check(int(inputs[0].shape[0]))
    )
    try:
        yield
    finally:
        hook.remove()


def test_training_learns(
    base: BaseModel, model_dir: Path, tmp_path: Path, adapter: dict[str, Any]
) -> None:
    losses: list[float] = []
    setup = Setup(base, model_dir, tmp_path, steps=100)
    recipe = replace(setup.request.recipe, learning_rate=0.05, head_learning_rate=0.05)
    setup.request = replace(setup.request, recipe=recipe)
    outcome = setup.train(adapter, Supervision(on_step=lambda _step, loss: losses.append(loss)))
    assert len(losses) == outcome.report.steps_done == 100
    assert losses[0] == outcome.report.first_loss
    assert losses[-1] == outcome.report.last_loss
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:20])


def test_the_report_adds_the_steps_up(
    base: BaseModel, model_dir: Path, tmp_path: Path, adapter: dict[str, Any]
) -> None:
    report = Setup(base, model_dir, tmp_path).train(adapter).report
    # 9 or 10 tokens an example, padded within batches of 4
    assert 3 * 4 * 9 <= report.tokens <= 3 * 4 * 16
    assert 0 < report.forward_s + report.backward_s <= report.training_s
    assert report.peak_memory_bytes > 50e6
    assert report.batch_size == 4


def test_the_start_of_the_optimiser_is_fresh_in_every_round(
    base: BaseModel, model_dir: Path, tmp_path: Path, adapter: dict[str, Any]
) -> None:
    setup = Setup(base, model_dir, tmp_path)
    first, second = setup.train(adapter), setup.train(adapter)
    for name in first.delta:
        np.testing.assert_array_equal(first.delta[name], second.delta[name])


def test_an_imitated_board_takes_its_time(
    base: BaseModel, model_dir: Path, tmp_path: Path, adapter: dict[str, Any]
) -> None:
    slept: list[float] = []
    setup = Setup(base, model_dir, tmp_path, stretch={"flops_per_s": 1e4})
    report = setup.train(adapter, Supervision(sleep=slept.append)).report
    layer_flops = 2 * base.shape.weights_per_layer * report.tokens
    assert report.forward_s == pytest.approx(layer_flops * 3 / 1e4)
    assert report.backward_s == pytest.approx(layer_flops * 2 / 1e4)
    assert len(slept) == 2 * report.steps_done


def test_a_deadline_stops_before_the_step_that_would_miss_it(
    base: BaseModel, model_dir: Path, tmp_path: Path, adapter: dict[str, Any]
) -> None:
    now_s = 0.0

    def elapsed_s() -> float:
        nonlocal now_s
        now_s += 2.0  # read twice in every step
        return now_s

    setup = Setup(base, model_dir, tmp_path, steps=100, deadline_s=21.0)
    outcome = setup.train(adapter, Supervision(elapsed_s=elapsed_s))
    assert outcome.report.steps_done == 5


def test_one_step_is_done_whatever_the_deadline(
    base: BaseModel, model_dir: Path, tmp_path: Path, adapter: dict[str, Any]
) -> None:
    setup = Setup(base, model_dir, tmp_path, deadline_s=0.001)
    outcome = setup.train(adapter, Supervision(elapsed_s=lambda: 50.0))
    assert outcome.report.steps_done == 1
    assert any(np.abs(delta).max() > 0 for delta in outcome.delta.values())


def test_a_cancel_takes_effect_between_steps(
    base: BaseModel, model_dir: Path, tmp_path: Path, adapter: dict[str, Any]
) -> None:
    done: list[int] = []
    watch = Supervision(
        on_step=lambda step, _loss: done.append(step), cancelled=lambda: len(done) == 2
    )
    with pytest.raises(DeviceError) as caught:
        Setup(base, model_dir, tmp_path, steps=50).train(adapter, watch)
    assert caught.value.code is FailureCode.CANCELLED
    assert done == [1, 2]


def test_a_batch_that_does_not_fit_is_halved_and_training_goes_on(
    base: BaseModel, model_dir: Path, tmp_path: Path, adapter: dict[str, Any]
) -> None:
    def only_two(batch_size: int) -> None:
        if batch_size > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")

    with before_each_forward(base, only_two):
        report = Setup(base, model_dir, tmp_path, batch_size=8).train(adapter).report
    assert report.batch_size == 2
    assert report.steps_done == 3


def test_a_single_example_that_does_not_fit_is_out_of_memory(
    base: BaseModel, model_dir: Path, tmp_path: Path, adapter: dict[str, Any]
) -> None:
    def nothing_fits(batch_size: int) -> None:
        raise MemoryError(batch_size)

    setup = Setup(base, model_dir, tmp_path)
    with before_each_forward(base, nothing_fits), pytest.raises(DeviceError) as caught:
        setup.train(adapter)
    assert caught.value.code is FailureCode.OUT_OF_MEMORY
    assert setup.train(adapter).report.steps_done == 3


def test_another_error_of_torch_is_not_a_lack_of_memory(
    base: BaseModel, model_dir: Path, tmp_path: Path, adapter: dict[str, Any]
) -> None:
    def broken(batch_size: int) -> None:
        raise RuntimeError(f"shapes cannot be multiplied {batch_size}")

    with before_each_forward(base, broken), pytest.raises(RuntimeError, match="multiplied"):
        Setup(base, model_dir, tmp_path).train(adapter)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError('NVML_SUCCESS == r INTERNAL ASSERT FAILED at "CUDACachingAllocator"'), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("expected scalar type Long"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_every_wording_of_a_lack_of_memory_is_known(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_a_loss_that_is_not_finite_ends_the_round(
    base: BaseModel, model_dir: Path, tmp_path: Path, adapter: dict[str, Any]
) -> None:
    huge = {name: np.full_like(tensor, 1e30) for name, tensor in adapter.items()}
    with pytest.raises(DeviceError) as caught:
        Setup(base, model_dir, tmp_path).train(huge)
    assert caught.value.code is FailureCode.NON_FINITE_LOSS


def test_an_adapter_of_another_model_is_refused(
    base: BaseModel, model_dir: Path, tmp_path: Path, adapter: dict[str, Any]
) -> None:
    del adapter["layers.2.attention.self.query.lora_A"]
    with pytest.raises(ProtocolError):
        Setup(base, model_dir, tmp_path).train(adapter)


def test_dropout_is_active_in_trained_layers_and_the_head_only(
    base: BaseModel, model_dir: Path, tmp_path: Path, adapter: dict[str, Any]
) -> None:
    modes: dict[str, bool] = {}

    def note(_batch_size: int) -> None:
        for name, module in base.model.named_modules():
            if isinstance(module, torch.nn.Dropout) and "lora" not in name:
                modes[name] = module.training

    with before_each_forward(base, note):
        Setup(base, model_dir, tmp_path, steps=1).train(adapter)
    active = {name for name, training in modes.items() if training}
    assert {name.split(".")[3] for name in active if name.startswith("bert.encoder")} == {"1", "2"}
    assert "dropout" in active
    assert not any(name.startswith("bert.embeddings") for name in active)


@pytest.mark.parametrize(
    ("family", "dense"),
    [
        ("bert", "bert.pooler.dense"),
        ("roberta", "classifier.dense"),
        ("distilbert", "pre_classifier"),
        ("deberta-v2", "pooler.dense"),
    ],
)
def test_head_layers_that_the_checkpoint_lacks_become_the_identity(
    tmp_path: Path, family: str, dense: str
) -> None:
    folder = make_base_model(tmp_path / "model", family, pooler=False)
    linear = load_base_model(folder, "classification", 3).model.get_submodule(dense)
    torch.testing.assert_close(linear.weight, torch.eye(16))
    torch.testing.assert_close(linear.bias, torch.zeros(16))


def test_a_head_of_another_size_in_the_checkpoint_does_no_harm(
    base: BaseModel, tmp_path: Path
) -> None:
    base.model.save_pretrained(str(tmp_path))
    base.tokenizer.save_pretrained(str(tmp_path))
    again = load_base_model(tmp_path, "classification", 5)
    assert again.model.classifier.weight.shape == (5, 16)
    pooler = base.model.bert.pooler.dense.weight
    torch.testing.assert_close(again.model.bert.pooler.dense.weight, pooler)


def test_a_checkpoint_that_lacks_a_layer_is_refused(model_dir: Path, tmp_path: Path) -> None:
    config = (model_dir / "config.json").read_text(encoding="utf-8")
    for file in model_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    deeper = config.replace('"num_hidden_layers": 3', '"num_hidden_layers": 4')
    (tmp_path / "config.json").write_text(deeper, encoding="utf-8")
    with pytest.raises(DeviceError, match=r"no weights for bert.encoder.layer.3") as caught:
        load_base_model(tmp_path, "classification", 2)
    assert caught.value.code is FailureCode.UNSUPPORTED_MODEL


def test_a_model_made_for_another_task_is_refused(model_dir: Path) -> None:
    with pytest.raises(DeviceError, match="cannot do instruction") as caught:
        load_base_model(model_dir, "instruction", 0)
    assert caught.value.code is FailureCode.UNSUPPORTED_MODEL


def test_a_folder_without_a_model_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DeviceError) as caught:
        load_base_model(tmp_path, "classification", 2)
    assert caught.value.code is FailureCode.MISSING_FILE


def test_a_layer_that_is_held_but_not_assigned_is_applied(base: BaseModel, model_dir: Path) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    adapter = make_adapter(model_dir, (2, 2, 2), label_count=len(LABELS), zero_b=False)

    def logits(ranks: tuple[int, ...]) -> Any:
        attached = attach(base, adapter, ranks)
        try:
            with torch.no_grad():
                return base.model(input_ids=ids).logits
        finally:
            detach(attached)

    torch.testing.assert_close(logits((0, 0, 2)), logits((2, 2, 2)))


@pytest.mark.parametrize("factors", ["A", "B"])
def test_one_factor_alone_is_trained_and_sent(
    base: BaseModel, model_dir: Path, tmp_path: Path, factors: str
) -> None:
    adapter = make_adapter(
        model_dir, tuple(rank or 2 for rank in RANKS), label_count=len(LABELS), zero_b=False
    )
    outcome = Setup(base, model_dir, tmp_path, factors=factors).train(adapter)
    sent = {name.rpartition(".")[2] for name in outcome.delta}
    assert sent == {f"lora_{factors}", "weight", "bias"}
    assert all(change.any() for change in outcome.delta.values())
