"""One assignment from beginning to end: fetch, admit, train, upload.

A killed agent begins again where its round directory says: what was trained is
not trained again. After power loss, what is unreadable counts as not there. Raises
named failures; the session decides what to say.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import structlog

from edge_agent.admission import AdmissionRequest, Admitted, MemoryModel, admit
from edge_agent.blobs import BlobClient
from edge_agent.capability import Device, last_benchmark
from edge_agent.policy_watch import PolicyWatch
from edge_agent.power_meter import energy_of
from edge_agent.round_directory import (
    ASSIGNMENT_FILE,
    RESIDUAL_FILE,
    RESULT_FILE,
    UPDATE_FILE,
)
from edge_agent.settings import DatasetSettings
from edge_agent.state_dir import StateDir, write_durably
from edge_agent.trainer import Trainer, TrainerProgress
from wire_protocol.durable import move_into_place
from wire_protocol.errors import DeviceError, FailureCode
from wire_protocol.lora import BYTES_PER_VALUE, LoraConfig
from wire_protocol.messages import Progress, RoundStart, UpdateManifest
from wire_protocol.parts import BlobRef, StepReport

log = structlog.get_logger()

DOWNLOAD_FILE = "download.json"


@dataclass(frozen=True)
class Workshop:
    """What an assignment needs to be worked on.

    Attributes:
        blobs: to the server over the board's link, real or imitated.
        provisioning: the same without imitation: a base model comes once, ahead
            of the work, and no imitated radio should make people wait for it.
        watch: knows why the owner does not let this device train now.
    """

    device: Device
    state: StateDir
    blobs: BlobClient
    provisioning: BlobClient
    trainer: Trainer
    watch: PolicyWatch

    @property
    def traffic(self) -> dict[str, int]:
        """Bytes that crossed the link to the server so far."""
        clients = (self.blobs, self.provisioning)
        return {
            "sent_bytes": sum(client.sent_bytes for client in clients),
            "received_bytes": sum(client.received_bytes for client in clients),
        }


async def do_round(
    shop: Workshop, start: RoundStart, on_progress: Callable[[Progress], None]
) -> UpdateManifest:
    """Train one assignment and put the update into the server's blob store.

    Raises:
        DeviceError: a named failure, for the server's bookkeeping.
        ServerUnavailable, Refused: the server does not answer, or says no.
    """
    round_dir = shop.state.round_dir(start.assignment_id)
    energy_j: float | None = None
    if not (round_dir / RESULT_FILE).exists():
        if shop.watch.reason:
            line = f"its owner does not let it train now: {shop.watch.reason}"
            raise DeviceError(FailureCode.NOT_ALLOWED, line)
        began = time.monotonic()
        on_progress(Progress(assignment_id=start.assignment_id, phase="fetching"))
        await _fetch(shop, start, round_dir)
        spent_s = time.monotonic() - began + _upload_estimate_s(shop, start)
        left_s = max(1.0, start.deadline_s - spent_s)
        _write_assignment(shop, start, round_dir, left_s)
        energy_j = await _train(shop, start, round_dir, on_progress)
    _keep_residual(shop, start, round_dir)
    on_progress(Progress(assignment_id=start.assignment_id, phase="uploading"))
    began, sent_before = time.monotonic(), shop.blobs.sent_bytes
    update = await shop.blobs.upload(round_dir / UPDATE_FILE)
    sending = {
        "upload_s": time.monotonic() - began,
        "upload_bytes": shop.blobs.sent_bytes - sent_before,
        "energy_j": energy_j,
    }
    return _manifest(shop, start, round_dir, update=update, sending=sending)


async def _train(
    shop: Workshop, start: RoundStart, round_dir: Path, on_progress: Callable[[Progress], None]
) -> float | None:
    """Let the trainer work; returns the joules that the board drew meanwhile, if it can tell."""

    def report(done: TrainerProgress) -> None:
        on_progress(
            Progress(
                assignment_id=start.assignment_id,
                phase="training",
                step=done.step,
                steps=done.steps,
                loss=done.loss,
            )
        )

    return await energy_of(
        lambda: shop.trainer.train(round_dir, on_progress=report),
        lambda: shop.device.sensors().power_w,
        clock=time.monotonic,
    )


def _keep_residual(shop: Workshop, start: RoundStart, round_dir: Path) -> None:
    """What the update leaves out counts from here on: the result that leaves it out exists."""
    left_out = round_dir / RESIDUAL_FILE
    if left_out.exists():
        target = shop.state.residual_file(start.run_id)
        try:
            move_into_place(left_out, target, site="agent.residual")
        except OSError as error:
            line = f"what the update left out cannot be kept: {error}"
            raise DeviceError(FailureCode.DISK_FULL, line) from error


async def _fetch(shop: Workshop, start: RoundStart, round_dir: Path) -> None:
    """Bring the base model and the global adapter here; note what that took."""
    round_dir.mkdir(parents=True, exist_ok=True)
    await shop.provisioning.fetch_model(start.model_digest, shop.state.cache)
    target = shop.state.blobs / start.adapter.sha256
    began, received_before = time.monotonic(), shop.blobs.received_bytes
    await shop.blobs.download(start.adapter.sha256, start.adapter.size_bytes, target, flush=False)
    if start.prefix and start.prefix.adapter:
        below = start.prefix.adapter
        file = shop.state.blobs / below.sha256
        await shop.blobs.download(below.sha256, below.size_bytes, file, flush=False)
    spent = {
        "download_s": time.monotonic() - began,
        "download_bytes": shop.blobs.received_bytes - received_before,
    }
    report = json.dumps(spent).encode()
    write_durably(round_dir / DOWNLOAD_FILE, report, site="agent.download_report", flush=False)


def _write_assignment(
    shop: Workshop, start: RoundStart, round_dir: Path, deadline_s: float
) -> None:
    device = shop.device
    dataset = _dataset(shop, start.recipe.dataset)
    admitted = _admit(shop, start)
    if admitted.reason:
        log.info("assignment_admitted", assignment_id=start.assignment_id, why=admitted.reason)
    ranks = LoraConfig.top(admitted.depth, start.ranks).ranks
    emulation = device.emulation
    request = {
        "assignment_id": start.assignment_id,
        "round_number": start.round_number,
        "model_dir": str(shop.state.models / start.model_digest),
        "adapter_file": str(shop.state.blobs / start.adapter.sha256),
        "ranks": ranks,
        "factors": start.factors,
        "quantised_layers": start.quantised_layers,
        "residual_file": str(shop.state.residual_file(start.run_id)),
        "steps": start.steps,
        "deadline_s": deadline_s,
        "seed": start.seed,
        "recipe": start.recipe.model_dump(mode="json"),
        "dataset": {
            "path": str(dataset.path),
            "columns": {
                "text": dataset.text,
                "text_pair": dataset.text_pair,
                "label": dataset.label,
            },
        },
        "batch_size": admitted.batch_size,
        "gradient_checkpointing": admitted.gradient_checkpointing,
        "precision": device.precision,
        "threads": device.settings.threads,
        "memory_limit_bytes": None if emulation else _budget_bytes(shop),
        "stretch": {"flops_per_s": emulation.flops_per_s} if emulation else None,
        "prefix": _prefix(shop, start),
    }
    content = json.dumps(request).encode()
    write_durably(round_dir / ASSIGNMENT_FILE, content, site="agent.assignment", flush=False)


def _prefix(shop: Workshop, start: RoundStart) -> dict[str, object] | None:
    """A prefix that stays for many rounds, and where its hidden states are kept."""
    if start.prefix is None:
        return None
    below = start.prefix.adapter
    return {
        "adapter_file": str(shop.state.blobs / below.sha256) if below else None,
        "cache_dir": str(shop.state.cache / "prefix"),
        "cache_bytes": shop.device.settings.prefix_cache_bytes,
        "model_digest": start.model_digest,
        "rounds_left": start.prefix.rounds_left,
    }


def _budget_bytes(shop: Workshop) -> int:
    return shop.device.memory_budget_bytes(trainer_pid=shop.trainer.pid)


def _upload_estimate_s(shop: Workshop, start: RoundStart) -> float:
    """Time to keep for the upload, so that stopping in time means arriving in time."""
    measured = last_benchmark(shop.device, shop.state)
    link = measured.link if measured else None
    if link is None:
        return 0.0
    # With a prefix the adapter holds no more than what is trained.
    trained = 1.0 if start.prefix else start.lora.depth / start.lora.layer_count
    codecs = start.recipe.codec, start.recipe.adapter_codec
    share = trained * BYTES_PER_VALUE[codecs[0]] / BYTES_PER_VALUE[codecs[1]]
    return start.adapter.size_bytes * share / link.up_bytes_per_s + 4 * link.round_trip_s


def _dataset(shop: Workshop, name: str) -> DatasetSettings:
    datasets = shop.device.settings.datasets
    if name not in datasets:
        known = ", ".join(sorted(datasets)) or "none"
        line = f"this device has no dataset {name!r} in its settings (known: {known})"
        raise DeviceError(FailureCode.UNKNOWN_DATASET, line)
    return datasets[name]


def _admit(shop: Workshop, start: RoundStart) -> Admitted:
    """Fit the assignment into this device's memory; unmeasured devices try as told."""
    recipe = start.recipe
    measured = last_benchmark(shop.device, shop.state)
    compute = measured.compute if measured else None
    if compute is None or compute.model_digest != start.model_digest:
        return Admitted(
            batch_size=recipe.batch_size,
            gradient_checkpointing=False,
            depth=start.lora.depth,
            reason="not measured yet",
        )
    request = AdmissionRequest(
        start.lora, recipe.batch_size, recipe.max_tokens, start.quantised_layers
    )
    budget_bytes = _budget_bytes(shop)
    return admit(request, MemoryModel.of(compute), budget_bytes=budget_bytes)


def _manifest(
    shop: Workshop,
    start: RoundStart,
    round_dir: Path,
    *,
    update: BlobRef,
    sending: Mapping[str, float | None],
) -> UpdateManifest:
    try:
        result = json.loads((round_dir / RESULT_FILE).read_text(encoding="utf-8"))
        spent = json.loads((round_dir / DOWNLOAD_FILE).read_text(encoding="utf-8"))
        return UpdateManifest(
            run_id=start.run_id,
            round_number=start.round_number,
            assignment_id=start.assignment_id,
            base_sha256=start.adapter.sha256,
            ranks=tuple(result["ranks"]),
            update=update,
            examples=result["examples"],
            report=StepReport.model_validate({**result["report"], **spent, **sending}),
            emulated=shop.device.emulation.label if shop.device.emulation else None,
        )
    except (OSError, KeyError, ValueError) as error:
        shutil.rmtree(round_dir, ignore_errors=True)
        line = f"the trainer's result is unreadable, the round was thrown away: {error}"
        raise DeviceError(FailureCode.INTERNAL, line) from error
