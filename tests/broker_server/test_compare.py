"""Comparisons of runs that never happened: targets, censoring, pairs, intervals."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from broker_server.compare import SimulatedRun, compare_runs, cost_to, read_run
from broker_server.compare_table import comparison_tables
from broker_server.run_spec import DEFAULTS
from wire_protocol.errors import ConfigError


def write_run(
    folder: Path,
    method: str,
    accuracies: Sequence[float],
    *,
    seed: int = 0,
    round_s: float = 10.0,
    alpha: float = 1.0,
    settings: Mapping[str, object] | None = None,
) -> Path:
    """A run with equal rounds: 100 bytes up and 200 down each, a quarter of the time waiting."""
    folder.mkdir(parents=True)
    experiment = {"strategy": method, "method": None, "seed": seed, "partition": {"alpha": alpha}}
    config = {**experiment, **(settings or {})}
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    lines = [
        {
            "round": number,
            "accuracy": accuracy,
            "elapsed_s": number * round_s,
            **({"bytes_up": 100, "bytes_down": 200, "waiting_s": round_s / 4} if number else {}),
        }
        for number, accuracy in enumerate(accuracies)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder


def runs_of(root: Path, *, seeds: int = 1) -> list[SimulatedRun]:
    """LEGEND and FedLoRA, the latter with rounds twice, three times, ... as long."""
    found = []
    for seed in range(seeds):
        ours = write_run(root / f"l{seed}", "legend", [0.1, 0.5, 0.8, 0.8, 0.8], seed=seed)
        factor = 2 + seed
        base = write_run(
            root / f"f{seed}",
            "fedlora",
            [0.1, 0.5, 0.8, 0.8, 0.8, 0.8, 0.8],
            seed=seed,
            round_s=10.0 * factor,
        )
        found += [read_run(ours), read_run(base)]
    return found


def test_the_target_is_the_best_baseline_s_last_five_and_not_ours(tmp_path: Path) -> None:
    runs = [
        read_run(write_run(tmp_path / "ours", "legend", [0.1, *[0.99] * 6])),
        read_run(write_run(tmp_path / "a", "fedlora", [0.1, 0.9, *[0.8] * 5])),
        read_run(write_run(tmp_path / "b", "hetlora", [0.1, 0.9, *[0.7] * 5])),
    ]
    comparison = compare_runs(runs, share=0.99)
    assert comparison.target_from == "fedlora"
    assert comparison.target == pytest.approx(0.99 * 0.8)
    assert set(comparison.speedups) == {"fedlora", "hetlora"}


def test_a_target_must_hold_for_two_evaluations(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", "legend", [0.1, 0.8, 0.6, 0.8, 0.8, 0.5]))
    cost = cost_to(run, 0.8)
    assert (cost.reached, cost.rounds, cost.time_s) == (True, 3, 30.0)
    assert (cost.bytes_up, cost.bytes_down, cost.bytes_total) == (300, 600, 900)
    last_only = read_run(write_run(tmp_path / "late", "legend", [0.1, 0.6, 0.8]))
    assert not cost_to(last_only, 0.8).reached


def test_a_method_that_never_gets_there_keeps_its_row_as_more_than_it_had(tmp_path: Path) -> None:
    runs = [
        read_run(write_run(tmp_path / "ours", "legend", [0.1, *[0.8] * 6])),
        read_run(write_run(tmp_path / "base", "fedlora", [0.1, *[0.8] * 6])),
        read_run(write_run(tmp_path / "poor", "hetlora", [0.1, *[0.3] * 6])),
    ]
    comparison = compare_runs(runs, share=0.99, baselines=["fedlora", "hetlora"])
    row = next(row for row in comparison.rows if row.method == "hetlora")
    assert (row.reached, row.time_s.value, row.time_s.censored) == (0, 60.0, True)
    assert comparison.speedups["hetlora"]["legend"].bound == "at least"
    assert comparison.speedups["fedlora"]["hetlora"].bound == "at most"
    console = Console(width=200, record=True, file=(tmp_path / "table").open("w"))
    console.print(comparison_tables(comparison))
    text = console.export_text()
    assert "> 60.0 s" in text
    assert ">= 6.00" in text


def test_speedups_are_paired_by_seed_and_get_an_interval_from_three_seeds_on(
    tmp_path: Path,
) -> None:
    one = compare_runs(runs_of(tmp_path / "one"), share=0.99)
    assert one.speedups["fedlora"]["legend"].value == pytest.approx(2.0)
    assert one.speedups["fedlora"]["legend"].interval is None
    assert one.savings["fedlora"]["legend"].value == pytest.approx(1.0)
    three = compare_runs(runs_of(tmp_path / "three", seeds=3), share=0.99)
    ratio = three.speedups["fedlora"]["legend"]
    assert ratio.value is not None
    assert ratio.value == pytest.approx((2 * 3 * 4) ** (1 / 3))
    assert ratio.seeds == 3
    assert ratio.interval is not None
    low, high = ratio.interval
    assert 2.0 <= low < ratio.value < high <= 4.0 + 1e-9


def test_when_neither_got_there_nothing_is_said(tmp_path: Path) -> None:
    runs = [
        read_run(write_run(tmp_path / "ours", "legend", [0.1, 0.3, 0.3])),
        read_run(write_run(tmp_path / "base", "fedlora", [0.1, 0.9, 0.1])),
    ]
    assert compare_runs(runs, share=1.5).speedups["fedlora"]["legend"].value is None


@pytest.mark.parametrize("key", DEFAULTS["legend"])
def test_what_a_strategy_brings_by_default_makes_no_other_experiment(
    tmp_path: Path, key: str
) -> None:
    ours = write_run(tmp_path / "a", "legend", [0.1, 0.8, 0.8], settings={key: "ours"})
    theirs = write_run(tmp_path / "b", "fedlora", [0.1, 0.8, 0.8], settings={key: "theirs"})

    assert compare_runs([read_run(ours), read_run(theirs)], share=0.99).rows


def test_different_experiments_and_twins_are_not_compared(tmp_path: Path) -> None:
    first = read_run(write_run(tmp_path / "a", "legend", [0.1, 0.5]))
    other = read_run(write_run(tmp_path / "b", "fedlora", [0.1, 0.5], alpha=0.1))
    with pytest.raises(ConfigError, match="differ in partition"):
        compare_runs([first, other], share=0.99)
    twin = read_run(write_run(tmp_path / "c", "legend", [0.1, 0.5]))
    with pytest.raises(ConfigError, match="both legend with seed 0"):
        compare_runs([first, twin], share=0.99)
    with pytest.raises(ConfigError, match="no run of baseline 'fedprox'"):
        compare_runs([first], share=0.99, baselines=["fedprox"])


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not the folder of a simulation"):
        read_run(tmp_path)
    with pytest.raises(ConfigError, match="no committed round"):
        read_run(write_run(tmp_path / "young", "legend", [0.1]))
