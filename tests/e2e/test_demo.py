"""The main job over a production broker: four imitated boards, a real pretrained model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.train]


@pytest.mark.timeout(600)
@pytest.mark.skipif(
    not (shutil.which("mosquitto") or Path("/usr/sbin/mosquitto").exists()),
    reason="mosquitto is not installed (apt install mosquitto)",
)
def test_the_demo_over_mosquitto_trains_an_adapter_that_plain_peft_loads(tmp_path: Path) -> None:
    result_file = tmp_path / "result.json"
    command = [sys.executable, "-m", "broker_server.operator_cli", "demo"]
    done = subprocess.run(
        [
            *command,
            "--broker",
            "mosquitto",
            "--keep",
            str(tmp_path / "demo"),
            "--json",
            str(result_file),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    # The demo itself compares the accuracy of plain transformers and peft with the run's.
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads(result_file.read_text())
    assert len(result["rounds"]) >= 6
    assert result["accuracy_after"] >= result["accuracy_before"] + 0.2
    depths = {depth for device in result["devices"] for depth in device["depths"]}
    assert len(depths) >= 3
    assert len(result["devices"]) == 4
    assert all(round_["bytes_up"] > 0 and round_["bytes_down"] > 0 for round_ in result["rounds"])
    assert (Path(result["adapter_dir"]) / "adapter_config.json").exists()
