"""Codecs: what is paired with what, and a small run of the benchmark."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.train


def a_run(codec: str, seed: int, accuracy: float, bytes_up: int) -> dict[str, Any]:
    return {
        "codec": codec,
        "seed": seed,
        "accuracy": accuracy,
        "untrained": 0.5,
        "bytes_up": bytes_up,
        "virtual_s": 10.0,
    }


SPEEDS = [{"codec": "fp32"}, {"codec": "int8"}]


def test_a_codec_is_compared_with_float32_of_the_same_seed() -> None:
    from benchmarks.codec import summary  # noqa: PLC0415 - imports torch

    runs = [
        a_run("fp32", 0, 0.80, 1000),
        a_run("fp32", 1, 0.90, 2000),
        a_run("int8", 1, 0.89, 500),
        a_run("int8", 0, 0.82, 250),
    ]
    found = summary(SPEEDS, runs)
    assert found["bytes_ratio_int8"] == pytest.approx(0.25)
    assert found["accuracy_deltas_int8"] == pytest.approx([-1.0, 2.0])
    assert found["accuracy_delta_int8"] == pytest.approx(0.5)


def test_where_float32_learned_nothing_no_difference_is_claimed() -> None:
    from benchmarks.codec import summary  # noqa: PLC0415 - imports torch

    found = summary(SPEEDS, [a_run("fp32", 0, 0.52, 1000), a_run("int8", 0, 0.7, 250)])
    assert found["learned"] is False
    assert found["accuracy_delta_int8"] is None


def test_coarser_codecs_write_fewer_bytes() -> None:
    from benchmarks.codec import speed_rows  # noqa: PLC0415 - imports torch
    from wire_protocol.lora import Codec  # noqa: PLC0415

    rows = speed_rows([Codec.FP32, Codec.INT8, Codec.INT4], repeats=1)
    ratios = [row["random_bytes_ratio"] for row in rows]
    assert ratios[0] == 1.0
    assert ratios[2] < ratios[1] < 0.3
    assert all(row["encode_mb_s"] > 0 and row["decode_mb_s"] > 0 for row in rows)


@pytest.mark.timeout(900)
def test_a_short_run_compares_codecs(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    subprocess.run(
        [
            sys.executable,
            "benchmarks/codec.py",
            *("--quick", "--rounds", "2", "--steps", "2", "--codecs", "int8"),
            *("--out", str(tmp_path / "runs"), "--json", str(target)),
        ],
        cwd=ROOT,
        check=True,
        timeout=800,
    )
    result = json.loads(target.read_text())
    assert [(row["part"], row["codec"]) for row in result["rows"]] == [
        ("speed", "fp32"),
        ("speed", "int8"),
        ("run", "fp32"),
        ("run", "int8"),
    ]
    # Small tensors: their names weigh more than in a real model.
    assert 0.2 < result["summary"]["bytes_ratio_int8"] < 0.4


def test_a_folder_without_the_files_is_named(tmp_path: Path) -> None:
    from benchmarks.codec import experiment_on  # noqa: PLC0415 - imports torch

    with pytest.raises(SystemExit, match=r"no train\.tsv"):
        experiment_on(tmp_path)
