"""A real server with mosquitto and a small base model, ready for devices without boards."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from broker_server.broker_programs import SERVER_USER
from edge_agent.blobs import BlobClient
from edge_agent.join import login_from_url
from edge_agent.mqtt import BrokerLogin
from tests.support import light_device
from tests.support.brokers import require
from tests.support.site import Json
from tests.support.site import Site as RealSite
from tests.support.tiny_models import HIDDEN, LAYERS, make_base_model
from wire_protocol.model_family import model_shape

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass
class LightSite:
    """The server and how to reach it."""

    real: RealSite
    model_digest: str

    @property
    def url(self) -> str:
        """The HTTP API."""
        return self.real.url

    @property
    def login(self) -> BrokerLogin:
        """What any device is told."""
        answer = httpx.get(f"{self.url}/v1/join?device_id=light").json()
        return login_from_url(str(answer["broker_url"]))

    @property
    def broker_login(self) -> BrokerLogin:
        """What the server itself uses: whoever has it can write to every topic."""
        kept = json.loads((self.real.folder / "server" / "broker" / "broker.json").read_text())
        login = self.login
        return BrokerLogin(login.host, login.port, SERVER_USER, str(kept[SERVER_USER]))

    @property
    def server_pid(self) -> int:
        """The server's process."""
        return self.real.processes["server"].pid

    def server_rss_bytes(self) -> int:
        """Its resident memory now."""
        pages = Path(f"/proc/{self.server_pid}/statm").read_text().split()[1]
        return int(pages) * PAGE_BYTES

    def for_devices(self, blobs: BlobClient, **changes: Any) -> light_device.Site:
        """What light devices need to know."""
        config = json.loads((self.real.folder / "tiny" / "config.json").read_text())
        folder = self.real.folder / "updates"
        folder.mkdir(exist_ok=True)
        fields: dict[str, Any] = {
            "fleet": "site",
            "login": self.login,
            "blobs": blobs,
            "folder": folder,
            "shape": model_shape(config),
            "model_digest": self.model_digest,
        }
        return light_device.Site(**{**fields, **changes})

    def launch(self, **changes: Any) -> str:
        """Launch a run whose plan does not depend on how fast devices are; returns its id."""
        run = {"strategy": "fedlora", "deadline_s": 600, "labels": ["negative", "positive"]}
        return self.real.launch(**{**run, **changes})

    def result(self, run_id: str) -> Json:
        """What a run came to: scores of every round, and the adapter's bytes."""
        run = self.real.run(run_id)
        file = f"{self.url}/v1/runs/{run_id}/files/adapter/adapter_model.safetensors"
        return {
            "status": run["status"],
            "reason": run["reason"],
            "before": (run["accuracy_before"], run["loss_before"]),
            "rounds": [(one["accuracy"], one["loss"]) for one in run["rounds"]],
            "members": [sorted(d["device_id"] for d in one["devices"]) for one in run["rounds"]],
            "adapter": httpx.get(file).content,
        }


@contextmanager
def light_site(folder: Path, *, hidden: int = HIDDEN, layers: int = LAYERS) -> Iterator[LightSite]:
    """Start it; skips the test where mosquitto is not installed."""
    require("mosquitto")
    make_base_model(folder / "tiny", "bert", layers=layers, hidden=hidden)
    real = RealSite(folder, "mosquitto")
    try:
        real.start_server()
        yield LightSite(real, real.add_model())
    finally:
        real.close()
