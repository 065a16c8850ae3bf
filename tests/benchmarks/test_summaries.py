"""The figures that claims quote have the names under which programs look for them."""

from __future__ import annotations

import pytest

from benchmarks import aggregate, train_step


def test_aggregation_tells_its_ratio_and_how_memory_grows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(aggregate, "RANKS", (2,) * 24)

    result = aggregate.measure([2, 12], repeats=1)

    assert [row["updates"] for row in result["rows"]] == [2, 12]
    assert result["summary"]["ratio_to_numpy_mean"] == result["rows"][-1]["ratio"]
    # Far below the 760 kB of an update.
    assert result["summary"]["rss_growth_bytes_per_update"] < 400_000


def test_a_training_step_tells_its_ratios_by_depth() -> None:
    rows = [
        {"depth": 6, "warm_speedup": 1.0, "share_of_limit": 1.0, "memory_ratio": 1.0},
        {"depth": 2, "warm_speedup": 1.8, "share_of_limit": 0.9, "memory_ratio": 0.7},
    ]

    assert train_step.summary(rows) == {
        "tokens_per_s_ratio": {"6": 1.0, "2": 1.8},
        "share_of_limit": {"6": 1.0, "2": 0.9},
        "peak_memory_ratio": {"6": 1.0, "2": 0.7},
    }
