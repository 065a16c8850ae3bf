"""Inference with onnxruntime gives what torch gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

import onnxruntime
import torch
from transformers import AutoModel

from edge_agent.onnx_runtime import export, measure
from tests.support.tiny_models import make_base_model
from wire_protocol.model_family import FAMILIES

pytestmark = pytest.mark.train


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_exported_model_computes_the_same_for_any_batch_and_length(
    tmp_path: Path, family: str
) -> None:
    folder = make_base_model(tmp_path / "model", family)
    session = onnxruntime.InferenceSession(str(export(folder, tmp_path / "onnx")))
    model = AutoModel.from_pretrained(str(folder)).float().eval()
    for shape in ((1, 5), (3, 12)):
        ids = np.random.default_rng(0).integers(6, 20, shape)
        with torch.no_grad():
            expected = model(torch.from_numpy(ids)).last_hidden_state.numpy()
        (hidden,) = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
        np.testing.assert_allclose(hidden, expected, atol=1e-4)


def test_a_model_is_exported_once(tmp_path: Path) -> None:
    folder = make_base_model(tmp_path / "model", "bert")
    path = export(folder, tmp_path / "onnx")
    written = path.stat().st_mtime_ns
    (folder / "config.json").unlink()
    assert export(folder, tmp_path / "onnx") == path
    assert path.stat().st_mtime_ns == written


def test_latency_is_measured_for_one_sequence(tmp_path: Path) -> None:
    folder = make_base_model(tmp_path / "model", "bert")
    latency = measure(export(folder, tmp_path / "onnx"), tokens=16, threads=1, runs=5)
    assert latency.tokens == 16
    assert 0 < latency.p50_s <= latency.p95_s


def test_an_export_that_would_not_fit_is_not_tried(tmp_path: Path) -> None:
    folder = make_base_model(tmp_path / "model", "bert")
    with pytest.raises(MemoryError, match="needs more memory"):
        export(folder, tmp_path / "onnx", limit_bytes=1)
    assert not (tmp_path / "onnx").exists()
