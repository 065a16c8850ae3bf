"""Commands that need no running agent: measure, describe, train a few steps."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from edge_agent.benchmark import MeasuredModel, OnStep, benchmark_device, measure_device
from edge_agent.blobs import BlobClient
from edge_agent.capability import current_capability, describe_datasets, this_device
from edge_agent.emulation import emulation_of
from edge_agent.identity import identity_of, tls_of
from edge_agent.link import ShapedLink
from edge_agent.round_directory import ASSIGNMENT_FILE, RESULT_FILE, UPDATE_FILE
from edge_agent.settings import AgentSettings
from edge_agent.state_dir import StateDir, write_durably
from edge_agent.trainer import Trainer
from profiles.loader import board_ids, load_board
from wire_protocol.errors import ConfigError, DeviceError, FailureCode
from wire_protocol.lora import LoraConfig
from wire_protocol.model_family import FAMILIES, ModelShape, model_shape
from wire_protocol.parts import CapabilityProfile


@dataclass(frozen=True)
class LocalTraining:
    """What ``train-once`` was asked to do; ``depth`` None means every layer."""

    model_dir: Path
    dataset: str
    out: Path
    steps: int
    depth: int | None
    rank: int


async def benchmark_now(
    settings: AgentSettings, model_dir: Path | None, refresh: bool
) -> CapabilityProfile:
    """Measure this device, with the server's newest base model unless one is given.

    Raises:
        AlreadyRunning: the agent itself is running; ask the server to measure it.
        ServerUnavailable: no ``model_dir`` and no server.
        ConfigError: the server has no base model yet.
    """
    emulation = emulation_of(settings.emulate) if settings.emulate else None
    device = this_device(settings, emulation)
    state = StateDir(settings.state_dir)
    with state.locked(), _progress_bar() as on_step:
        if refresh:
            (state.cache / "benchmark.json").unlink(missing_ok=True)
        async with _trainer(settings, state) as trainer:
            if model_dir is not None:
                digest = hashlib.sha256((model_dir / "config.json").read_bytes()).hexdigest()
                model = MeasuredModel(digest, model_dir)
                return await measure_device(
                    device, state, trainer=trainer, model=model, on_step=on_step
                )
            link = ShapedLink(emulation.link if emulation else None)
            tls = tls_of(identity_of(settings))
            async with (
                BlobClient(settings.server, token=settings.token, tls=tls) as provisioning,
                BlobClient(settings.server, token=settings.token, link=link, tls=tls) as blobs,
            ):
                models = (await provisioning.get_json("/v1/models"))["models"]
                if not models:
                    raise ConfigError("the server has no base model; add one: legend model add DIR")
                return await benchmark_device(
                    device,
                    state,
                    blobs=blobs,
                    provisioning=provisioning,
                    trainer=trainer,
                    model_digest=models[-1]["digest"],
                    on_step=on_step,
                )


def own_profile(settings: AgentSettings) -> dict[str, object]:
    """Which board this is, its datasets, and its last benchmark."""
    emulation = emulation_of(settings.emulate) if settings.emulate else None
    device = this_device(settings, emulation)
    capability = current_capability(device, StateDir(settings.state_dir))
    return {
        "device_id": settings.device_id,
        "board": device.facts.board_id,
        "description": device.facts.description,
        "emulated": emulation.label if emulation else None,
        "datasets": {
            name: report.model_dump() for name, report in describe_datasets(settings).items()
        },
        "capability": capability.model_dump(mode="json"),
    }


def board_table() -> list[dict[str, object]]:
    """One row per board profile."""
    boards = [load_board(board_id) for board_id in board_ids()]
    return [
        {
            "board": board.board_id,
            "name": board.name,
            "memory_gb": round(board.memory_bytes / 2**30, 1),
            "accelerator": board.accelerator,
            "training_gflops": board.training_gflops.value,
            "basis": board.training_gflops.basis,
            "power_modes": ", ".join(mode.name for mode in board.power_modes),
        }
        for board in boards
    ]


async def train_locally(settings: AgentSettings, training: LocalTraining) -> dict[str, object]:
    """Run the training recipe on a local dataset and keep the update.

    Raises:
        DeviceError: a named failure of the training.
        ConfigError: the model or the dataset is not usable.
    """
    shape = _shape_of(training.model_dir)
    if training.dataset not in settings.datasets:
        known = ", ".join(sorted(settings.datasets)) or "none"
        raise ConfigError(f"no dataset {training.dataset!r} in the settings (known: {known})")
    labels = describe_datasets(settings)[training.dataset].labels
    ranks = (training.rank,) * shape.layer_count
    try:
        assigned = LoraConfig.top(training.depth or shape.layer_count, ranks).ranks
    except ValueError as error:
        raise ConfigError(f"--depth: {error}") from error
    state = StateDir(settings.state_dir)
    with tempfile.TemporaryDirectory(dir=state.root) as folder:
        round_dir = Path(folder)
        task = FAMILIES[shape.family].task
        adapter = _fresh_adapter(shape, ranks, len(labels) if task == "classification" else 0)
        write_durably(round_dir / "adapter.safetensors", adapter, site="agent.local")
        request = _request(settings, training, round_dir, ranks=assigned, labels=labels)
        write_durably(round_dir / ASSIGNMENT_FILE, json.dumps(request).encode(), site="agent.local")
        with _progress_bar() as on_step:
            async with _trainer(settings, state) as trainer:
                await trainer.train(
                    round_dir,
                    on_progress=lambda p: on_step(p.step, p.steps, f"loss {p.loss:.3f}"),
                )
        training.out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(round_dir / UPDATE_FILE, training.out)
        result: dict[str, object] = json.loads((round_dir / RESULT_FILE).read_text())
        return {"update": str(training.out), **result}


def _request(
    settings: AgentSettings,
    training: LocalTraining,
    round_dir: Path,
    *,
    ranks: tuple[int, ...],
    labels: tuple[str, ...],
) -> dict[str, object]:
    """What the trainer is to do; see ``round_directory``."""
    dataset = settings.datasets[training.dataset]
    task = FAMILIES[_shape_of(training.model_dir).family].task
    return {
        "model_dir": str(training.model_dir),
        "adapter_file": str(round_dir / "adapter.safetensors"),
        "ranks": ranks,
        "steps": training.steps,
        "deadline_s": 3600.0,
        "seed": 0,
        "recipe": {
            "task": task,
            "labels": labels if task == "classification" else (),
            "learning_rate": 1e-3,
            "head_learning_rate": 5e-3,
            "max_tokens": 128,
            "codec": "fp32",
        },
        "dataset": {
            "path": str(dataset.path),
            "columns": dataset.model_dump(include={"text", "text_pair", "label"}),
        },
        "batch_size": 8,
        "gradient_checkpointing": False,
        "precision": load_board(this_device(settings, None).facts.board_id).precision,
        "threads": settings.threads,
        "memory_limit_bytes": settings.memory_limit_bytes,
        "stretch": None,
    }


def _shape_of(model_dir: Path) -> ModelShape:
    try:
        return model_shape(json.loads((model_dir / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{model_dir} is not a base model folder: {error}") from error


def _fresh_adapter(shape: ModelShape, ranks: tuple[int, ...], label_count: int) -> bytes:
    try:
        from wire_protocol.initial_adapter import initial_adapter  # noqa: PLC0415 - needs NumPy
        from wire_protocol.lora import Codec  # noqa: PLC0415
        from wire_protocol.tensors import encode  # noqa: PLC0415
    except ImportError as error:
        line = f"training needs the package {error.name}: pip install 'legend-edge[train]'"
        raise DeviceError(FailureCode.MISSING_FILE, line) from error
    return encode(initial_adapter(shape, ranks, label_count=label_count, seed=0), Codec.FP32)


@asynccontextmanager
async def _trainer(settings: AgentSettings, state: StateDir) -> AsyncIterator[Trainer]:
    trainer = Trainer(
        settings.trainer_python or sys.executable,
        log_file=state.root / "trainer.log",
        threads=settings.threads,
    )
    try:
        yield trainer
    finally:
        await trainer.close()


@contextmanager
def _progress_bar() -> Iterator[OnStep]:
    """A bar on stderr at a terminal; nothing when piped."""
    from rich.console import Console  # noqa: PLC0415 - slow to import
    from rich.progress import Progress  # noqa: PLC0415

    with Progress(console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task("starting", total=None)

        def on_step(step: int, steps: int, what: str) -> None:
            bars.update(bar, completed=step, total=max(1, steps), description=what)

        yield on_step
