"""The trainer's child process: warm, killable, replaceable."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

pytest.importorskip("torch")

from edge_agent.trainer import Trainer, TrainerProgress
from tests.support.tiny_models import make_base_model, write_assignment, write_reviews
from wire_protocol.errors import DeviceError, FailureCode
from wire_protocol.tensors import decode

pytestmark = [pytest.mark.train, pytest.mark.anyio]

ENDLESS: dict[str, Any] = {"steps": 100_000, "stretch": {"flops_per_s": 1e6}}
"""A training that is still running whenever a test wants to disturb it."""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base_model(tmp_path_factory.mktemp("bert") / "model", "bert")


def ignore(_progress: TrainerProgress) -> None:
    pass


def assignment(folder: Path, model_dir: Path, name: str, **changes: Any) -> Path:
    reviews = folder / "reviews.jsonl"
    if not reviews.exists():
        write_reviews(reviews)
    return write_assignment(folder / name, model_dir, reviews=reviews, ranks=(0, 2, 2), **changes)


@asynccontextmanager
async def running_trainer(folder: Path, python: str = sys.executable) -> AsyncIterator[Trainer]:
    trainer = Trainer(python, log_file=folder / "trainer.log", threads=1)
    with anyio.fail_after(200):
        try:
            yield trainer
        finally:
            await trainer.close()


async def failure(trainer: Trainer, round_dir: Path) -> DeviceError:
    with pytest.raises(DeviceError) as caught:
        await trainer.train(round_dir, ignore)
    assert "\n" not in str(caught.value)
    return caught.value


async def test_one_child_does_round_after_round_and_survives_bad_ones(
    tmp_path: Path, model_dir: Path
) -> None:
    seen: list[TrainerProgress] = []
    async with running_trainer(tmp_path) as trainer:
        assert trainer.pid is None
        first = assignment(tmp_path, model_dir, "r1")
        result = await trainer.train(first, seen.append)
        assert [(progress.step, progress.steps) for progress in seen] == [(1, 3), (2, 3), (3, 3)]
        assert result["report"]["last_loss"] == seen[-1].loss
        assert result["ranks"] == [0, 2, 2]
        assert result["examples"] == 16

        stranger = tmp_path / "stranger.jsonl"
        stranger.write_text('{"text":"so so","label":"mixed"}\n', encoding="utf-8")
        columns = {"text": "text", "text_pair": None, "label": "label"}
        strange = {"path": str(stranger), "columns": columns}
        error = await failure(trainer, assignment(tmp_path, model_dir, "r2", dataset=strange))
        assert error.code is FailureCode.UNKNOWN_LABEL
        assert "'mixed'" in str(error)

        missing = {"path": str(tmp_path / "none.csv"), "columns": columns}
        error = await failure(trainer, assignment(tmp_path, model_dir, "r3", dataset=missing))
        assert error.code is FailureCode.MISSING_FILE

        error = await failure(trainer, tmp_path / "no such round")
        assert error.code is FailureCode.MISSING_FILE

        no_adapter = {"adapter_file": str(tmp_path / "none.safetensors")}
        error = await failure(trainer, assignment(tmp_path, model_dir, "r4", **no_adapter))
        assert error.code is FailureCode.MISSING_FILE

        again = assignment(tmp_path, model_dir, "r5")
        await trainer.train(again, ignore)
        assert trainer.starts == 1
    update = decode((first / "update.safetensors").read_bytes())
    assert "head.weight" in update
    assert (again / "update.safetensors").read_bytes() == (
        first / "update.safetensors"
    ).read_bytes()


async def test_a_killed_child_is_a_lack_of_memory_and_the_next_round_gets_another(
    tmp_path: Path, model_dir: Path
) -> None:
    async with running_trainer(tmp_path) as trainer:

        def kill(_progress: TrainerProgress) -> None:
            os.kill(trainer.pid or 0, signal.SIGKILL)

        with pytest.raises(DeviceError, match="signal 9") as caught:
            await trainer.train(assignment(tmp_path, model_dir, "r1", **ENDLESS), kill)
        assert caught.value.code is FailureCode.OUT_OF_MEMORY
        assert trainer.pid is None
        await trainer.train(assignment(tmp_path, model_dir, "r2"), ignore)
        assert trainer.starts == 2


async def test_a_cancel_ends_the_round_and_keeps_the_child(tmp_path: Path, model_dir: Path) -> None:
    async with running_trainer(tmp_path) as trainer:
        began = anyio.Event()
        async with anyio.create_task_group() as tasks:

            async def cancel() -> None:
                await began.wait()
                await trainer.cancel()

            tasks.start_soon(cancel)
            with pytest.raises(DeviceError) as caught:
                await trainer.train(
                    assignment(tmp_path, model_dir, "r1", **ENDLESS), lambda _: began.set()
                )
        assert caught.value.code is FailureCode.CANCELLED
        await trainer.train(assignment(tmp_path, model_dir, "r2"), ignore)
        assert trainer.starts == 1


async def test_giving_up_waiting_kills_the_child(tmp_path: Path, model_dir: Path) -> None:
    async with running_trainer(tmp_path) as trainer:
        with anyio.CancelScope() as scope:
            await trainer.train(
                assignment(tmp_path, model_dir, "r1", **ENDLESS), lambda _: scope.cancel()
            )
        assert scope.cancelled_caught
        assert trainer.pid is None


async def test_a_memory_limit_halves_the_batch_and_the_next_round_gets_a_fresh_child(
    tmp_path: Path, model_dir: Path
) -> None:
    write_reviews(tmp_path / "reviews.jsonl", repeat=4096)
    # Far below what the child already holds: only memory that it has freed can be used again.
    tight = {"memory_limit_bytes": 20_000_000, "batch_size": 4096, "steps": 1}
    async with running_trainer(tmp_path) as trainer:
        await trainer.train(assignment(tmp_path, model_dir, "r1"), ignore)
        result = await trainer.train(assignment(tmp_path, model_dir, "r2", **tight), ignore)
        assert result["report"]["batch_size"] < 4096
        assert result["report"]["steps_done"] == 1
        wide = {**tight, "memory_limit_bytes": None}
        result = await trainer.train(assignment(tmp_path, model_dir, "r3", **wide), ignore)
        assert result["report"]["batch_size"] == 4096
        assert trainer.starts == 2


async def test_a_child_that_aborts_for_lack_of_memory_is_a_lack_of_memory(
    tmp_path: Path, model_dir: Path
) -> None:
    script = tmp_path / "python"
    words = "memory allocation of 4096 bytes failed"
    script.write_text(f"#!/bin/sh\necho '{words}' >&2\nkill -ABRT $$\n", encoding="utf-8")
    script.chmod(0o755)
    async with running_trainer(tmp_path, python=str(script)) as trainer:
        error = await failure(trainer, assignment(tmp_path, model_dir, "r1"))
        assert error.code is FailureCode.OUT_OF_MEMORY


async def test_a_benchmark_leaves_its_result_beside_the_request(
    tmp_path: Path, model_dir: Path
) -> None:
    request = {
        "model_dir": str(model_dir),
        "task": "classification",
        "label_count": 2,
        "max_tokens": 16,
        "batch_size": 2,
        "threads": 1,
        "precision": "fp32",
        "stretch": {"flops_per_s": 1e6},
        "onnx": False,
        "work_dir": str(tmp_path),
    }
    (tmp_path / "request.json").write_text(json.dumps(request), encoding="utf-8")
    seen: list[str] = []
    async with running_trainer(tmp_path) as trainer:
        result = await trainer.benchmark(
            tmp_path / "request.json", lambda progress: seen.append(progress.what)
        )
    assert result["forward_seconds_per_token_layer"] == pytest.approx(2 * 2048 / 1e6)
    assert "training step at depth 3" in seen
    assert json.loads((tmp_path / "benchmark_result.json").read_text("utf-8")) == result


async def test_an_interpreter_that_is_not_there_is_named(tmp_path: Path, model_dir: Path) -> None:
    async with running_trainer(tmp_path, python="/no/such/python") as trainer:
        error = await failure(trainer, assignment(tmp_path, model_dir, "r1"))
        assert error.code is FailureCode.TRAINER_DIED
        assert "trainer_python" in str(error)


async def test_a_child_that_dies_at_once_is_reported_with_its_last_words(
    tmp_path: Path, model_dir: Path
) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'no CUDA runtime' >&2\nexit 3\n", encoding="utf-8")
    script.chmod(0o755)
    async with running_trainer(tmp_path, python=str(script)) as trainer:
        error = await failure(trainer, assignment(tmp_path, model_dir, "r1"))
        assert error.code is FailureCode.TRAINER_DIED
        assert str(error).endswith("status 3: no CUDA runtime")


AGENT = """
import anyio, sys
from pathlib import Path
from edge_agent.trainer import Trainer

async def main():
    trainer = Trainer(sys.executable, log_file=Path(sys.argv[1]), threads=1)
    await trainer.train(Path(sys.argv[2]), lambda _: print(trainer.pid, flush=True))

anyio.run(main)
"""


def test_a_child_in_mid_training_does_not_outlive_a_killed_agent(
    tmp_path: Path, model_dir: Path
) -> None:
    round_dir = assignment(tmp_path, model_dir, "r1", **ENDLESS)
    with subprocess.Popen(
        [sys.executable, "-c", AGENT, str(tmp_path / "log"), str(round_dir)],
        stdout=subprocess.PIPE,
        text=True,
    ) as agent:
        assert agent.stdout is not None
        child = os.pidfd_open(int(agent.stdout.readline()))
        agent.kill()
    # A pidfd becomes readable when its process ends.
    ended, _, _ = select.select([child], [], [], 60)
    os.close(child)
    assert ended
