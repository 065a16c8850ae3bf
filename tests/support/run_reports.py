"""Reports of runs that never happened, for the result folder and the pictures."""

from __future__ import annotations

from broker_server.run_folder import Baseline, RunReport
from broker_server.run_state import MemberResult, RoundResult


def member(
    device_id: str, *, depth: int, completion_s: float | None, waiting_s: float
) -> MemberResult:
    """One device's part in a round of a three-layer model; None means that it failed."""
    done = completion_s is not None
    return MemberResult(
        device_id=device_id,
        depth=depth,
        ranks=(0,) * (3 - depth) + (8,) * depth,
        steps=10,
        predicted_s=5.0,
        completion_s=completion_s,
        waiting_s=waiting_s if done else None,
        loss=0.5 if done else None,
        bytes_up=100,
        bytes_down=200,
        status="updated" if done else "failed",
        detail="" if done else "out of memory",
    )


def round_result(number: int, accuracy: float) -> RoundResult:
    """A round in which ``slow`` took 8 s, ``fast`` 2 s, and ``broken`` failed."""
    devices = (
        member("slow", depth=1, completion_s=8.0, waiting_s=0.0),
        member("fast", depth=3, completion_s=2.0, waiting_s=6.0),
        member("broken", depth=2, completion_s=None, waiting_s=0.0),
    )
    return RoundResult(
        round=number,
        accuracy=accuracy,
        loss=1.0 - accuracy,
        duration_s=10.0,
        waiting_s=3.0,
        bytes_up=300,
        bytes_down=600,
        devices=devices,
    )


def report(*accuracies: float, baseline: Baseline | None = None) -> RunReport:
    """A running run with one committed round per accuracy."""
    rounds = tuple(round_result(n, accuracy) for n, accuracy in enumerate(accuracies, start=1))
    return RunReport(
        run_id="run-1",
        name="cost $5 & $6",
        strategy="legend",
        base_model="tiny",
        task="classification",
        labels=("bad", "gut ä"),
        status="running",
        reason="",
        rounds_planned=4,
        baseline=baseline or Baseline(0.5, 0.7),
        rounds=rounds,
    )
