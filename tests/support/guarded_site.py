"""A real server with certificates, HTTPS and mosquitto, and everybody who might knock at it."""

from __future__ import annotations

import hashlib
import json
import os
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import yaml

from broker_server.access import Role
from broker_server.blobs import BlobStore
from broker_server.broker_programs import mosquitto_command
from broker_server.pki import FleetPki
from broker_server.run_state import MemberCheckpoint, RunCheckpoint
from broker_server.server_state import ServerState
from broker_server.store import Store
from broker_server.tokens import TokenStore
from edge_agent.join import login_from_url
from tests.support.brokers import FLEET
from tests.support.pki import Certified, anonymous_context, certified_device, make_pki
from tests.support.processes import end
from wire_protocol.errors import ConfigError
from wire_protocol.parts import BlobRef

DAY_S = 86_400.0
MODEL = "1" * 64
CONFIG = {
    "model_type": "bert",
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


@dataclass(frozen=True)
class Caller:
    """Somebody who asks: with a certificate, a token, both or nothing.

    Attributes:
        context: what TLS presents and trusts.
        device: the name in the certificate.
    """

    context: ssl.SSLContext
    token: str | None = None
    device: str = "pi"

    def http(self, url: str) -> httpx.Client:
        """A client that keeps its connection."""
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        return httpx.Client(base_url=url, verify=self.context, headers=headers, timeout=60)


@dataclass
class GuardedSite:
    """The server's process and what it knows.

    Attributes:
        adapters: digest of the adapter in the open assignment of each device.
        model_file: digest of the only file of the registered base model.
        held_out: digest of a blob that no device was given.
    """

    folder: Path
    pki: FleetPki
    callers: dict[str, Caller]
    adapters: dict[str, str]
    model_file: str
    held_out: str
    process: subprocess.Popen[bytes] | None = None

    @property
    def state_dir(self) -> Path:
        """The server's."""
        return self.folder / "server"

    @property
    def url(self) -> str:
        """Where its API answers."""
        return str(json.loads((self.state_dir / "server.json").read_text())["url"])

    def start(self) -> None:
        """Start it; returns once it answers."""
        settings = {
            "fleet": FLEET,
            "state_dir": str(self.state_dir),
            "pki": str(self.pki.folder),
            "port": 0,
            "broker": {"kind": "mosquitto"},
        }
        file = self.folder / "server.yml"
        file.write_text(yaml.safe_dump(settings))
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "broker_server.cli", "serve", "--settings", str(file)],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )
        deadline = time.monotonic() + 120
        while not (self.state_dir / "server.json").exists():
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.05)

    def stop(self) -> None:
        """End it."""
        if self.process is not None:
            end(self.process)

    def log(self) -> str:
        """What it said so far."""
        return (self.folder / "server.log").read_text()

    def admit(self, name: str) -> Caller:
        """One more device with a certificate."""
        return _caller(certified_device(self.pki, name, self.folder))

    def broker_port(self) -> int:
        """Where its mosquitto listens."""
        with self.callers["device"].http(self.url) as http:
            answer = http.get("/v1/join", params={"device_id": "pi"})
        return login_from_url(answer.json()["broker_url"]).port


def _caller(device: Certified, token: str | None = None) -> Caller:
    return Caller(device.context, token, device.name)


@contextmanager
def guarded_site(folder: Path) -> Iterator[GuardedSite]:
    """A running server that led two devices before it was restarted; raises ConfigError without
    mosquitto.
    """
    mosquitto_command(folder)
    pki = make_pki(folder / "pki")
    site = GuardedSite(folder, pki, _callers(pki, folder), *_work_in_progress(folder / "server"))
    try:
        site.start()
        yield site
    finally:
        site.stop()


def has_mosquitto(folder: Path) -> bool:
    """Whether it is installed."""
    try:
        mosquitto_command(folder)
    except ConfigError:
        return False
    return True


def _callers(pki: FleetPki, folder: Path) -> dict[str, Caller]:
    now = time.time()
    stranger = make_pki(folder / "foreign")
    tokens = TokenStore(folder / "server")
    nobody = anonymous_context(pki)
    own = anonymous_context(pki)
    own.load_cert_chain(pki.pair("server").certificate, pki.pair("server").key)
    foreign = certified_device(stranger, "pi", folder, trusts=pki)
    expired = certified_device(pki, "pi", folder, now=now - 200 * DAY_S)
    revoked = certified_device(pki, "pi", folder)
    pki.revoke(f"{revoked.serial:x}", now)
    operator = tokens.create("ann", Role.OPERATOR, now)
    ended = tokens.create("bob", Role.OPERATOR, now)
    tokens.revoke("bob", now)
    return {
        "nobody": Caller(nobody),
        "foreign": _caller(foreign),
        "foreign with token": _caller(foreign, operator),
        "expired": _caller(expired),
        "revoked": _caller(revoked),
        "revoked with token": _caller(revoked, operator),
        "guessed token": Caller(nobody, "operator"),
        "ended token": Caller(nobody, ended),
        "device": _caller(certified_device(pki, "pi", folder)),
        "other": _caller(certified_device(pki, "nano", folder)),
        "viewer": Caller(nobody, tokens.create("dashboard", Role.VIEWER, now)),
        "operator": Caller(nobody, operator),
        "server": Caller(own),
    }


def _work_in_progress(root: Path) -> tuple[dict[str, str], str, str]:
    """Two runs in the database, each with an open assignment of one device."""
    state = ServerState(root)
    store, blobs = Store.in_folder(root), BlobStore(state.blobs)
    config = json.dumps(CONFIG)
    file = blobs.put(config.encode())
    files = [{"path": "config.json", "sha256": file, "size_bytes": len(config)}]
    store.save_model(MODEL, "tiny", files=json.dumps(files), config=config)
    held_out = blobs.put(b"held-out examples")
    adapters = {}
    for device in ("pi", "nano"):
        content = f"adapter of {device}".encode()
        adapters[device] = blobs.put(content)
        # With one label it cannot go on, so that no trainer or evaluator is needed here.
        spec = {
            "name": device,
            "model": MODEL,
            "dataset": "d",
            "labels": ["one"],
            "evaluation": {"sha256": held_out, "size_bytes": 17},
        }
        member = MemberCheckpoint(
            assignment_id=f"{device}.1-0.{device}", ranks=(0, 4), steps=1, predicted_s=1.0
        )
        checkpoint = RunCheckpoint(
            round_number=1,
            attempt=0,
            adapter=BlobRef(sha256=adapters[device], size_bytes=len(content)),
            baseline_done=True,
            tokens_per_step=1.0,
            members={device: member},
        )
        store.create_run(device, json.dumps(spec))
        store.set_status(device, "running")
        store.save_checkpoint(device, checkpoint.model_dump_json())
        store.create_run(f"{device}-done", json.dumps(spec))
        store.set_status(f"{device}-done", "finished")
    store.close()
    return adapters, file, held_out


def digest_of(content: bytes) -> str:
    """What a blob is called."""
    return hashlib.sha256(content).hexdigest()
