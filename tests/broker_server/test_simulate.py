"""Whole simulations of a tiny model: the same again, in parts, in parallel, on time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from broker_server.run_state import RunStatus
from broker_server.simulation_folder import SimulationState
from broker_server.virtual_fleet import ModelCost
from tests.support.simulations import FLEET, WORDS, specification, write_simulation
from wire_protocol.errors import ConfigError
from wire_protocol.model_family import model_shape

pytestmark = pytest.mark.train

FIGURES = ("metrics.jsonl", "assignments.jsonl", "summary.json", "checkpoint.json")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.tiny_models import make_base_model  # noqa: PLC0415 - imports torch

    return make_base_model(tmp_path_factory.mktemp("model"), "bert")


@pytest.fixture(scope="module")
def spec_path(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    return write_simulation(tmp_path_factory.mktemp("experiment"), model_dir)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, spec_path: Path) -> Path:
    """The folder of an undisturbed run."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    state = run(spec_path, out)
    assert state.status is RunStatus.FINISHED
    return out


def run(path: Path, out: Path, *overrides: str, processes: int = 1) -> SimulationState:
    from broker_server.simulate import simulate  # noqa: PLC0415 - imports torch

    return simulate(specification(path, *overrides), out, processes=processes)


def lines(out: Path, name: str) -> list[Mapping[str, Any]]:
    return [json.loads(line) for line in (out / name).read_text(encoding="utf-8").splitlines()]


def assert_same(first: Path, second: Path) -> None:
    for name in FIGURES:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_a_run_leaves_everything_that_a_person_wants_to_see(finished: Path) -> None:
    files = {path.name for path in finished.iterdir()}
    assert files >= {*FIGURES, "config.yaml", "accuracy.png", "devices.png", "simulation.png"}
    assert (finished / "adapter" / "adapter_model.safetensors").is_file()
    metrics = lines(finished, "metrics.jsonl")
    assert [line["round"] for line in metrics] == [0, 1, 2, 3]
    assert all(line["bytes_up"] > 0 and line["updates"] == 4 for line in metrics[1:])


def test_the_same_seed_gives_the_same_figures_to_the_last_bit(
    finished: Path, spec_path: Path, tmp_path: Path
) -> None:
    run(spec_path, tmp_path / "again")
    assert_same(finished, tmp_path / "again")
    run(spec_path, tmp_path / "other", "seed=1")
    assert lines(finished, "metrics.jsonl") != lines(tmp_path / "other", "metrics.jsonl")


def test_two_processes_find_what_one_finds(finished: Path, spec_path: Path, tmp_path: Path) -> None:
    run(spec_path, tmp_path / "two", processes=2)
    assert_same(finished, tmp_path / "two")


def interrupted(path: Path, out: Path, *overrides: str, after: int) -> None:
    """Simulate so many rounds, and stop as if by Ctrl-C."""
    from broker_server.simulate import simulate  # noqa: PLC0415 - imports torch

    class Interrupted(Exception):
        pass

    def watch(state: SimulationState) -> None:
        if len(state.rounds) == after:
            raise Interrupted

    with pytest.raises(Interrupted):
        simulate(specification(path, *overrides), out, watch=watch)


def test_an_interrupted_run_ends_like_an_undisturbed_one(
    finished: Path, spec_path: Path, tmp_path: Path
) -> None:
    for rounds in (0, 2):
        interrupted(spec_path, tmp_path / "parts", after=rounds)
    assert len(lines(tmp_path / "parts", "metrics.jsonl")) == 3
    run(spec_path, tmp_path / "parts")
    assert_same(finished, tmp_path / "parts")


def test_what_legend_remembers_of_deadlines_and_residuals_survives_interruptions(
    spec_path: Path, tmp_path: Path
) -> None:
    ours = ("strategy=legend", "codec=int8", "adapter_codec=int8", "rounds=8")
    run(spec_path, tmp_path / "whole", *ours)
    for rounds in (1, 2, 4, 5, 7):
        interrupted(spec_path, tmp_path / "parts", *ours, after=rounds)
    run(spec_path, tmp_path / "parts", *ours)
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_a_folder_of_other_settings_is_left_alone(finished: Path, spec_path: Path) -> None:
    with pytest.raises(ConfigError, match="seed"):
        run(spec_path, finished, "seed=9")


def test_a_folder_is_free_again_after_a_mistake(spec_path: Path, tmp_path: Path) -> None:
    for wrong in ("strategy_options.rank_mim=1", "labels=[only]", "model=nowhere"):
        with pytest.raises(ConfigError):
            run(spec_path, tmp_path / "out", wrong)
    assert run(spec_path, tmp_path / "out", "rounds=1").status is RunStatus.FINISHED


def test_every_strategy_meets_the_same_devices_with_the_same_data(
    finished: Path, spec_path: Path, tmp_path: Path
) -> None:
    run(spec_path, tmp_path / "fedlora", "strategy=fedlora")
    ours = lines(finished, "assignments.jsonl")
    theirs = lines(tmp_path / "fedlora", "assignments.jsonl")
    assert [(x["round"], x["device_id"]) for x in ours] == [
        (x["round"], x["device_id"]) for x in theirs
    ]
    assert {x["depth"] for x in theirs} == {3}


def test_a_round_takes_what_the_cost_model_says(model_dir: Path, tmp_path: Path) -> None:
    link = {"up_mbps": 0.8, "down_mbps": 1.6, "round_trip_ms": 50, "jitter": 0}
    only = {"board": "jetson-tx2", "count": 1, "name_prefix": "one", "power_mode": "MAXN",
            "link": link}  # fmt: skip
    fleet = {"name": "one", "description": "One board.", "devices": [only]}
    path = write_simulation(tmp_path / "experiment", model_dir, fleet=fleet)
    run(path, tmp_path / "out", "strategy=fedlora", "rounds=1")
    [device] = lines(tmp_path / "out", "assignments.jsonl")
    [_, metrics] = lines(tmp_path / "out", "metrics.jsonl")
    shape = model_shape(json.loads((model_dir / "config.json").read_text(encoding="utf-8")))
    # two steps of four texts of six words between a beginning and an end
    tokens = 2 * 4 * (WORDS + 2)
    operations = 2 * shape.weights_per_layer * tokens * (3 + 3)
    flops_per_s = flops_of("jetson-tx2", "MAXN")
    expected_s = (
        0.050
        + device["bytes_down"] / 200_000
        + operations / flops_per_s
        + device["bytes_up"] / 100_000
    )
    assert device["completion_s"] == pytest.approx(expected_s, rel=1e-9)
    assert metrics["duration_s"] == pytest.approx(expected_s, rel=1e-9)
    assert device["waiting_s"] == 0


def flops_of(board: str, mode: str) -> float:
    from profiles.loader import load_board  # noqa: PLC0415 - only here

    return load_board(board).flops_per_s(mode)


def test_who_misses_the_deadline_is_left_out(model_dir: Path, tmp_path: Path) -> None:
    def group(name: str, count: int, mbps: float) -> Mapping[str, Any]:
        link = {"up_mbps": mbps, "down_mbps": mbps, "round_trip_ms": 10, "jitter": 0}
        return {"board": "jetson-tx2", "count": count, "name_prefix": name,
                "power_mode": "MAXN", "link": link}  # fmt: skip

    fleet = {
        "name": "late",
        "description": "One of three hangs on a wire that is too thin.",
        "devices": [group("quick", 2, 20), group("late", 1, 0.001)],
    }
    path = write_simulation(tmp_path / "experiment", model_dir, fleet=fleet)
    run(path, tmp_path / "out", "rounds=2", "devices_per_round=null", "deadline_s=5")
    found = lines(tmp_path / "out", "assignments.jsonl")
    statuses = {x["device_id"]: x["status"] for x in found if x["round"] == 1}
    assert statuses == {"quick-1": "updated", "quick-2": "updated", "late": "straggler"}
    durations = [x["duration_s"] for x in lines(tmp_path / "out", "metrics.jsonl")[1:]]
    assert durations == [5.0, 5.0]


def test_a_quorum_ends_a_round_before_the_slowest(
    finished: Path, spec_path: Path, tmp_path: Path
) -> None:
    run(spec_path, tmp_path / "quorum", "quorum=0.5")
    quick = lines(tmp_path / "quorum", "metrics.jsonl")[1]
    assert quick["updates"] == 2
    assert quick["duration_s"] < lines(finished, "metrics.jsonl")[1]["duration_s"]


def test_lost_devices_cost_their_grace_and_are_back_for_the_next_round(
    spec_path: Path, tmp_path: Path
) -> None:
    run(spec_path, tmp_path / "lossy", "availability.dropout=0.4", "devices_per_round=6")
    metrics = lines(tmp_path / "lossy", "metrics.jsonl")[1:]
    assert all(line["devices"] == 6 for line in metrics)
    assert any(line["updates"] < 6 for line in metrics)
    for line in metrics:
        assert (line["duration_s"] > 45) is (line["updates"] < 6)


def test_two_held_out_files_decide_and_report_apart(spec_path: Path, tmp_path: Path) -> None:
    other = spec_path.parent / "validation.tsv"
    other.write_text("text\tlabel\nthe film was good\tpositive\nan awful script\tnegative\n")
    state = run(spec_path, tmp_path / "out", f"validation={{path: {other}}}", "rounds=1")
    metrics = lines(tmp_path / "out", "metrics.jsonl")
    tested = [score.accuracy for score in state.test_scores if score is not None]
    assert tested == [x["test_accuracy"] for x in metrics]
    assert {x["accuracy"] for x in metrics} <= {0.0, 0.5, 1.0}
    assert [x["loss"] for x in metrics] != [x["test_loss"] for x in metrics]


def test_quantised_activations_let_a_fleet_train_what_its_memory_would_not_hold(
    tmp_path: Path, model_dir: Path
) -> None:
    from broker_server.base_model import read_base_model  # noqa: PLC0415 - imports torch

    model = read_base_model(model_dir)
    cost = ModelCost(model.shape, model.digest, model.size_bytes)
    tokens = 4 * 16
    # All three layers need three; quantised, 3 - 0.73 * 2 of them.
    limit = cost.peak_memory_bytes(tokens, 3, quantised=3) + 100
    assert limit < cost.peak_memory_bytes(tokens, 2)
    fleet = {**FLEET, "devices": [{**one, "memory_limit_bytes": limit} for one in FLEET["devices"]]}
    path = write_simulation(tmp_path / "tight", model_dir, fleet=fleet)

    refused = run(path, tmp_path / "legend", "strategy_options.depth_min=3")
    quantised = run(path, tmp_path / "fedquad", "strategy=fedquad", "strategy_options.depth_min=3")

    assert refused.status is RunStatus.FAILED
    assert "needs" in refused.reason
    assert quantised.status is RunStatus.FINISHED
    trained = lines(tmp_path / "fedquad", "assignments.jsonl")
    assert {(line["depth"], line["status"]) for line in trained} == {(3, "updated")}


def test_ranks_that_follow_gradients_change_on_the_way_and_survive_an_interruption(
    tmp_path: Path, spec_path: Path
) -> None:
    learned = (
        "strategy=legend",
        "strategy_options.ranks=importance",
        "strategy_options.ranks_every=2",
        "rounds=4",
    )
    assert run(spec_path, tmp_path / "whole", *learned).status is RunStatus.FINISHED
    by_round = {
        line["round"]: tuple(line["ranks"])
        for line in lines(tmp_path / "whole", "assignments.jsonl")
        if line["depth"] == 3
    }
    assert by_round[1] == by_round[2] == (4, 5, 6)
    assert by_round[3] == by_round[4] != (4, 5, 6)
    assert sum(by_round[3]) == 15
    assert list(by_round[3]) == sorted(by_round[3])

    interrupted(spec_path, tmp_path / "parts", *learned, after=3)
    assert run(spec_path, tmp_path / "parts", *learned).status is RunStatus.FINISHED
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_hetlora_prunes_ranks_that_its_penalty_shrank_and_survives_an_interruption(
    tmp_path: Path, spec_path: Path
) -> None:
    options = "{rank_max: 8, tiers: 1, keep_share: 0.5, tail_weight: %s}"
    base = ("strategy=hetlora", "rounds=5", "devices_per_round=6", "local_steps=4")

    def ranks_of(out: Path, weight: float) -> list[set[int]]:
        run(spec_path, out, *base, f"strategy_options={options % weight}")
        held = lines(out, "assignments.jsonl")
        return [{max(line["ranks"]) for line in held if line["round"] == n} for n in range(1, 6)]

    free, penalised = ranks_of(tmp_path / "free", 0.0), ranks_of(tmp_path / "whole", 30.0)
    assert free[0] == penalised[0] == {8}
    assert sum(map(min, penalised)) < sum(map(min, free))
    assert 4 in penalised[-1]

    settings = (*base, f"strategy_options={options % 30.0}")
    for rounds in (2, 4):
        interrupted(spec_path, tmp_path / "parts", *settings, after=rounds)
    run(spec_path, tmp_path / "parts", *settings)
    assert_same(tmp_path / "whole", tmp_path / "parts")
