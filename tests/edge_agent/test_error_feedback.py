"""What a coarse codec leaves out is said later."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.error_feedback import encode_with_feedback, read_residual
from edge_agent.state_dir import StateDir
from wire_protocol.lora import Codec
from wire_protocol.tensors import Adapter, decode, encode

NAME = "layers.0.attention.self.query.lora_A"


def a_delta(seed: int) -> Adapter:
    return {NAME: np.random.default_rng(seed).normal(size=(4, 10)).astype(np.float32)}


@settings(max_examples=30)
@given(st.sampled_from([Codec.INT8, Codec.INT4]), st.integers(1, 30), st.integers(0, 2**31))
def test_the_sum_of_what_was_said_misses_at_most_one_rounding(
    codec: Codec, rounds: int, seed: int
) -> None:
    residual: Adapter = {}
    learned, said = np.zeros((4, 10)), np.zeros((4, 10))
    for number in range(rounds):
        delta = a_delta(seed + number)
        data, residual = encode_with_feedback(delta, residual, codec)
        learned += delta[NAME]
        said += decode(data)[NAME]
    assert np.abs(learned - said - residual[NAME]).max() < 1e-3
    # Half a step of the last update, however many there were.
    assert np.abs(residual[NAME]).max() <= 0.5 * 6.0 / (7 if codec is Codec.INT4 else 127)


def test_without_feedback_the_same_rounding_adds_up() -> None:
    small = {NAME: np.full((1, 10), 0.05, np.float32)}
    small[NAME][0, 0] = 1.0
    residual: Adapter = {}
    plain = fed = 0.0
    for _ in range(10):
        plain += decode(encode_with_feedback(small, {}, Codec.INT4)[0])[NAME][0, 1]
        data, residual = encode_with_feedback(small, residual, Codec.INT4)
        fed += decode(data)[NAME][0, 1]
    assert plain == 0.0
    assert fed == pytest.approx(0.5, abs=0.08)


def test_another_shape_starts_anew_and_an_untrained_tensor_keeps_its_residual() -> None:
    residual = {NAME: np.ones((8, 10), np.float32), "other": np.ones((1, 2), np.float32)}
    delta = a_delta(0)
    data, after = encode_with_feedback(delta, residual, Codec.INT4)
    assert np.array_equal(after[NAME], delta[NAME] - decode(data)[NAME])
    assert np.array_equal(after["other"], residual["other"])


def test_a_damaged_or_missing_residual_is_none_at_all(tmp_path: Path) -> None:
    path = tmp_path / "run-1.safetensors"
    assert read_residual(path) == {}
    path.write_bytes(encode(a_delta(1), Codec.FP32))
    assert np.array_equal(read_residual(path)[NAME], a_delta(1)[NAME])
    path.write_bytes(path.read_bytes()[:-3])
    assert read_residual(path) == {}


def test_only_the_present_runs_residual_is_kept(tmp_path: Path) -> None:
    state = StateDir(tmp_path)
    first = state.residual_file("run-1")
    first.write_bytes(b"x")
    assert state.residual_file("run-1").exists()
    state.residual_file("run-2")
    assert not first.exists()
