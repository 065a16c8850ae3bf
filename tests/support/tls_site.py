"""A real server with certificates and mosquitto, and real agents, as processes on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from broker_server.operator_api_client import OperatorApi
from broker_server.pki import FleetPki
from tests.support.brokers import require
from tests.support.identities import FLEET, a_pki
from tests.support.ports import free_port, wait_until

Json = dict[str, Any]
Done = subprocess.CompletedProcess[str]
PATIENCE_S = 120.0


@dataclass
class TlsSite:
    """Starts and asks; every process is ended by its pid when the test ends."""

    folder: Path
    port: int = field(default_factory=free_port)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

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
        self._start("server", command, environment)
        wait_until(ready.exists, seconds=PATIENCE_S)

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
        return self._start(name, self.agent_command(name, *arguments), environment or {})

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

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Poll; fails with the logs when it does not come true."""
        try:
            wait_until(condition, seconds=PATIENCE_S)
        except AssertionError as error:
            logs = "\n".join(
                f"--- {path.name}\n{path.read_text()[-3000:]}" for path in self.folder.glob("*.log")
            )
            raise AssertionError(f"it did not happen that {what}\n{logs}") from error

    def log(self, name: str) -> str:
        """What a process has said so far."""
        return (self.folder / f"{name}.log").read_text()

    def close(self) -> None:
        """End everything."""
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(5)

    def _start(
        self, name: str, command: list[str], environment: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **environment},
            )
        self.processes[name] = process
        return process
