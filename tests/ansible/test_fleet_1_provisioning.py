"""The playbooks against real hosts: systemd, ssh, apt, mosquitto with mutual TLS, the agent."""

from __future__ import annotations

import json

import pytest

from tests.ansible.fleet import BOARDS, DEVICES, GIB, HOSTS, IDENTITY, PI, TOKEN, Fleet

pytestmark = [pytest.mark.ansible, pytest.mark.timeout(3600)]

CHANGED_NOTHING = {host.name: 0 for host in HOSTS}


def test_the_devices_of_a_new_fleet_introduce_themselves(fleet: Fleet) -> None:
    devices = fleet.devices()
    assert {name: row["board"] for name, row in devices.items()} == BOARDS
    assert {row["state"] for row in devices.values()} == {"online"}
    budgets = {name: row["capability"]["memory_budget_bytes"] for name, row in devices.items()}
    assert budgets["pi"] < budgets["pi5"] < budgets["orin"]
    assert all(row["datasets"]["triage"]["examples"] == 400 for row in devices.values())


def test_no_key_is_where_it_need_not_be(fleet: Fleet) -> None:
    on_server = fleet.lab.execute("server", "ls", "/var/lib/broker-server/pki").split()
    assert {"server.key", "broker.key", "crl.pem", "server-signing.json"} <= set(on_server)
    assert not {"ca.key", "operator.key"} & set(on_server)
    for device in DEVICES:
        key = fleet.lab.execute(device.name, "stat", "-c", "%U %a", f"{IDENTITY}/device.key")
        assert key == "edge-agent 600"
    assert TOKEN not in fleet.lab.execute("pi", "cat", "/etc/edge-agent/settings.yml")
    for port in (8300, 8883):
        assert "BEGIN CERTIFICATE" in fleet.presented(port)


def test_boards_are_prepared_and_limits_are_those_of_the_board(fleet: Fleet) -> None:
    words = fleet.lab.execute("pi", "cat", "/boot/firmware/cmdline.txt").split()
    assert words.count("cgroup_enable=memory") == 1
    status = fleet.lab.execute("orin", "cat", "/opt/fake-board/var/lib/nvpmodel/status")
    assert status.startswith("pmode:0001")
    group = "/sys/fs/cgroup/memory/system.slice/edge-agent.service/memory.limit_in_bytes"
    # 70 % of the cgroup that stands for the board, and not of this machine's memory.
    limit = int(fleet.lab.execute("pi", "cat", group))
    assert limit == pytest.approx(0.7 * PI.memory_bytes, rel=0.01)
    assert limit < 2 * GIB
    assert fleet.lab.execute("server", "systemctl", "is-enabled", "mosquitto") == "disabled"


def test_a_second_run_changes_nothing_and_neither_does_check_mode(fleet: Fleet) -> None:
    for arguments in ((), ("--check", "--diff")):
        figures = fleet.play("site.yml", *arguments)
        assert {host: row["changed"] for host, row in figures.items()} == CHANGED_NOTHING


def test_the_fleet_says_how_it_is(fleet: Fleet) -> None:
    assert {row["changed"] for row in fleet.play("status.yml").values()} == {0}


def test_logs_and_findings_are_fetched(fleet: Fleet) -> None:
    logs = fleet.authority.parent / "logs"
    fleet.play("collect_logs.yml", "-e", f"collect_logs_to={logs}")
    for device in DEVICES:
        assert json.loads((logs / device.name / "doctor.json").read_text(encoding="utf-8"))
    assert "server_ready" in (logs / "server" / "broker-server.log").read_text(encoding="utf-8")


def test_a_power_mode_is_chosen_by_name(fleet: Fleet) -> None:
    fleet.play("power_mode.yml", "--limit", "orin", "-e", "jetson_power_mode=MAXN")
    status = fleet.lab.execute("orin", "cat", "/opt/fake-board/var/lib/nvpmodel/status")
    assert status.startswith("pmode:0000")
    fleet.wait_until_state("orin", "online")
