"""Inference with onnxruntime: export the base model once, then measure its latency.

Knows torch's exporter and onnxruntime. Valid on Python 3.8.
"""

from __future__ import annotations

import inspect
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np
import torch
from transformers import AutoModel

from edge_agent.peak_memory import available_bytes

ONNX_FILE = "base_model.onnx"
_INPUTS = ("input_ids", "attention_mask")
_MEMORY_FACTOR = 4
"""Weights, their copy in the graph, the serialised file and the session's copy."""


@dataclass(frozen=True)
class Latency:
    """Seconds for one sequence of ``tokens`` tokens: median and 95th percentile."""

    p50_s: float
    p95_s: float
    tokens: int


def export(model_dir: Path, work_dir: Path, *, limit_bytes: Optional[int] = None) -> Path:
    """Write the base model without a head as ONNX, unless it is there already.

    Args:
        model_dir: folder of the base model.
        work_dir: where ``base_model.onnx`` goes; made when missing.
        limit_bytes: memory that this process may use; None is no limit.

    Returns:
        Path of the ONNX file: ids and mask (batch, sequence), both of any size, to
        hidden states (batch, sequence, hidden).

    Raises:
        MemoryError: exporting would not fit into memory; it was not tried.
    """
    path = work_dir / ONNX_FILE
    if path.exists():
        return path
    weights_bytes = sum(file.stat().st_size for file in model_dir.glob("*.safetensors"))
    _require_memory(weights_bytes, limit_bytes)
    work_dir.mkdir(parents=True, exist_ok=True)
    # The plain attention has operators that every exporter knows.
    model = AutoModel.from_pretrained(
        str(model_dir), local_files_only=True, use_safetensors=True, attn_implementation="eager"
    )
    partial = path.with_name("partial_" + path.name)
    example = torch.ones((1, 8), dtype=torch.int64)
    with torch.no_grad():
        _export(_HiddenStates(model.float().eval()), example, partial)
    partial.replace(path)
    return path


def measure(path: Path, *, tokens: int, threads: int, runs: int = 15) -> Latency:
    """Time single sequences after one warm-up run.

    Args:
        path: an ONNX file from ``export``.
        tokens: length of the sequence.
        threads: threads of onnxruntime.
        runs: timed runs.
    """
    import onnxruntime  # noqa: PLC0415  # slow to import, and only a benchmark needs it

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        str(path), options, providers=onnxruntime.get_available_providers()
    )
    inputs: Dict[str, Any] = {name: np.ones((1, tokens), dtype=np.int64) for name in _INPUTS}
    seconds: List[float] = []
    for _ in range(runs + 1):
        began = time.perf_counter()
        session.run(None, inputs)
        seconds.append(time.perf_counter() - began)
    p50, p95 = np.percentile(seconds[1:], [50, 95])
    return Latency(float(p50), float(p95), tokens)


class _HiddenStates(torch.nn.Module):
    """The same two inputs and one output for every family."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
        options = {"use_cache": False} if hasattr(self.model.config, "use_cache") else {}
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **options
        ).last_hidden_state


def _export(model: Any, example: Any, path: Path) -> None:
    axes = {0: "batch", 1: "sequence"}
    with warnings.catch_warnings():
        # torch announces its other exporter, which does not cover every family yet.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            model,
            (example, torch.ones_like(example)),
            str(path),
            input_names=list(_INPUTS),
            output_names=["hidden"],
            dynamic_axes=dict.fromkeys((*_INPUTS, "hidden"), axes),
            opset_version=17,
            **_tracing_exporter(),
        )


def _tracing_exporter() -> Dict[str, Any]:
    """Ask for the exporter that traces: it covers every family, and older boards have no other."""
    known = inspect.signature(torch.onnx.export).parameters
    return {"dynamo": False} if "dynamo" in known else {}


def _require_memory(weights_bytes: int, limit_bytes: Optional[int]) -> None:
    if weights_bytes * _MEMORY_FACTOR > available_bytes(limit_bytes):
        raise MemoryError(f"exporting {weights_bytes} bytes of weights needs more memory")
