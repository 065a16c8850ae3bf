"""Connected devices: the figures, and a small run of the benchmark."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.brokers import require

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.e2e, pytest.mark.train]


def a_row(devices: int, server_mb: float) -> dict[str, Any]:
    return {
        "devices": devices,
        "server_mb": server_mb,
        "broker_mb": 10.0,
        "server_cpu_share": 0.02,
        "heartbeats_per_s": devices / 10,
        "lost": 0,
        "load": 1.0,
    }


def test_memory_of_a_device_is_the_slope_and_not_the_servers_own() -> None:
    from benchmarks.connections import summary  # noqa: PLC0415 - imports torch

    found = summary([a_row(100, 111.0), a_row(1100, 121.0)])
    assert found["server_kb_per_device"] == pytest.approx(10.0)
    assert found["broker_kb_per_device"] == pytest.approx(0.0, abs=1e-9)
    assert found["server_cpu_ms_per_heartbeat"] == pytest.approx(1000 * 0.02 / 110)


def test_one_size_of_fleet_has_no_slope() -> None:
    from benchmarks.connections import summary  # noqa: PLC0415 - imports torch

    assert summary([a_row(100, 111.0)])["server_kb_per_device"] is None


@pytest.mark.timeout(600)
def test_devices_stay_connected_while_they_are_counted(tmp_path: Path) -> None:
    require("mosquitto")
    target = tmp_path / "result.json"
    subprocess.run(
        [
            sys.executable,
            "benchmarks/connections.py",
            *("--devices", "5,20", "--heartbeat-s", "1", "--seconds", "2"),
            *("--json", str(target)),
        ],
        cwd=ROOT,
        check=True,
        timeout=500,
    )
    result = json.loads(target.read_text())
    assert [row["devices"] for row in result["rows"]] == [5, 20]
    assert result["summary"]["devices_lost"] == 0
    assert all(row["server_mb"] > 30 and row["broker_mb"] > 1 for row in result["rows"])
