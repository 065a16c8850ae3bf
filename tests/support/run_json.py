"""Answers of ``GET /v1/runs/{id}`` at some moments of a run."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]


def run_json(**changes: Any) -> Json:
    """A run of two rounds that has just begun, with changes."""
    run: Json = {
        "run_id": "run-1",
        "name": "triage",
        "strategy": "legend",
        "status": "running",
        "reason": "",
        "spec": {"labels": ["disk", "power"], "model": "tiny"},
        "round_number": 1,
        "rounds_total": 2,
        "accuracy_before": 0.125,
        "loss_before": 2.1,
        "rounds": [],
        "live": [],
    }
    return {**run, **changes}


def live_json(device_id: str, **changes: Any) -> Json:
    """One device in the middle of its training, with changes."""
    live: Json = {
        "device_id": device_id,
        "board": "rpi-5-8",
        "state": "training",
        "depth": 4,
        "ranks": [0, 0, 4, 4, 8, 8],
        "step": 3,
        "steps": 10,
        "loss": 1.5,
        "elapsed_s": 6.25,
        "completion_s": None,
        "waiting_s": None,
        "detail": "",
    }
    return {**live, **changes}


def member_json(device_id: str, **changes: Any) -> Json:
    """One device's part in a finished round, with changes."""
    member: Json = {
        "device_id": device_id,
        "depth": 4,
        "ranks": [0, 0, 4, 4, 8, 8],
        "steps": 10,
        "completion_s": 12.0,
        "waiting_s": 3.0,
        "loss": 0.9,
        "status": "updated",
        "detail": "",
    }
    return {**member, **changes}


def round_json(number: int, *devices: Json, accuracy: float = 0.5) -> Json:
    """One finished round."""
    return {
        "round": number,
        "accuracy": accuracy,
        "loss": 1.0,
        "duration_s": 15.0,
        "waiting_s": 3.0,
        "bytes_up": 120_000,
        "bytes_down": 2_400_000,
        "devices": list(devices),
    }
