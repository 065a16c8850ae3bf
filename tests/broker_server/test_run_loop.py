"""The shell around a run: what it makes of an update's bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import anyio
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save

from broker_server.blobs import BlobStore
from broker_server.coordinator import Coordinator
from broker_server.delivery import RunContext
from broker_server.evaluator import Evaluator
from broker_server.run_events import (
    AcceptedUpdate,
    AggregateRound,
    CheckUpdate,
    Event,
    RoundAggregated,
    SaveCheckpoint,
    StepBroke,
    UpdateChecked,
)
from broker_server.run_loop import RunLoop
from broker_server.run_state import MemberCheckpoint, RunCheckpoint, RunPlan
from broker_server.store import Store
from broker_server.strategies import strategy_named
from broker_server.strategies.learning import restore_state, saved_state
from broker_server.strategies.protected import protected_strategy
from broker_server.strategies.strategy import Factors
from tests.support.capacities import SIX_LAYERS
from tests.support.messages import SHA, a_manifest, a_recipe, a_report
from wire_protocol.lora import Codec
from wire_protocol.messages import Ack, Command, UpdateManifest
from wire_protocol.model_family import adapter_shapes, model_shape
from wire_protocol.parts import BlobRef
from wire_protocol.tensors import decode, encode

SHAPE = model_shape(
    {"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2}
)
RANKS = (0, 2, 4)


class Silence:
    """Nobody to talk to."""

    def command(self, device_id: str, command: Command) -> str:
        return f"{device_id}-{type(command.command).__name__}"

    def ack(self, device_id: str, ack: Ack) -> None:
        raise AssertionError(f"nothing was asked of {device_id}: {ack}")


async def nothing(_run_id: str) -> None:
    """No results to write."""


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[RunLoop]:
    blobs, store = BlobStore(tmp_path / "blobs"), Store.in_folder(tmp_path)
    plan = RunPlan("run-1", rounds=1, shape=SIX_LAYERS, recipe=a_recipe(), model_digest=SHA)
    adapter = BlobRef(sha256=SHA, size_bytes=1)
    start = RunCheckpoint(
        round_number=1, attempt=0, adapter=adapter, baseline_done=True, tokens_per_step=1.0
    )
    yield RunLoop(
        RunContext("run-1", "run", tmp_path, "tiny", SHAPE, ("disk", "network"), SHA),
        Coordinator(plan, strategy_named("legend", {}), start),
        store,
        blobs,
        Evaluator(),
        folder=tmp_path / "run",
        post=Silence(),
        on_report=lambda *_: None,
        on_commit=nothing,
    )
    store.close()


def tensors(value: float = 1.0, ranks: tuple[int, ...] = RANKS) -> dict[str, NDArray[np.float32]]:
    shapes = adapter_shapes(SHAPE, ranks, 2)
    return {name: np.full(shape, value, np.float32) for name, shape in shapes.items()}


def manifest_of(loop: RunLoop, data: bytes, **changes: int) -> UpdateManifest:
    update = BlobRef(sha256=loop.blobs.put(data), size_bytes=changes.get("size_bytes", len(data)))
    return a_manifest(ranks=RANKS, update=update, examples=changes.get("examples", 100))


def check(
    loop: RunLoop, data: bytes, *, factors: Factors = "both", steps: int = 5, **changes: int
) -> str | None:
    """What the loop finds wrong with these bytes."""
    manifest = manifest_of(loop, data, **changes)
    part = MemberCheckpoint(
        assignment_id="a", ranks=RANKS, steps=steps, predicted_s=1.0, factors=factors
    )
    action = CheckUpdate("pi", "m", manifest, part)
    answer = anyio.run(told, loop, loop._check, action)
    assert isinstance(answer, UpdateChecked)
    return answer.problem


async def told(loop: RunLoop, work: object, action: object) -> Event:
    await work(action)  # type: ignore[operator]
    return loop._receive.receive_nowait()


@pytest.mark.parametrize("codec", list(Codec))
def test_an_update_as_assigned_has_no_problem(loop: RunLoop, codec: Codec) -> None:
    assert check(loop, encode(tensors(), codec)) is None


def test_what_is_wrong_with_an_update_is_said_in_one_line(loop: RunLoop) -> None:
    whole = tensors()
    missing = {name: value for name, value in whole.items() if name != "head.bias"}
    shallow = tensors(ranks=(0, 0, 4))
    bent = {**whole, "head.bias": np.zeros(3, np.float32)}
    extra = {**whole, "layers.0.evil.lora_A": np.zeros((2, 8), np.float32)}
    poisoned = {**whole, "head.bias": np.array([np.nan, 0], np.float32)}
    for data, words in (
        (encode(missing, Codec.FP32), "head.bias"),
        (encode(shallow, Codec.FP32), "lacks"),
        (encode(bent, Codec.FP32), "shape (3,)"),
        (encode(extra, Codec.FP32), "evil"),
        (save(poisoned), "not finite"),
        (b"not safetensors at all", "not valid safetensors"),
    ):
        problem = check(loop, data)
        assert problem is not None
        assert words in problem
        assert "\n" not in problem


def test_an_update_holds_the_factor_that_was_assigned_and_not_the_other(loop: RunLoop) -> None:
    shapes = adapter_shapes(SHAPE, RANKS, 2, factors="B")
    only_b = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    assert check(loop, encode(only_b, Codec.FP32), factors="B") is None
    assert "lacks" in (check(loop, encode(only_b, Codec.FP32), factors="A") or "")
    assert "unexpected" in (check(loop, encode(tensors(), Codec.FP32), factors="B") or "")


def test_a_manifest_that_lies_about_the_size_is_found_out(loop: RunLoop) -> None:
    problem = check(loop, encode(tensors(), Codec.FP32), size_bytes=7)
    assert problem is not None
    assert "the manifest says 7" in problem


def aggregate(loop: RunLoop, updates: list[tuple[float, int]]) -> Event:
    base = encode(tensors(0.0, ranks=(1, 2, 4)), Codec.FP32)
    ref = BlobRef(sha256=loop.blobs.put(base), size_bytes=len(base))
    accepted = tuple(
        AcceptedUpdate(
            f"d{index}", manifest_of(loop, encode(tensors(value), Codec.FP32), examples=examples)
        )
        for index, (value, examples) in enumerate(updates)
    )
    return anyio.run(told, loop, loop._aggregate, AggregateRound(1, ref, accepted))


def test_the_new_adapter_is_the_weighted_mean_and_keeps_untrained_layers(loop: RunLoop) -> None:
    event = aggregate(loop, [(1.0, 100), (4.0, 200)])
    assert isinstance(event, RoundAggregated)
    new = decode(loop.blobs.read(event.adapter.sha256))
    np.testing.assert_allclose(new["layers.2.attention.self.query.lora_A"], 3.0)
    np.testing.assert_allclose(new["head.bias"], 3.0)
    np.testing.assert_allclose(new["layers.0.attention.self.query.lora_A"], 0.0)


def test_a_blob_that_vanished_breaks_the_step_and_not_the_server(loop: RunLoop) -> None:
    missing = AcceptedUpdate("pi", a_manifest(ranks=RANKS, report=a_report()))
    base = encode(tensors(0.0), Codec.FP32)
    ref = BlobRef(sha256=loop.blobs.put(base), size_bytes=len(base))
    event = anyio.run(told, loop, loop._aggregate, AggregateRound(1, ref, (missing,)))
    assert isinstance(event, StepBroke)
    assert "aggregation failed" in event.detail


def test_a_server_optimizer_s_memory_is_saved_with_every_checkpoint(loop: RunLoop) -> None:
    options = {"server_optimizer": "momentum"}
    loop.coordinator.strategy = strategy_named("legend", options)
    loop.store.create_run("run-1", "{}")
    assert isinstance(aggregate(loop, [(1.0, 100)]), RoundAggregated)
    anyio.run(loop._save, SaveCheckpoint(loop.coordinator._checkpoint()))
    record = loop.store.run("run-1")
    assert record is not None
    assert record.checkpoint is not None
    state = RunCheckpoint.model_validate_json(record.checkpoint).strategy_state
    assert state is not None
    restored = strategy_named("legend", options)
    restore_state(restored, decode(loop.blobs.read(state.sha256)))
    kept, expected = saved_state(restored), saved_state(loop.coordinator.strategy)
    assert kept.keys() == expected.keys() != set()
    assert all(np.array_equal(kept[name], expected[name]) for name in kept)


def test_an_update_of_more_steps_than_were_asked_for_has_a_problem(loop: RunLoop) -> None:
    assert check(loop, encode(tensors(), Codec.FP32), steps=4) == "it claims 5 steps of 4"


def test_an_aggregation_that_is_done_again_has_learned_nothing_the_first_time(
    loop: RunLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop.coordinator.strategy = protected_strategy("legend", {"server_optimizer": "momentum"})
    aggregate(loop, [(1.0, 100), (1.1, 100), (0.9, 100)])
    before = saved_state(loop.coordinator.strategy)
    base = encode(tensors(0.0, ranks=(1, 2, 4)), Codec.FP32)
    ref = BlobRef(sha256=loop.blobs.put(base), size_bytes=len(base))
    data = encode(tensors(2.0), Codec.FP32)
    action = AggregateRound(2, ref, (AcceptedUpdate("pi", manifest_of(loop, data)),))

    def full(_data: bytes) -> str:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(loop.blobs, "put", full)
        with pytest.raises(OSError, match="No space"):
            loop._new_adapter(action)

    after = saved_state(loop.coordinator.strategy)
    assert after.keys() == before.keys() != set()
    assert all(np.array_equal(after[name], before[name]) for name in before)


def test_poison_is_refused_named_and_reported_with_the_round(loop: RunLoop) -> None:
    loop.coordinator.strategy = protected_strategy("legend", {})

    event = aggregate(loop, [(1.0, 100), (1.1, 100), (0.9, 100), (90.0, 100)])

    assert isinstance(event, RoundAggregated)
    assert [(one.device_id, one.verdict) for one in event.findings] == [("d3", "refused")]
    new = decode(loop.blobs.read(event.adapter.sha256))
    np.testing.assert_allclose(new["head.bias"], 1.0, rtol=1e-6)
