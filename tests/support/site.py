"""A real server and real agents as processes on this machine, with a tiny model."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from broker_server.operator_api_client import OperatorApi, add_model
from broker_server.run_spec import load_run_spec, read_held_out
from tests.support.processes import Processes
from tests.support.tiny_models import make_base_model, write_reviews

Json = dict[str, Any]

EVERYBODY = {"strategy_options": {"left_out_max": 0}}
"""Nobody is left out of a round for being slow."""


@dataclass
class Site(Processes):
    """Starts, kills and asks."""

    broker: str = "embedded"
    heartbeat_s: float = 2.0
    environment: dict[str, str] = field(default_factory=dict)
    """Further variables for the processes that are started from now on."""

    def start_server(self) -> None:
        """Start the server, or start it again in the same state directory."""
        ready = self.folder / "server" / "server.json"
        ready.unlink(missing_ok=True)
        port = int(self.url.rpartition(":")[2]) if "server" in self.processes else 0
        self.start_server_process(port)
        self.until(ready.exists, "the server answers")
        self._url = str(json.loads(ready.read_text())["url"])

    def start_server_process(self, port: int) -> None:
        """The same without waiting for it."""
        settings = self.server_settings(port)
        self._start("server", "broker_server.cli", ["serve", "--settings"], settings)

    def server_settings(self, port: int) -> Json:
        """What the server's settings file says."""
        return {
            "fleet": "site",
            "state_dir": str(self.folder / "server"),
            "port": port,
            "broker": {"kind": self.broker},
        }

    @property
    def url(self) -> str:
        """Where the server's API is."""
        return self._url

    def start_agent(self, name: str, **changes: Any) -> None:
        """Start an agent, or start it again in the same state directory."""
        settings = {
            "device_id": name,
            "fleet": "site",
            "server": self.url,
            "state_dir": str(self.folder / name),
            "datasets": {"reviews": {"path": str(self.data)}},
            "threads": 1,
            "heartbeat_s": self.heartbeat_s,
            "benchmark_onnx": False,
            **changes,
        }
        file = self._settings_file(name)
        self._start(name, "edge_agent.cli", ["start"], settings, before=["--settings", str(file)])

    @property
    def data(self) -> Path:
        """A small dataset; the held-out file as well."""
        path = self.folder / "reviews.jsonl"
        return path if path.exists() else write_reviews(path)

    def add_model(self) -> str:
        """Register a tiny random BERT."""
        model_dir = self.folder / "tiny"
        if not model_dir.exists():
            make_base_model(model_dir, "bert")
        with self.api() as api:
            added = add_model(api, str(model_dir), name="tiny", report=lambda *_: None)
            return str(added["digest"])

    def launch(self, **changes: Any) -> str:
        """Launch a run; returns its id."""
        run = {
            "name": "site-run",
            "model": "tiny",
            "dataset": "reviews",
            "rounds": 3,
            "local_steps": 4,
            "batch_size": 4,
            "max_tokens": 16,
            "evaluation": {"path": str(self.data)},
            **(changes if "strategy" in changes else {**EVERYBODY, **changes}),
        }
        file = self.folder / "run.yml"
        file.write_text(yaml.safe_dump(run))
        spec = load_run_spec(file)
        held_out = read_held_out(spec.evaluation)
        with self.api() as api:
            return api.submit_run(spec.submitted(held_out, api.upload_bytes(held_out.content)))

    @contextmanager
    def api(self) -> Iterator[OperatorApi]:
        with OperatorApi(self.url) as api:
            yield api

    def run(self, run_id: str) -> Json:
        """What the server says about a run."""
        with self.api() as api:
            return api.run(run_id)

    def devices(self) -> dict[str, Json]:
        """What the server says about its devices."""
        with self.api() as api:
            return {device["device_id"]: device for device in api.devices()}

    def status(self, name: str) -> Json:
        """What an agent says about itself."""
        status: Json = json.loads((self.folder / name / "status.json").read_text())
        return status

    def wait_for_devices(self, *names: str) -> None:
        """Until they are online and have measured themselves."""
        self.until(
            lambda: all(
                (device := self.devices().get(name))
                and device["state"] == "online"
                and device["capability"].get("compute")
                for name in names
            ),
            f"{names} are ready",
        )

    def wait_until_training(self, run_id: str, name: str, *, round_number: int = 1) -> None:
        """Until this device is in the middle of its local steps."""

        def training() -> bool:
            run = self.run(run_id)
            assert run["status"] in ("queued", "running"), run["reason"]
            return run["round_number"] >= round_number and any(
                line["device_id"] == name and line["state"] == "training" and line["step"] > 0
                for line in run["live"]
            )

        self.until(training, f"{name} trains in round {round_number}")

    def wait_for_end(self, run_id: str) -> Json:
        """Until the run has ended; returns it."""
        self.until(lambda: self.run(run_id)["status"] not in ("queued", "running"), "the run ends")
        return self.run(run_id)

    def wait_for_empty_outbox(self, name: str) -> None:
        """Until the server has acknowledged everything that this agent owed it."""
        self.until(lambda: self.status(name)["outbox"] == 0, f"{name} owes nothing")

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """End one of our processes."""
        process = self.processes[name]
        process.send_signal(number)
        process.wait(30)

    def trainer_pid(self, name: str) -> int:
        """The trainer child of an agent."""
        children = Path(f"/proc/{self.processes[name].pid}/task").glob("*/children")
        pids = [int(pid) for file in children for pid in file.read_text().split()]
        return next(
            pid for pid in pids if b"trainer_child" in Path(f"/proc/{pid}/cmdline").read_bytes()
        )

    def _settings_file(self, name: str) -> Path:
        return self.folder / f"{name}.yml"

    def _start(
        self,
        name: str,
        module: str,
        arguments: list[str],
        settings: Json,
        *,
        before: list[str] | None = None,
    ) -> None:
        file = self._settings_file(name)
        file.write_text(yaml.safe_dump(settings))
        if arguments[-1] == "--settings":
            arguments = [*arguments, str(file)]
        command = [sys.executable, "-m", module, *(before or []), *arguments]
        self.spawn(name, command, {"HF_HUB_OFFLINE": "1", **self.environment})


@contextmanager
def open_site(folder: Path, *, broker: str = "embedded") -> Iterator[Site]:
    """A server that knows a tiny model, and no agents yet."""
    site = Site(folder, broker)
    try:
        site.start_server()
        site.add_model()
        yield site
    finally:
        site.close()
