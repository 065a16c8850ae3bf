"""Virtual devices say later what a coarse codec left out, as live ones do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from broker_server.run_state import RunStatus
from broker_server.simulation_folder import SimulationState
from edge_agent.error_feedback import encode_with_feedback
from tests.support.simulations import specification, write_simulation
from wire_protocol.lora import Codec
from wire_protocol.tensors import decode

pytestmark = pytest.mark.train

FIGURES = ("metrics.jsonl", "assignments.jsonl", "checkpoint.json")
OFTEN = ("codec=int4", "rounds=4", "devices_per_round=5")
"""Of six devices, so that most are asked again."""


@pytest.fixture(scope="module")
def spec_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.tiny_models import make_base_model  # noqa: PLC0415 - imports torch

    model_dir = make_base_model(tmp_path_factory.mktemp("model"), "bert")
    return write_simulation(tmp_path_factory.mktemp("experiment"), model_dir)


def run(path: Path, out: Path, *overrides: str, **options: Any) -> SimulationState:
    from broker_server.simulate import simulate  # noqa: PLC0415 - imports torch

    return simulate(specification(path, *overrides), out, pictures=False, **options)


def test_each_update_says_what_the_ones_before_it_left_out(
    spec_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from broker_server import simulate  # noqa: PLC0415 - imports torch
    from broker_server.simulated_training import (  # noqa: PLC0415
        SimulatedTrainer,
        TrainedUpdate,
        TrainingData,
        VirtualAssignment,
    )
    from broker_server.simulation_trainers import TrainerHere  # noqa: PLC0415

    seen: list[tuple[VirtualAssignment, TrainedUpdate]] = []
    given: list[TrainingData] = []

    class Watched(TrainerHere):
        def train(self, assignments: Sequence[VirtualAssignment]) -> list[TrainedUpdate]:
            trained = super().train(assignments)
            seen.extend(zip(assignments, trained, strict=True))
            return trained

    def hire(data: TrainingData, *, processes: int) -> Watched:
        assert processes == 1
        given.append(data)
        return Watched(data)

    monkeypatch.setattr(simulate, "hire", hire)
    run(spec_path, tmp_path / "out", *OFTEN)

    [data] = given
    exact = SimulatedTrainer(
        replace(data, recipe=data.recipe.model_copy(update={"codec": Codec.FP32}))
    )
    left_out: dict[str, bytes | None] = {}
    asked_again = 0
    for assignment, trained in seen:
        assert assignment.residual == left_out.get(assignment.device_id)
        asked_again += assignment.residual is not None
        learned = decode(exact.train(assignment).update)
        before = decode(assignment.residual) if assignment.residual else {}
        update, after = encode_with_feedback(learned, before, Codec.INT4)
        assert trained.update == update
        assert trained.residual is not None
        kept = decode(trained.residual)
        assert kept.keys() == after.keys()
        assert all((kept[name] == after[name]).all() for name in after)
        left_out[assignment.device_id] = trained.residual
    assert asked_again >= 4


def test_an_interrupted_run_of_a_coarse_codec_ends_like_an_undisturbed_one(
    spec_path: Path, tmp_path: Path
) -> None:
    class Stopped(Exception):
        pass

    def stop(state: SimulationState) -> None:
        if len(state.rounds) == 2:
            raise Stopped

    whole = run(spec_path, tmp_path / "whole", *OFTEN)
    assert whole.status is RunStatus.FINISHED
    with pytest.raises(Stopped):
        run(spec_path, tmp_path / "parts", *OFTEN, watch=stop)
    run(spec_path, tmp_path / "parts", *OFTEN, processes=2)
    for name in FIGURES:
        first, second = (tmp_path / one / name for one in ("whole", "parts"))
        assert first.read_bytes() == second.read_bytes(), name


def test_only_the_present_residuals_are_kept_and_none_of_a_fine_codec(
    spec_path: Path, tmp_path: Path
) -> None:
    coarse = run(spec_path, tmp_path / "coarse", *OFTEN)
    assert 0 < len(coarse.residuals) <= 6
    fine = run(spec_path, tmp_path / "fine", *OFTEN, "codec=fp16")
    assert fine.residuals == {}
    more = {ref.sha256 for ref in coarse.residuals.values()}
    held = {
        path.name
        for path in (tmp_path / "coarse" / "blobs").rglob("*")
        if path.is_file() and path.stat().st_size > 0
    }
    plain = [path for path in (tmp_path / "fine" / "blobs").rglob("*") if path.is_file()]
    assert more <= held
    assert len(held - more) == len(plain)


def test_nothing_is_added_to_an_update_that_privacy_limits(spec_path: Path, tmp_path: Path) -> None:
    private = "privacy={clip_norm: 0.05, noise_multiplier: 1.0, test_noise_seed: 1}"
    state = run(spec_path, tmp_path / "private", *OFTEN, "strategy=fedlora", private)
    assert state.status is RunStatus.FINISHED
    assert state.residuals == {}
