"""A real server with certificates and mosquitto, and real agents, as processes on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import yaml

from broker_server.operator_api_client import OperatorApi
from broker_server.pki import FleetPki
from tests.support.brokers import require
from tests.support.identities import FLEET, a_pki
from tests.support.ports import free_port
from tests.support.processes import PATIENCE_S, Processes

Json = dict[str, Any]
Done = subprocess.CompletedProcess[str]


@dataclass
class TlsSite(Processes):
    """Starts and asks."""

    port: int = field(default_factory=free_port)

    def __post_init__(self) -> None:
        require("mosquitto")
        self.pki: FleetPki = a_pki(self.folder / "pki")

    @property
    def url(self) -> str:
        """A name that the server's certificate is for."""
        return f"https://localhost:{self.port}"

    def token(self, device_id: str | None = None, ttl_s: float = 3600.0) -> str:
        """As an operator gives it to a device."""
        return self.pki.create_token(time.time(), device_id=device_id, ttl_s=ttl_s)

    def start_server(self, **environment: str) -> None:
        """Start it, or start it again."""
        ready = self.folder / "server" / "server.json"
        ready.unlink(missing_ok=True)
        file = self.folder / "server.yml"
        settings = {
            "fleet": FLEET,
            "state_dir": str(self.folder / "server"),
            "port": self.port,
            "pki": str(self.folder / "pki"),
            "broker": {"kind": "mosquitto"},
        }
        file.write_text(yaml.safe_dump(settings))
        command = [sys.executable, "-m", "broker_server.cli", "serve", "--settings", str(file)]
        self.spawn("server", command, environment)
        self.until(ready.exists, "the server answers")

    def agent_command(self, name: str, *arguments: str, **settings: Any) -> list[str]:
        """The command line of one agent command."""
        file = self.folder / f"{name}.yml"
        known = {
            "device_id": name,
            "fleet": FLEET,
            "server": self.url,
            "state_dir": str(self.folder / name),
            "threads": 1,
            "heartbeat_s": 2.0,
            "benchmark_onnx": False,
        }
        file.write_text(yaml.safe_dump({**known, **settings}))
        return [sys.executable, "-m", "edge_agent.cli", "--settings", str(file), *arguments]

    def start_agent(
        self, name: str, *arguments: str, environment: dict[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start one agent command; its output goes to a file."""
        return self.spawn(name, self.agent_command(name, *arguments), environment or {})

    def agent(
        self, name: str, *arguments: str, environment: Json | None = None, **settings: Any
    ) -> Done:
        """Run one agent command to its end."""
        return subprocess.run(
            self.agent_command(name, *arguments, **settings),
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_S,
            env={**os.environ, **(environment or {})},
        )

    def enroll(self, name: str, token: str, *more: str, **options: Any) -> Done:
        """``edge-agent enroll`` with this token."""
        arguments = ("enroll", "--url", self.url, "--token", token, *more)
        return self.agent(name, *arguments, **options)

    def legend(self, *arguments: str) -> Done:
        """Run one operator command to its end."""
        ca = str(self.pki.ca_file)
        command = [sys.executable, "-m", "broker_server.operator_cli"]
        return subprocess.run(
            [*command, "--server", self.url, "--ca", ca, *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_S,
        )

    def pending(self) -> list[str]:
        """Who waits to be accepted."""
        found = json.loads(self.legend("devices", "--pending", "--json").stdout)
        return [one["device_id"] for one in found]

    def state_of(self, name: str) -> str | None:
        """What the server says about a device; None: it does not know it."""
        with OperatorApi(self.url, ca=self.pki.ca_file) as api:
            states = {device["device_id"]: str(device["state"]) for device in api.devices()}
        return states.get(name)
