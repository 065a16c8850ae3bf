from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from broker_server.plots import depth_table, mean_times, write_plots
from tests.support.run_reports import member, report, round_result

pytest.importorskip("matplotlib")


def pixels(path: Path) -> Any:
    from matplotlib import image  # noqa: PLC0415 - after the check that it is installed

    return image.imread(io.BytesIO(path.read_bytes()), format="png")


def colours(path: Path) -> set[tuple[int, ...]]:
    rgb = (pixels(path)[:, :, :3] * 255).round().astype(int).reshape(-1, 3)
    return {tuple(int(part) for part in row) for row in np.unique(rgb, axis=0)}


def test_depths_stand_where_a_device_sent_an_update() -> None:
    table = depth_table([round_result(1, 0.6), round_result(2, 0.7)], ["slow", "fast", "broken"])
    assert table[:2].tolist() == [[1, 1], [3, 3]]
    assert np.isnan(table[2]).all()


def test_times_are_means_over_the_updates_of_a_device() -> None:
    first = round_result(1, 0.6)
    longer = member("slow", depth=1, completion_s=12.0, waiting_s=1.0)
    second = first.model_copy(update={"round": 2, "devices": (longer,)})
    times = mean_times([first, second])
    assert times["slow"] == (10.0, 0.5)
    assert times["fast"] == (2.0, 6.0)
    assert "broken" not in times


def test_a_run_gets_both_pictures_with_curves_and_bars(tmp_path: Path) -> None:
    write_plots(tmp_path, report(0.6, 0.8))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["accuracy.png", "devices.png"]
    blue, orange = (31, 95, 168), (224, 138, 30)
    assert blue in colours(tmp_path / "accuracy.png")
    assert {blue, orange} <= colours(tmp_path / "devices.png")


def test_before_the_first_round_there_is_only_accuracy(tmp_path: Path) -> None:
    write_plots(tmp_path, report())
    assert [path.name for path in tmp_path.iterdir()] == ["accuracy.png"]


def test_nothing_is_drawn_of_a_run_that_was_never_evaluated(tmp_path: Path) -> None:
    write_plots(tmp_path, replace(report(), baseline=None))
    assert list(tmp_path.iterdir()) == []


def test_a_round_in_which_every_device_failed_can_be_drawn(tmp_path: Path) -> None:
    broken = member("broken", depth=2, completion_s=None, waiting_s=0.0)
    failed = round_result(1, 0.6).model_copy(update={"devices": (broken,)})
    write_plots(tmp_path, replace(report(), rounds=(failed,)))
    assert pixels(tmp_path / "devices.png").shape[0] > 300


def test_a_large_fleet_fits_in_one_picture(tmp_path: Path) -> None:
    devices = tuple(
        member(f"pi-{n}", depth=1 + n % 3, completion_s=float(n + 1), waiting_s=1.0)
        for n in range(200)
    )
    crowded = round_result(1, 0.6).model_copy(update={"devices": devices})
    write_plots(tmp_path, replace(report(), rounds=(crowded,)))
    assert pixels(tmp_path / "devices.png").shape[0] < 4000
