"""Measures this device with one base model; the result is a capability profile.

The shell's side: fetches the model, times the link and the disk, lets the
trainer child time training and inference, and caches the result under a
fingerprint of hardware, software and base model.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import anyio
from pydantic import ValidationError

from edge_agent.blobs import BlobClient
from edge_agent.capability import (
    Device,
    current_capability,
    measure_disk,
    plain_capability,
    remember_benchmark,
)
from edge_agent.link import measure_link
from edge_agent.state_dir import StateDir, write_durably
from edge_agent.trainer import Trainer
from wire_protocol.errors import ConfigError, DeviceError, FailureCode
from wire_protocol.model_family import FAMILIES, family_of
from wire_protocol.parts import CapabilityProfile, ComputeReport, InferenceReport

PROBE_BATCH_SIZE = 8
PROBE_TOKENS = 32
PROBE_LABELS = 2

OnStep = Callable[[int, int, str], None]
"""(step, steps, what is measured)."""


@dataclass(frozen=True)
class MeasuredModel:
    """The base model to measure with."""

    digest: str
    folder: Path


async def benchmark_device(
    device: Device,
    state: StateDir,
    *,
    blobs: BlobClient,
    provisioning: BlobClient,
    trainer: Trainer,
    model_digest: str,
    on_step: OnStep,
) -> CapabilityProfile:
    """Measure with a base model of the server; the cached result when nothing changed.

    Raises:
        DeviceError: the base model does not load here, memory or disk ran out.
        ServerUnavailable: the server does not answer.
    """
    cached = current_capability(device, state)
    if cached.compute is not None and cached.compute.model_digest == model_digest:
        return cached
    on_step(0, 1, "fetching the base model")
    folder = await provisioning.fetch_model(model_digest, state.cache)
    on_step(0, 1, "timing the link")
    link = await measure_link(blobs)
    model = MeasuredModel(model_digest, folder)
    measured = await measure_device(device, state, trainer=trainer, model=model, on_step=on_step)
    capability = measured.model_copy(update={"link": link})
    remember_benchmark(state, capability)
    return capability


async def measure_device(
    device: Device, state: StateDir, *, trainer: Trainer, model: MeasuredModel, on_step: OnStep
) -> CapabilityProfile:
    """Time training, memory, inference and disk with a base model that lies here."""
    on_step(0, 1, "timing the disk")
    disk_bytes_per_s = await anyio.to_thread.run_sync(measure_disk, state.cache)
    result = await _measure_training(device, state, trainer, model.folder, on_step)
    return plain_capability(device, state, trainer_pid=trainer.pid).model_copy(
        update={
            "fingerprint": device.fingerprint(model.digest),
            "disk_write_bytes_per_s": disk_bytes_per_s,
            "compute": _compute_report(result, model.digest),
            "inference": _inference_report(result),
        }
    )


async def _measure_training(
    device: Device, state: StateDir, trainer: Trainer, model_dir: Path, on_step: OnStep
) -> dict[str, object]:
    task = _task_of(model_dir)
    emulation = device.emulation
    request = {
        "model_dir": str(model_dir),
        "task": task,
        "label_count": PROBE_LABELS if task == "classification" else 0,
        "max_tokens": PROBE_TOKENS,
        "batch_size": PROBE_BATCH_SIZE,
        "threads": device.settings.threads,
        "precision": device.precision,
        "stretch": {"flops_per_s": emulation.flops_per_s} if emulation else None,
        "memory_limit_bytes": None
        if emulation
        else device.memory_budget_bytes(trainer_pid=trainer.pid),
        "onnx": device.settings.benchmark_onnx,
        "work_dir": str(state.cache),
    }
    request_file = state.cache / "benchmark_request.json"
    write_durably(request_file, json.dumps(request).encode(), site="agent.benchmark_request")
    await trainer.benchmark(request_file, on_progress=lambda p: on_step(p.step, p.steps, p.what))
    result: dict[str, object] = json.loads(
        request_file.with_name("benchmark_result.json").read_text(encoding="utf-8")
    )
    return result


def _task_of(model_dir: Path) -> str:
    try:
        config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
        return FAMILIES[family_of(config)].task
    except (OSError, ValueError, ConfigError) as error:
        raise DeviceError(FailureCode.UNSUPPORTED_MODEL, str(error)) from error


def _compute_report(result: dict[str, object], model_digest: str) -> ComputeReport:
    try:
        return ComputeReport.model_validate({**result, "model_digest": model_digest})
    except ValidationError as error:
        line = f"the benchmark measured nonsense: {error.errors()[0]['msg']}"
        raise DeviceError(FailureCode.INTERNAL, line) from error


def _inference_report(result: dict[str, object]) -> InferenceReport | None:
    inference = result.get("inference")
    return InferenceReport.model_validate(inference) if inference else None
