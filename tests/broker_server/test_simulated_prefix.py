"""Simulations whose devices keep what their frozen layers compute."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from broker_server.run_state import RunStatus
from broker_server.simulation_folder import SimulationState
from tests.support.simulations import specification, write_simulation
from wire_protocol.model_family import model_shape

pytestmark = pytest.mark.train

FIGURES = ("metrics.jsonl", "assignments.jsonl", "checkpoint.json")
SHALLOW = ("strategy_options.depth_min=1", "rounds=4", "devices_per_round=6")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.tiny_models import make_base_model  # noqa: PLC0415 - imports torch

    return make_base_model(tmp_path_factory.mktemp("model"), "bert")


@pytest.fixture(scope="module")
def spec_path(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    return write_simulation(tmp_path_factory.mktemp("experiment"), model_dir)


def run(
    path: Path,
    out: Path,
    *overrides: str,
    processes: int = 1,
    states: Path | None = None,
    stop_after: int | None = None,
) -> None:
    from broker_server.simulate import simulate  # noqa: PLC0415 - imports torch

    class Stopped(Exception):
        pass

    def watch(state: SimulationState) -> None:
        if len(state.rounds) == stop_after:
            raise Stopped

    spec = specification(path, *overrides)
    if stop_after is None:
        state = simulate(spec, out, processes=processes, prefix_dir=states, pictures=False)
        assert state.status is RunStatus.FINISHED
        return
    with pytest.raises(Stopped):
        simulate(spec, out, prefix_dir=states, pictures=False, watch=watch)


def lines(out: Path, name: str) -> list[Mapping[str, Any]]:
    return [json.loads(line) for line in (out / name).read_text(encoding="utf-8").splitlines()]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("mode", "processes"), [("pretrained", 1), ("periodic", 2)])
def test_figures_depend_neither_on_the_cache_nor_on_interruptions(
    spec_path: Path, tmp_path: Path, mode: str, processes: int
) -> None:
    chosen = (*SHALLOW, f"strategy_options.prefix_mode={mode}", "strategy_options.prefix_every=2")
    run(spec_path, tmp_path / "one", *chosen)
    # Other depths and rounds leave other states behind; then a run in two parts and processes.
    shared = tmp_path / "shared"
    other = ("strategy=legend", "strategy_options.pace=deadline")
    run(spec_path, tmp_path / "other", *chosen, *other, states=shared)
    run(spec_path, tmp_path / "two", *chosen, states=shared, stop_after=2)
    run(spec_path, tmp_path / "two", *chosen, states=shared, processes=processes)
    for name in FIGURES:
        first, second = (tmp_path / one / name for one in ("one", "two"))
        assert first.read_bytes() == second.read_bytes(), name


def test_a_virtual_device_is_faster_once_its_examples_are_cached(
    model_dir: Path, tmp_path: Path
) -> None:
    link = {"up_mbps": 0.8, "down_mbps": 1.6, "round_trip_ms": 50, "jitter": 0}
    only = {"board": "jetson-tx2", "count": 1, "name_prefix": "one", "power_mode": "MAXN",
            "link": link}  # fmt: skip
    fleet = {"name": "one", "description": "One board.", "devices": [only]}
    path = write_simulation(tmp_path / "experiment", model_dir, fleet=fleet)
    # 96 examples, 24 steps of 4: the first round visits every example once.
    run(path, tmp_path / "out", "rounds=2", "local_steps=24", "strategy_options.depth_min=1",
        "strategy_options.prefix_mode=pretrained", "strategy_options.waiting_max_s=0")  # fmt: skip
    first, second = lines(tmp_path / "out", "assignments.jsonl")
    assert (first["depth"], second["depth"]) == (1, 1)
    assert first["bytes_down"] == second["bytes_down"] == pytest.approx(first["bytes_up"], rel=0.05)
    shape = model_shape(json.loads((model_dir / "config.json").read_text(encoding="utf-8")))
    per_layer = 2 * shape.weights_per_layer * 96 * 8 / flops_of("jetson-tx2", "MAXN")
    saved = first["completion_s"] - second["completion_s"]
    assert saved == pytest.approx(2 * per_layer, rel=1e-6)
    # Predicted, too: the server knows what the device visited.
    assert second["predicted_s"] < first["predicted_s"]


def test_a_synced_prefix_is_a_run_as_before(spec_path: Path, tmp_path: Path) -> None:
    run(spec_path, tmp_path / "default", "strategy=fedlora")
    run(spec_path, tmp_path / "said", "strategy=fedlora", "strategy_options.prefix_mode=synced")
    for name in ("metrics.jsonl", "assignments.jsonl"):
        assert (tmp_path / "default" / name).read_bytes() == (tmp_path / "said" / name).read_bytes()


def flops_of(board: str, mode: str) -> float:
    from profiles.loader import load_board  # noqa: PLC0415 - only here

    return load_board(board).flops_per_s(mode)
