from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from broker_server.demo_fleet import (
    DemoFolder,
    agent_command,
    read_fleet,
    server_command,
    write_data,
    write_run_file,
)
from broker_server.demo_report import result_of, show_summary
from broker_server.run_spec import load_run_spec, read_held_out
from broker_server.settings import load_settings
from tests.support.run_json import member_json, round_json, run_json
from wire_protocol.errors import ConfigError

ROUNDS = [
    round_json(1, member_json("pi5"), member_json("nano", depth=2), accuracy=0.5),
    round_json(2, member_json("pi5", depth=5), accuracy=0.75),
]


def test_the_result_has_the_keys_that_programs_rely_on() -> None:
    run = run_json(rounds=ROUNDS, accuracy_before=0.125)
    boards = {"pi5": "rpi-5-8", "nano": "jetson-nano"}

    result = result_of(run, boards, Path("out/adapter"), wall_s=60.5).to_json()

    assert json.loads(json.dumps(result)) == {
        "accuracy_before": 0.125,
        "accuracy_after": 0.75,
        "rounds": [
            {
                "round": number,
                "accuracy": accuracy,
                "duration_s": 15.0,
                "waiting_s": 3.0,
                "bytes_up": 120_000,
                "bytes_down": 2_400_000,
            }
            for number, accuracy in ((1, 0.5), (2, 0.75))
        ],
        "devices": [
            {"device_id": "pi5", "board": "rpi-5-8", "depths": [4, 5]},
            {"device_id": "nano", "board": "jetson-nano", "depths": [2, 0]},
        ],
        "adapter_dir": "out/adapter",
        "wall_s": 60.5,
    }


def test_the_summary_says_how_good_how_much_and_where() -> None:
    run = run_json(rounds=ROUNDS)
    result = result_of(run, {"pi5": "rpi-5-8"}, Path("out/adapter"), wall_s=60.5)
    output = io.StringIO()

    show_summary(Console(file=output, width=80), run, result, model_dir=Path("base"))

    text = output.getvalue()
    assert "12.5 % before training, 75.0 % after 2 rounds" in text
    assert "240.0 kB up, 4.8 MB down" in text
    assert "from_pretrained('base', num_labels=2)" in text
    assert "PeftModel.from_pretrained(base, 'out/adapter')" in text


def test_what_the_demonstration_writes_is_what_the_programs_read(tmp_path: Path) -> None:
    folder, fleet = DemoFolder(tmp_path), read_fleet("demo4")
    write_data(folder, list(fleet.devices))
    write_run_file(folder, rounds=3)

    server = load_settings(Path(server_command(folder, "mosquitto")[-1]))
    spec = load_run_spec(folder.run_file)

    assert (server.broker.kind, server.port, server.fleet) == ("mosquitto", 0, "demo")
    assert spec.rounds == 3
    assert len(read_held_out(spec.evaluation).labels) == 8


def test_every_agent_imitates_its_own_board_and_reads_its_own_data(tmp_path: Path) -> None:
    folder, fleet = DemoFolder(tmp_path), read_fleet("demo4")
    seen = set()
    for device_id, group in fleet.devices.items():
        command = agent_command(folder, fleet, device_id, url="http://127.0.0.1:1")
        settings = yaml.safe_load(Path(command[command.index("--settings") + 1]).read_text())
        assert settings["device_id"] == device_id
        assert settings["emulate"]["board"] == group.board
        assert settings["emulate"]["time_dilation"] == fleet.time_dilation
        seen.add((settings["state_dir"], settings["datasets"]["triage"]["path"]))
    assert len(seen) == len(fleet.devices)


def test_a_fleet_that_does_not_exist_is_named() -> None:
    with pytest.raises(ConfigError, match="demo44"):
        read_fleet("demo44")
