"""A fleet in the lab, and what the tests do with it: playbooks, ``legend``, questions."""

from __future__ import annotations

import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from broker_server.demo_data import DemoDataOptions, as_tsv, generate
from tests.ansible.lab import CGROUPS, Host, Lab

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
TOKEN = "secret-of-the-lab"
L4T = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64"
SERVER = Host("server", 3 * GIB)
PI = Host("pi", 2 * GIB, 1.0, "Raspberry Pi 4 Model B Rev 1.4")
PI5 = Host("pi5", 4 * GIB, 1.0, "Raspberry Pi 5 Model B Rev 1.0")
ORIN = Host("orin", 8 * GIB, 0.0, "NVIDIA Jetson Orin Nano Developer Kit", L4T)
DEVICES = (PI, PI5, ORIN)
HOSTS = (SERVER, *DEVICES)
BOARDS = {"pi": "rpi-4b-2", "pi5": "rpi-5-4", "orin": "jetson-orin-nano-8"}
AUTHORITY = "/var/lib/broker-server/pki/ca.pem"
IDENTITY = "/var/lib/edge-agent/identity"
HELD_OUT = "/srv/held-out.tsv"
BASE_MODEL = "/srv/minilm"
DATASET = "/srv/data/logs.tsv"
COLUMNS = {"text": "line", "label": "label"}
OURS = "edge-agent|broker-server|legend|mosquitto"
TRACES = (
    "find / -xdev ( -iname *edge-agent* -o -iname *broker-server* -o -iname *legend* "
    "-o -name mosquitto ) -not -path /proc/* -not -path /tmp/* -not -path /var/log/journal/*"
)
TORCH = "torch==2.13.0"
PATIENCE_S = 600.0
PACKAGES = ("wire_protocol", "profiles", "edge_agent", "broker_server")
Json = dict[str, Any]


class Fleet:
    """The lab, and what the tests do with it."""

    def __init__(self, lab: Lab, inventory: Path) -> None:
        self.lab = lab
        self.inventory = inventory
        self.before: dict[str, list[str]] = {}

    def play(self, playbook: str, *arguments: str) -> dict[str, dict[str, int]]:
        """Run a playbook that must succeed; the figures of its recap by host."""
        answer = self.try_play(playbook, *arguments)
        assert answer.returncode == 0, answer.stdout[-6000:] + answer.stderr
        return recap(answer.stdout)

    def try_play(self, playbook: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a playbook that may fail."""
        command = ["ansible-playbook", "-i", str(self.inventory), f"playbooks/{playbook}"]
        environment = {**os.environ, "ANSIBLE_NOCOLOR": "1"}
        return subprocess.run(
            [*command, *arguments],
            cwd=ROOT / "ansible",
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def legend(self, *arguments: str) -> str:
        """Run the operator's command on the server; its output."""
        variables = {"LEGEND_SERVER": self.url, "LEGEND_TOKEN": TOKEN, "LEGEND_CA": AUTHORITY}
        words = [f"{key}={value}" for key, value in variables.items()]
        answer = self.lab.call("server", "env", *words, "legend", *arguments)
        assert answer.returncode == 0, answer.stdout + answer.stderr
        return answer.stdout

    def devices(self) -> dict[str, Json]:
        """The fleet as the server sees it."""
        rows = json.loads(self.legend("devices", "--json"))
        return {row["device_id"]: row for row in rows}

    def launch(self, **changes: Any) -> str:
        """Launch a run and leave it to itself; its id."""
        run = {
            "name": "triage",
            "model": "minilm",
            "dataset": "triage",
            "rounds": 2,
            "local_steps": 10,
            "batch_size": 8,
            "max_tokens": 48,
            "learning_rate": 3e-3,
            "head_learning_rate": 1e-2,
            "evaluation": {"path": HELD_OUT, **COLUMNS},
            # Nobody is left out of a round for being slow, and the slowest sets the pace.
            "strategy_options": {"pace": "slowest"},
            **changes,
        }
        file = self.lab.root("server") / "srv/run.yml"
        file.write_text(yaml.safe_dump(run), encoding="utf-8")
        return self.legend("launch", "--no-watch", "/srv/run.yml").strip()

    def run(self, run_id: str) -> Json:
        """What the server says about a run."""
        run: Json = json.loads(self.legend("show", run_id, "--json"))
        return run

    @property
    def url(self) -> str:
        """Where the server's API is."""
        return f"https://{self.lab.address('server')}:8300"

    @property
    def authority(self) -> Path:
        """Where the authority's key is."""
        return self.inventory.parent / "pki"

    def presented(self, port: int) -> str:
        """The certificate that a port of the server shows."""
        return ssl.get_server_certificate((self.lab.address("server"), port))

    def serial(self, name: str) -> str:
        """Of the certificate that a device has."""
        certificate = f"{IDENTITY}/device.pem"
        return self.lab.execute(name, "openssl", "x509", "-in", certificate, "-noout", "-serial")

    def status(self, name: str) -> Json:
        """What an agent says about itself."""
        status: Json = json.loads(self.lab.execute(name, "cat", "/var/lib/edge-agent/status.json"))
        return status

    def unit(self, name: str, key: str, unit: str = "edge-agent") -> str:
        """A property of a service."""
        return self.lab.execute(name, "systemctl", "show", "-P", key, unit)

    def memory_used(self, name: str) -> int:
        """Bytes that an agent and its trainer hold."""
        group = CGROUPS / "memory/legendlab" / name / "system.slice/edge-agent.service"
        return int((group / "memory.usage_in_bytes").read_text())

    def wait_until_state(self, name: str, state: str) -> None:
        """Wait until the server sees a device in this state."""
        self.until(lambda: self.devices()[name]["state"] == state, f"{name} is {state}")

    def wait_until_training(self, run_id: str, name: str, *, round_number: int = 1) -> None:
        """Wait until this device is in the middle of its local steps."""

        def training() -> bool:
            run = self.run(run_id)
            assert run["status"] in ("queued", "running"), run["reason"]
            return run["round_number"] >= round_number and any(
                line["device_id"] == name and line["state"] == "training" and line["step"] > 0
                for line in run["live"]
            )

        self.until(training, f"{name} trains in round {round_number}")

    def wait_for_end(self, run_id: str) -> Json:
        """Wait until the run has finished; returns it."""
        self.until(lambda: self.run(run_id)["status"] not in ("queued", "running"), "the run ends")
        run = self.run(run_id)
        assert run["status"] == "finished", run["reason"]
        return run

    def until(self, condition: Callable[[], object], what: str, *, fast: bool = False) -> None:
        """Poll; fails when it does not come true."""
        give_up_at = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < give_up_at, f"it did not happen that {what}"
            time.sleep(0.02 if fast else 0.5)


def traces(fleet: Fleet, name: str) -> list[str]:
    """What reset.yml must take away again: our files, and mosquitto's; users; open ports."""
    files = fleet.lab.execute(name, *TRACES.split()).splitlines()
    users = fleet.lab.execute(name, "cut", "-d:", "-f1", "/etc/passwd", "/etc/group").splitlines()
    units = fleet.lab.execute(name, "systemctl", "list-units", "--all", "--plain", "--no-legend")
    ours = [line.split()[0] for line in units.splitlines() if re.search(OURS, line)]
    ports = fleet.lab.execute(name, "ss", "-Hltn").splitlines()
    return sorted([*files, *users, *ours, *(line.split()[3] for line in ports)])


def recap(output: str) -> dict[str, dict[str, int]]:
    """The figures at the end of a playbook's output by host."""
    end = output.rpartition("PLAY RECAP")[2]
    return {
        host: {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", figures)}
        for host, figures in re.findall(r"^(\w+) +: (.*)$", end, re.MULTILINE)
    }


def write_inventory(lab: Lab, dist: Path, house: Path, *, training: bool) -> Path:
    """An inventory of these hosts.

    Args:
        dist: where the package's wheel is.
        house: wheelhouse of the server. Devices take their packages from the index that the lab
            offers them; the server does too in a fleet that trains, because copying takes longer.
        training: whether server and devices get PyTorch.
    """
    version = next(dist.glob("*.whl")).name.split("-")[1]
    server: Json = {
        "broker_server_host": lab.address("server"),
        "broker_server_fleet": "lab",
        "broker_server_extras": ["server", "train"] if training else ["server"],
    }
    device: Json = {
        "base_sysroot": "/opt/fake-board",
        "edge_agent_extras": ["train"] if training else [],
        "edge_agent_torch": TORCH if training else "",
        # Made for 64-bit ARM: they ask for another torch than there is for these hosts.
        "edge_agent_constraints": "",
        "edge_agent_fleet": "lab",
        "edge_agent_training": {"window": "00:00-23:59", "temperature_max_c": 90},
        "edge_agent_server": f"https://{lab.address('server')}:8300",
        "edge_agent_datasets": {"triage": {"path": DATASET, **COLUMNS}},
        "edge_agent_settings": {"threads": 1, "heartbeat_s": 5, "benchmark_onnx": False},
    }
    # Two processors hold all three at work, so that each measures itself and not who is busy.
    of_device = {
        "pi": {"edge_agent_cpu_quota": "35%"},
        "pi5": {"edge_agent_cpu_quota": "60%"},
        "orin": {"jetson_power_mode": "15W"},
    }
    devices = {host.name: {**device, **of_device.get(host.name, {})} for host in DEVICES}
    content = lab.inventory({"server": {"server": server}, "devices": devices})
    shared: Json = {"base_time_sync": "none", "broker_server_token": TOKEN}
    shared["broker_server_wheelhouse"] = "" if training else str(house)
    for role in ("edge_agent", "broker_server"):
        shared |= {f"{role}_version": version, f"{role}_wheel_dir": str(dist)}
    everywhere = content["all"]
    assert isinstance(everywhere, dict)
    everywhere["vars"].update(shared)
    return lab.write_inventory(content)


def write_data(lab: Lab) -> None:
    """Put a dataset on every device, as its owner does, and what runs need on the server."""
    data = generate(DemoDataOptions(devices=len(DEVICES)), seed=0)
    lines_of = dict(zip([host.name for host in DEVICES], data.devices, strict=True))
    for name, file, lines in (
        ("server", HELD_OUT, data.held_out),
        *((name, DATASET, lines) for name, lines in lines_of.items()),
    ):
        path = lab.root(name) / file.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(as_tsv(lines), encoding="utf-8")


def build_wheel(folder: Path, source: Path = ROOT) -> Path:
    """Build the package's wheel into a folder."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", folder, str(source)], check=True)
    return next(folder.glob("*.whl"))


def build_another_version(folder: Path, version: str, *, first_words: str = "") -> Path:
    """Build the wheel of another version.

    Args:
        first_words: statements with which its agent starts.
    """
    source = folder / "source"
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    changed = re.sub(r'(?m)^version = ".*"$', f'version = "{version}"', project)
    (source / "pyproject.toml").write_text(changed, encoding="utf-8")
    agent = source / "edge_agent" / "app.py"
    agent.write_text(agent.read_text(encoding="utf-8") + f"\n{first_words}\n", encoding="utf-8")
    return build_wheel(folder, source)
