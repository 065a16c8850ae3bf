"""The playbooks against real hosts: systemd, ssh, apt, mosquitto with mutual TLS, the agent itself.

Takes about ten minutes and the network (Debian's mirror, and the package index on this machine).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ansible.lab import Host, Lab, what_is_missing

pytestmark = [pytest.mark.ansible, pytest.mark.timeout(3600)]

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
TOKEN = "secret-of-the-lab"
L4T = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64"
SERVER = Host("server", 2 * GIB)
PI = Host("pi", 2 * GIB, "Raspberry Pi 4 Model B Rev 1.4")
ORIN = Host("orin", 4 * GIB, "NVIDIA Jetson Orin Nano Developer Kit", L4T)
IDENTITY = "/var/lib/edge-agent/identity"
TRACES = (
    "find / -xdev ( -iname *edge-agent* -o -iname *broker-server* -o -iname *legend* "
    "-o -name mosquitto ) -not -path /proc/* -not -path /tmp/* -not -path /var/log/journal/*"
)


class Fleet:
    """The lab, and what the tests do with it."""

    def __init__(self, lab: Lab, inventory: Path) -> None:
        self.lab = lab
        self._inventory = inventory

    def play(self, playbook: str, *arguments: str) -> dict[str, dict[str, int]]:
        """Run a playbook; the figures of its recap by host."""
        command = ["ansible-playbook", "-i", str(self._inventory), f"playbooks/{playbook}"]
        environment = {**os.environ, "ANSIBLE_NOCOLOR": "1"}
        answer = subprocess.run(
            [*command, *arguments],
            cwd=ROOT / "ansible",
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert answer.returncode == 0, answer.stdout[-6000:] + answer.stderr
        recap = answer.stdout.rpartition("PLAY RECAP")[2]
        return {
            host: {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", figures)}
            for host, figures in re.findall(r"^(\w+) +: (.*)$", recap, re.MULTILINE)
        }

    def devices(self) -> dict[str, dict[str, Any]]:
        """The fleet as the server sees it."""
        address = f"https://{self.lab.address('server')}:8300/v1/devices"
        request = urllib.request.Request(address, headers={"Authorization": f"Bearer {TOKEN}"})
        trust = ssl.create_default_context(cafile=str(self.authority / "ca.pem"))
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trust)
        )
        with opener.open(request) as answer:
            return {row["device_id"]: row for row in json.load(answer)["devices"]}

    @property
    def authority(self) -> Path:
        """Where the authority's key is."""
        return self._inventory.parent / "pki"

    def presented(self, port: int) -> str:
        """The certificate that a port of the server shows."""
        return ssl.get_server_certificate((self.lab.address("server"), port))

    def serial(self, name: str) -> str:
        """Of the certificate that a device has."""
        certificate = f"{IDENTITY}/device.pem"
        return self.lab.execute(name, "openssl", "x509", "-in", certificate, "-noout", "-serial")

    def wait_until_state(self, name: str, state: str) -> None:
        """Wait until the server sees a device in this state."""
        give_up_at = time.monotonic() + 180
        while (seen := self.devices()[name]["state"]) != state:
            assert time.monotonic() < give_up_at, f"{name} is {seen} and not {state}"
            time.sleep(1)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The package's wheel, and a wheelhouse for Python 3.11 without training."""
    dist, house = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("wheelhouse")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", dist, str(ROOT)], check=True)
    wheel = next(dist.glob("*.whl"))
    options = ["--only-binary", ":all:", "--python-version", "3.11", "--dest", str(house)]
    subprocess.run([*pip, "download", *options, f"{wheel}[server]"], check=True)
    return dist, house


@pytest.fixture(scope="module")
def fleet(wheels: tuple[Path, Path]) -> Iterator[Fleet]:
    """One server and two devices that differ in board and memory; nothing is on them yet."""
    if missing := what_is_missing():
        pytest.skip(missing)
    if shutil.which("ansible-playbook") is None:
        pytest.skip("ansible-playbook is not installed: pip install ansible-core")
    default = Path.home() / ".cache" / "legend-edge-lab"
    lab = Lab(Path(os.environ.get("LEGEND_LAB_DIR", default)))
    try:
        lab.start([SERVER, PI, ORIN])
        yield Fleet(lab, lab.write_inventory(_inventory(lab, *wheels)))
    finally:
        lab.stop()


def _inventory(lab: Lab, dist: Path, house: Path) -> dict[str, object]:
    version = next(dist.glob("*.whl")).name.split("-")[1]
    server: dict[str, object] = {
        "broker_server_host": lab.address("server"),
        "broker_server_fleet": "lab",
        "broker_server_extras": ["server"],
    }
    device: dict[str, object] = {
        "base_sysroot": "/opt/fake-board",
        "edge_agent_extras": [],
        "edge_agent_fleet": "lab",
        "edge_agent_training": {"window": "00:00-23:59", "temperature_max_c": 90},
        "edge_agent_server": f"https://{lab.address('server')}:8300",
    }
    content = lab.inventory(
        {
            "server": {"server": server},
            "devices": {"pi": device, "orin": {**device, "jetson_power_mode": "15W"}},
        }
    )
    shared: dict[str, object] = {"base_time_sync": "none"}
    shared["broker_server_token"] = TOKEN
    for role in ("edge_agent", "broker_server"):
        shared |= {
            f"{role}_version": version,
            f"{role}_wheel_dir": str(dist),
            f"{role}_wheelhouse": str(house),
        }
    everywhere = content["all"]
    assert isinstance(everywhere, dict)
    everywhere["vars"].update(shared)
    return content


def test_a_fleet_comes_up_stays_as_it_is_and_goes_without_a_trace(fleet: Fleet) -> None:
    before = {host.name: _traces(fleet, host) for host in (SERVER, PI, ORIN)}
    fleet.play("site.yml", "--check", "--diff")
    assert {host.name: _traces(fleet, host) for host in (SERVER, PI, ORIN)} == before
    assert not fleet.authority.exists()

    fleet.play("site.yml")
    _check_the_fleet(fleet)
    _check_the_keys(fleet)

    assert {host: row["changed"] for host, row in fleet.play("site.yml").items()} == {
        "server": 0,
        "pi": 0,
        "orin": 0,
    }
    again = fleet.play("site.yml", "--check", "--diff")
    assert sum(row["changed"] for row in again.values()) == 0

    _check_the_other_playbooks(fleet)
    _check_that_certificates_are_renewed(fleet)
    _check_that_a_device_can_be_thrown_out_and_let_in_again(fleet)

    fleet.play("reset.yml", "-e", "reset_confirm=yes")
    assert {host.name: _traces(fleet, host) for host in (SERVER, PI, ORIN)} == before
    assert "cgroup_enable" not in fleet.lab.execute("pi", "cat", "/boot/firmware/cmdline.txt")
    assert fleet.lab.execute("pi", "id", "edge-agent").endswith("no such user")


def _check_the_keys(fleet: Fleet) -> None:
    on_server = fleet.lab.execute("server", "ls", "/var/lib/broker-server/pki").split()
    assert {"server.key", "broker.key", "crl.pem", "server-signing.json"} <= set(on_server)
    assert not {"ca.key", "operator.key"} & set(on_server)
    key = fleet.lab.execute("pi", "stat", "-c", "%U %a", f"{IDENTITY}/device.key")
    assert key == "edge-agent 600"
    assert TOKEN not in fleet.lab.execute("pi", "cat", "/etc/edge-agent/settings.yml")
    for port in (8300, 8883):
        assert "BEGIN CERTIFICATE" in fleet.presented(port)


def _check_the_other_playbooks(fleet: Fleet) -> None:
    logs = fleet.authority.parent / "logs"
    fleet.play("collect_logs.yml", "-e", f"collect_logs_to={logs}")
    doctor = json.loads((logs / "pi" / "doctor.json").read_text(encoding="utf-8"))
    assert doctor
    assert "server_ready" in (logs / "server" / "broker-server.log").read_text(encoding="utf-8")
    _check_the_way_back(fleet)
    fleet.play("power_mode.yml", "--limit", "orin", "-e", "jetson_power_mode=MAXN")
    status = fleet.lab.execute("orin", "cat", "/opt/fake-board/var/lib/nvpmodel/status")
    assert status.startswith("pmode:0000")
    fleet.wait_until_state("orin", "online")


def _check_the_way_back(fleet: Fleet) -> None:
    link = ("readlink", "/opt/edge-agent/current")
    release = fleet.lab.execute("orin", *link)
    # Another interpreter is another installation of the same version.
    fleet.play("site.yml", "--limit", "orin", "-e", "base_python=/usr/bin/python3.11")
    assert fleet.lab.execute("orin", *link).startswith(f"{release}+")
    version = release.removeprefix("releases/")
    back = fleet.play("rollback.yml", "--limit", "orin", "-e", f"rollback_version={version}")
    assert back["orin"]["changed"] > 0
    assert fleet.lab.execute("orin", *link) == release


def _check_that_certificates_are_renewed(fleet: Fleet) -> None:
    names = [host.name for host in (PI, ORIN)]
    before = {name: fleet.serial(name) for name in names}
    keys = {name: fleet.lab.execute(name, "sha256sum", f"{IDENTITY}/device.key") for name in names}
    shown = {port: fleet.presented(port) for port in (8300, 8883)}
    show = ("systemctl", "show", "-P", "MainPID", "broker-server")
    pid = fleet.lab.execute("server", *show)
    fleet.play("rotate.yml")
    for name in names:
        assert fleet.serial(name) != before[name]
        assert fleet.lab.execute(name, "sha256sum", f"{IDENTITY}/device.key") == keys[name]
        fleet.wait_until_state(name, "online")
    for port, certificate in shown.items():
        assert fleet.presented(port) != certificate
    # Not restarted: a round that runs goes on.
    assert fleet.lab.execute("server", *show) == pid


def _check_that_a_device_can_be_thrown_out_and_let_in_again(fleet: Fleet) -> None:
    key = fleet.lab.execute("orin", "sha256sum", f"{IDENTITY}/device.key")
    fleet.play("revoke.yml", "-e", "revoke_device=orin")
    fleet.wait_until_state("orin", "revoked")
    # The broker was restarted for it: the others come back, and this one does not.
    fleet.wait_until_state("pi", "online")
    assert fleet.devices()["orin"]["state"] == "revoked"
    with pytest.raises(AssertionError, match="orin was revoked"):
        fleet.play("site.yml", "--limit", "orin", "--tags", "identity")
    fleet.play("site.yml", "--limit", "orin", "-e", "device_identity_readmit=true")
    fleet.wait_until_state("orin", "online")
    assert fleet.lab.execute("orin", "sha256sum", f"{IDENTITY}/device.key") != key


def _traces(fleet: Fleet, host: Host) -> list[str]:
    return sorted(fleet.lab.execute(host.name, *TRACES.split()).splitlines())


def _check_the_fleet(fleet: Fleet) -> None:
    devices = fleet.devices()
    assert {name: (row["board"], row["state"]) for name, row in devices.items()} == {
        "pi": ("rpi-4b-2", "online"),
        "orin": ("jetson-orin-nano-4", "online"),
    }
    words = fleet.lab.execute("pi", "cat", "/boot/firmware/cmdline.txt").split()
    assert words.count("cgroup_enable=memory") == 1
    status = fleet.lab.execute("orin", "cat", "/opt/fake-board/var/lib/nvpmodel/status")
    assert status.startswith("pmode:0001")
    group = "/sys/fs/cgroup/memory/system.slice/edge-agent.service/memory.limit_in_bytes"
    # 70 % of the cgroup that stands for the board, and not of this machine's memory.
    assert int(fleet.lab.execute("pi", "cat", group)) == pytest.approx(0.7 * 2 * GIB, rel=0.01)
    assert fleet.lab.execute("server", "systemctl", "is-enabled", "mosquitto") == "disabled"
