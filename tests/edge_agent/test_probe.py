"""Measuring what a training step costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")

import torch

from edge_agent.finetune import BaseModel, StepCost, load_base_model
from edge_agent.probe import (
    PROGRESS_STEPS,
    Point,
    ProbeRequest,
    benchmark,
    fit_memory,
    fit_seconds,
)
from tests.support.tiny_models import make_base_model
from wire_protocol.errors import DeviceError, FailureCode
from wire_protocol.parts import ComputeReport, InferenceReport

pytestmark = pytest.mark.train


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    torch.set_num_threads(1)
    folder = make_base_model(tmp_path_factory.mktemp("bert") / "model", "bert")
    return load_base_model(folder, "classification", 2)


@pytest.fixture
def request_(tmp_path: Path) -> ProbeRequest:
    return ProbeRequest(
        max_tokens=16,
        batch_size=4,
        threads=1,
        precision="fp32",
        flops_per_s=None,
        onnx=False,
        work_dir=tmp_path,
    )


def ignore(_step: int, _what: str) -> None:
    pass


def test_a_benchmark_fills_the_capability_profile(base: BaseModel, request_: ProbeRequest) -> None:
    seen: list[int] = []
    result = benchmark(
        base, replace(request_, onnx=True), on_step=lambda step, _what: seen.append(step)
    )
    report = ComputeReport(model_digest="0" * 64, **result)
    inference = InferenceReport(**result["inference"])
    assert result["onnx_error"] is None
    assert report.memory_base_bytes > 50e6
    assert 0 < inference.p50_s <= inference.p95_s
    assert result["steps_timed"] >= 4
    assert seen == list(range(1, PROGRESS_STEPS + 1))


def test_an_imitated_board_reports_its_own_speed_without_waiting(
    base: BaseModel, request_: ProbeRequest
) -> None:
    result = benchmark(base, replace(request_, flops_per_s=1e3), on_step=ignore)
    seconds = 2 * base.shape.weights_per_layer / 1e3
    assert result["forward_seconds_per_token_layer"] == pytest.approx(seconds)
    assert result["backward_seconds_per_token_layer"] == pytest.approx(seconds)


def test_a_failing_export_is_reported_and_not_fatal(
    base: BaseModel, request_: ProbeRequest, tmp_path: Path
) -> None:
    blocked = tmp_path / "a file, not a folder"
    blocked.write_text("", encoding="utf-8")
    result = benchmark(base, replace(request_, onnx=True, work_dir=blocked), on_step=ignore)
    assert result["inference"] is None
    assert "a file, not a folder" in result["onnx_error"]
    assert result["forward_seconds_per_token_layer"] > 0


def test_the_batch_is_halved_until_a_step_fits(base: BaseModel, request_: ProbeRequest) -> None:
    tried: list[int] = []

    def only_eight(_module: object, inputs: tuple[torch.Tensor, ...]) -> None:
        tried.append(int(inputs[0].shape[0]))
        if tried[-1] > 8:
            raise RuntimeError("can't allocate memory")

    hook = base.layers[0].register_forward_pre_hook(only_eight)
    try:
        result = benchmark(base, request_, on_step=ignore)
    finally:
        hook.remove()
    # 4 fits, four times 4 does not; 2 fits, and so does four times 2.
    assert sorted(set(tried)) == [2, 4, 8, 16]
    assert result["steps_timed"] >= 4


def test_a_model_that_cannot_be_trained_here_is_out_of_memory(
    base: BaseModel, request_: ProbeRequest
) -> None:
    def nothing_fits(_module: object, _inputs: object) -> None:
        raise MemoryError

    hook = base.layers[0].register_forward_pre_hook(nothing_fits)
    try:
        with pytest.raises(DeviceError) as caught:
            benchmark(base, request_, on_step=ignore)
    finally:
        hook.remove()
    assert caught.value.code is FailureCode.OUT_OF_MEMORY


def points(depths: list[int], token_counts: list[int], peak: list[float]) -> list[Point]:
    places = [(depth, tokens) for tokens in token_counts for depth in depths]
    return [
        Point(depth, tokens, (), int(value))
        for (depth, tokens), value in zip(places, peak, strict=True)
    ]


@given(
    base_bytes=st.integers(10**6, 10**10),
    frozen=st.integers(0, 10**6),
    trained=st.integers(0, 10**6),
)
def test_memory_that_follows_the_model_is_found_again(
    base_bytes: int, frozen: int, trained: int
) -> None:
    peak: list[float] = [
        base_bytes + tokens * (frozen + trained * depth)
        for tokens in (128, 512)
        for depth in (1, 6)
    ]
    fit = fit_memory(points([1, 6], [128, 512], peak))
    tolerance = base_bytes * 1e-6 + 1
    assert fit[0] == pytest.approx(base_bytes, rel=1e-3, abs=tolerance)
    assert fit[1] == pytest.approx(frozen, rel=1e-3, abs=tolerance)
    assert fit[2] == pytest.approx(trained, rel=1e-3, abs=tolerance)


@given(st.lists(st.integers(1, 10**9), min_size=4, max_size=4))
def test_no_part_of_the_memory_is_negative(peak: list[float]) -> None:
    assert all(value >= 0 for value in fit_memory(points([1, 6], [128, 512], peak)))


def test_seconds_that_follow_the_model_are_found_again() -> None:
    costs = {
        depth: StepCost(100, 1.0, 100 * 6 * 2e-5, 100 * depth * 3e-5, forward_token_layers=600)
        for depth in (1, 6)
    }
    measured = [Point(depth, 100, (cost, cost), 0) for depth, cost in costs.items()]
    idle = Point(0, 0, (), 0)
    assert fit_seconds([*measured, idle]) == pytest.approx((2e-5, 3e-5))
