"""The round that trains nothing: what is counted, and a small run of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks._flwr import Work, rounds_that_ended
from benchmarks._measured import Measured, gaps
from benchmarks._trivial_trainer import CHANGE, trivial_update
from benchmarks.round_overhead import ratio, summary
from wire_protocol.lora import Codec
from wire_protocol.tensors import decode, encode

ROOT = Path(__file__).parents[2]


def a_row(system: str, **changes: Any) -> dict[str, Any]:
    figures = {"round_s": 1.0, "cpu_s": 0.5, "rss_megabytes": 100.0, "total_s": 9.0, "load": 1.0}
    case = {"clients": 4, "tensors": 1, "system": system}
    return {**case, **figures, "agent_idle_rss_mb": 58.0, **changes}


def test_ratios_are_of_the_runs_that_were_beside_each_other() -> None:
    rows = [
        a_row("ours", round_s=1.0),
        a_row("flwr", round_s=10.0),
        a_row("ours", round_s=6.0),
        a_row("flwr", round_s=20.0),
        a_row("ours", round_s=2.0),
        a_row("flwr", round_s=10.0),
    ]
    assert ratio(rows, "round_s", "ours", "flwr") == pytest.approx(0.2)


def test_without_a_peer_there_is_no_ratio_but_the_seconds_are_told() -> None:
    found = summary([a_row("ours", round_s=0.4, load=7.0)])
    assert found["ours_over_flwr_wall"] is None
    assert found["simulation_over_flwr_simulation_wall"] is None
    assert found["seconds_per_round"] == {"4 clients, 1 tensors": {"ours": 0.4}}
    assert found["highest_load"] == 7.0


def test_the_first_round_is_not_counted() -> None:
    measured = Measured(gaps([100.0, 101.0, 103.0]), 0.0, 0, 5.0)
    assert measured.round_s == [1.0, 2.0]
    assert measured.median_s == 1.5


def test_a_peers_round_counts_once_its_mean_is_there(tmp_path: Path) -> None:
    times = tmp_path / "times.jsonl"
    assert rounds_that_ended(times) == []
    lines = [{"what": what, "round": 1, "nodes": 4, "at": 1.0} for what in ("began", "ended")]
    times.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [line["what"] for line in rounds_that_ended(times)] == ["ended"]
    assert Work(4, 1, 8, 2).nodes == 4


def test_a_trivial_update_has_the_adapters_tensors_and_differs_every_time() -> None:
    adapter = {"head.weight": np.ones((3, 4), np.float32), "head.bias": np.ones(3, np.float32)}
    first, second = (trivial_update(encode(adapter, Codec.FP32), name) for name in ("a", "b"))
    assert first != second
    learned = decode(first)
    assert {name: tensor.shape for name, tensor in learned.items()} == {
        "head.weight": (3, 4),
        "head.bias": (3,),
    }
    assert 0 < learned["head.bias"][0] <= 2 * CHANGE


@pytest.mark.e2e
@pytest.mark.train
@pytest.mark.timeout(900)
def test_our_side_runs_deployed_and_simulated(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    subprocess.run(
        [
            sys.executable,
            "benchmarks/round_overhead.py",
            *("--clients", "2", "--tensors", "32", "--rounds", "2", "--pairs", "1"),
            *("--broker", "embedded", "--skip-peer", "--json", str(target)),
        ],
        cwd=ROOT,
        check=True,
        timeout=800,
    )
    result = json.loads(target.read_text())
    deployed, simulated = result["rows"]
    assert (deployed["system"], simulated["system"]) == ("ours", "ours, simulated")
    assert (deployed["rounds"], simulated["rounds"]) == (2, 2)
    assert deployed["sent_tensors"] == 34
    assert deployed["sent_megabytes"] == pytest.approx(2.1, abs=0.1)
    assert deployed["cpu_s"] > 0
    assert 20 < result["summary"]["agent_idle_rss_mb"] < 120
