"""A site whose agents train by script, behind proxies that can be cut.

Everything but the trainer is real: server, broker, agents, their files and their sockets.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import numpy as np
from numpy.typing import NDArray

from broker_server.blobs import BlobStore
from broker_server.broker import ChildBroker, open_broker
from broker_server.broker_address import BrokerAddress, Credentials
from broker_server.broker_programs import SERVER_USER
from broker_server.operator_api_client import add_model
from broker_server.run_state import RoundResult, RunCheckpoint
from broker_server.store import Store
from tests.support.brokers import Kind, require
from tests.support.cutting_proxy import CuttingProxy, cutting_proxy
from tests.support.ports import free_port
from tests.support.replay import RANK, SEED
from tests.support.scripted_trainer import write_program
from tests.support.site import Json, Site
from wire_protocol.errors import Unavailable
from wire_protocol.messages import UpdateManifest
from wire_protocol.tensors import decode

Arrivals = dict[tuple[int, str], tuple[str, str]]
"""(round, device) -> digests of the adapter it was trained from, and of the update."""


@dataclass
class ScriptedSite(Site):
    """A site with a proxy in front of broker and server.

    With mosquitto the broker is a process of the test and the server one of its clients, so
    that each can die alone. The embedded broker is the server's child and dies with it.
    """

    mqtt_proxy: CuttingProxy = field(default_factory=lambda: CuttingProxy(0))
    http_proxy: CuttingProxy = field(default_factory=lambda: CuttingProxy(0))
    own_broker: ChildBroker | None = None
    address: BrokerAddress | None = None

    @property
    def script(self) -> Path:
        """Where trainers look for what they must wait for."""
        return self.folder / "script"

    @property
    def store(self) -> Store:
        """The server's database, read beside it."""
        return Store.in_folder(self.folder / "server")

    def server_settings(self, port: int) -> Json:
        settings = super().server_settings(port)
        if self.address is not None:
            user = self.address.server_credentials
            assert user is not None
            login = f"{quote(user.username)}:{quote(user.password)}"
            url = f"mqtt://{login}@{self.address.host}:{self.address.port}"
            settings["broker"] = {"kind": "external", "url": url}
        return settings

    def start_server(self) -> None:
        super().start_server()
        self.http_proxy.target_port = int(self.url.rpartition(":")[2])

    def start_agent(self, name: str, **changes: Any) -> None:
        login = self.device_login()
        super().start_agent(
            name,
            **{
                "server": f"http://127.0.0.1:{self.http_proxy.port}",
                "broker": f"mqtt://{login}@127.0.0.1:{self.mqtt_proxy.port}",
                "trainer_python": str(write_program(self.script)),
                "heartbeat_s": 10.0,
                **changes,
            },
        )

    @property
    def port(self) -> int:
        """Of the server's API; the same after a restart."""
        return int(self.url.rpartition(":")[2])

    def register_model(self, name: str) -> None:
        """Upload and register the base model in the folder of this name."""
        with self.api() as api:
            add_model(api, str(self.folder / name), name=name, report=lambda *_: None)

    def device_login(self) -> str:
        """User and password that devices connect with; points the proxy at the broker."""
        if self.address is not None:
            user = self.address.device_credentials
            assert user is not None
            self.mqtt_proxy.target_port = self.address.port
            return f"{quote(user.username)}:{quote(user.password)}"
        answer = httpx.get(f"{self.url}/v1/join", params={"device_id": "anyone"})
        parts = urlsplit(str(answer.json()["broker_url"]))
        self.mqtt_proxy.target_port = parts.port or 1883
        return f"{parts.username}:{parts.password}"

    def launch_scripted(self, *, rounds: int, **changes: Any) -> str:
        """A run whose result depends on nothing but who answered."""
        return self.launch(
            strategy="fedlora",
            strategy_options={"rank": RANK},
            rounds=rounds,
            local_steps=2,
            deadline_s=3600.0,
            quorum=1.0,
            seed=SEED,
            **changes,
        )

    def spy_address(self) -> BrokerAddress:
        """The broker itself, with the server's user."""
        if self.address is not None:
            return self.address
        kept = json.loads((self.folder / "server" / "broker" / "broker.json").read_text())
        return BrokerAddress(
            "127.0.0.1",
            int(kept["port"]),
            server_credentials=Credentials(SERVER_USER, str(kept[SERVER_USER])),
        )

    # What is in the database

    def checkpoint(self, run_id: str) -> RunCheckpoint:
        """Where a run stands, as committed."""
        record = self.store.run(run_id)
        assert record is not None
        assert record.checkpoint is not None
        return RunCheckpoint.model_validate_json(record.checkpoint)

    def arrivals(self, run_id: str) -> Arrivals:
        """Every acknowledged update of a run."""
        found: Arrivals = {}
        for text in self.store.rounds(run_id):
            number = RoundResult.model_validate_json(text).round
            for device_id, one in self.store.updates(run_id, number).items():
                manifest = UpdateManifest.model_validate_json(one)
                found[number, device_id] = (manifest.base_sha256, manifest.update.sha256)
        return found

    def blob(self, sha256: str) -> dict[str, NDArray[np.float32]]:
        """An adapter in the server's blob store."""
        return decode(BlobStore(self.folder / "server" / "blobs").read(sha256))

    def blobs_of_updates(self, run_id: str) -> set[str]:
        """Updates of a run whose bytes the server still keeps."""
        blobs = BlobStore(self.folder / "server" / "blobs")
        return {update for _, update in self.arrivals(run_id).values() if blobs.has(update)}

    def delivered_adapter(self, run_id: str) -> str:
        """Digest of the adapter file that people get."""
        file = self.folder / "server" / "runs" / run_id / "adapter" / "adapter_model.safetensors"
        return hashlib.sha256(file.read_bytes()).hexdigest()

    def sids(self) -> dict[str, int]:
        """Session numbers of the last births that the server committed."""
        return {device_id: sid for device_id, sid, _ in self.store.devices()}

    # Breaking things; every pid is of a process that this site started

    def broker_pid(self) -> int:
        """The broker itself, not the small program that watches over it."""
        if self.own_broker is None:
            return int((self.folder / "server" / "broker" / "pid").read_text())
        watcher = self.own_broker.pid
        assert watcher is not None
        children = Path(f"/proc/{watcher}/task/{watcher}/children").read_text().split()
        return int(children[0])

    def kill_broker(self) -> None:
        """kill -9, and start it again unless the server does."""
        os.kill(self.broker_pid(), signal.SIGKILL)
        if self.own_broker is not None:
            broker = self.own_broker
            self.until(lambda: not broker.running, "the broker is dead")
            broker.start()

    def cut_links(self) -> int:
        """Reset every connection between agents, broker and server at once."""
        return self.mqtt_proxy.cut() + self.http_proxy.cut()

    def wait_until_all_are_back(self, names: list[str], *, after: dict[str, int]) -> None:
        """Until every device is connected and the server committed the birth of that session.

        Args:
            after: session numbers before whatever broke; those named must have grown.
        """

        def back() -> bool:
            try:
                states, sids = self.devices(), self.sids()
            except Unavailable:  # the server is away; asked again
                return False
            for name in names:
                try:
                    status = self.status(name)
                except (OSError, ValueError):  # just being replaced, or not written yet
                    return False
                if not status["connected"] or states[name]["state"] != "online":
                    return False
                if sids[name] != status["sid"] or sids[name] <= after.get(name, 0):
                    return False
            return True

        self.until(back, "every device is back")


@contextmanager
def open_scripted_site(folder: Path, kind: Kind) -> Iterator[ScriptedSite]:
    """A server with a tiny model on a broker of this kind, and no agents yet."""
    require(kind)
    with ExitStack() as stack:
        mqtt_proxy = stack.enter_context(cutting_proxy(0))
        http_proxy = stack.enter_context(cutting_proxy(0))
        site = ScriptedSite(folder, "embedded", mqtt_proxy=mqtt_proxy, http_proxy=http_proxy)
        site.patience_s = 240.0
        if kind == "mosquitto":
            launcher = open_broker("mosquitto", state_dir=folder / "broker", port=free_port())
            assert isinstance(launcher, ChildBroker)
            stack.callback(launcher.stop)
            site.own_broker, site.address = launcher, launcher.start()
        stack.callback(site.close)
        site.start_server()
        site.add_model()
        yield site
