from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from broker_server.run_folder import (
    RunFolder,
    list_files,
    metrics_lines,
    summary,
    write_file,
)
from tests.support.run_reports import report


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_round_0_stands_before_the_rounds_and_time_adds_up() -> None:
    lines = metrics_lines(report(0.6, 0.8))
    assert [line["round"] for line in lines] == [0, 1, 2]
    assert [line["accuracy"] for line in lines] == [0.5, 0.6, 0.8]
    assert [line["elapsed_s"] for line in lines] == [0.0, 10.0, 20.0]
    assert (lines[1]["devices"], lines[1]["updates"]) == (3, 2)


def test_the_summary_tells_accuracy_time_traffic_and_waiting() -> None:
    said = summary(report(0.9, 0.8))
    assert (said["accuracy_before"], said["accuracy"], said["accuracy_best"]) == (0.5, 0.8, 0.9)
    assert (said["duration_s"], said["waiting_s"]) == (20.0, 3.0)
    assert (said["bytes_up"], said["bytes_down"]) == (600, 1200)
    # Per round: 10 s of work and 6 s of waiting by the two devices that finished.
    assert said["waiting_share"] == pytest.approx(6 / 16)
    assert said["devices"] == 3


def test_a_run_without_rounds_has_a_summary_without_figures() -> None:
    said = summary(replace(report(), baseline=None))
    assert (said["accuracy"], said["waiting_s"], said["rounds_done"]) == (None, None, 0)


def test_writing_again_leaves_no_double_line(tmp_path: Path) -> None:
    for accuracies in ((0.6,), (0.6, 0.7), (0.6, 0.7)):
        RunFolder(tmp_path).add(report(*accuracies))
    assert [line["round"] for line in lines_of(tmp_path / "metrics.jsonl")] == [0, 1, 2]
    assert len(lines_of(tmp_path / "assignments.jsonl")) == 6


def test_rounds_added_one_by_one_give_the_same_files_as_all_at_once(tmp_path: Path) -> None:
    whole = report(0.6, 0.8, 0.7)
    at_once, one_by_one = RunFolder(tmp_path / "at once"), RunFolder(tmp_path / "one by one")
    at_once.add(whole)
    one_by_one.add(replace(whole, rounds=()))
    for result in whole.rounds:
        one_by_one.add(replace(whole, rounds=(result,)))
    for name in list_files(at_once.root):
        assert (one_by_one.root / name).read_bytes() == (at_once.root / name).read_bytes()
    assert len(list_files(at_once.root)) == 3


def test_a_failed_assignment_keeps_its_reason(tmp_path: Path) -> None:
    RunFolder(tmp_path).add(report(0.6))
    broken = lines_of(tmp_path / "assignments.jsonl")[2]
    assert (broken["device_id"], broken["round"], broken["ranks"]) == ("broken", 1, [0, 8, 8])
    assert (broken["status"], broken["detail"]) == ("failed", "out of memory")


def test_files_that_are_being_written_are_not_listed(tmp_path: Path) -> None:
    RunFolder(tmp_path).add(report(0.6))
    (tmp_path / ".summary.json.x1").write_text("half")
    (tmp_path / ".adapter.x2").mkdir()
    (tmp_path / ".adapter.x2" / "README.md").write_text("half")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "README.md").write_text("whole")
    assert list_files(tmp_path) == [
        "adapter/README.md",
        "assignments.jsonl",
        "metrics.jsonl",
        "summary.json",
    ]
    assert list_files(tmp_path / "absent") == []


def test_a_write_that_fails_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "summary.json"
    write_file(target, b"old")
    with pytest.raises(TypeError):
        write_file(target, "not bytes")  # type: ignore[arg-type]
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
