"""A whole run where everybody has a certificate, and may only do what it was asked to."""

from __future__ import annotations

import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from broker_server.operator_api_client import OperatorApi
from broker_server.pki import FleetPki
from broker_server.run_state import RunCheckpoint
from broker_server.store import Store
from tests.support.brokers import require
from tests.support.site import Json, Site

pytestmark = [pytest.mark.e2e, pytest.mark.train, pytest.mark.timeout(600)]

LINK = {"up_mbps": 1e7, "down_mbps": 1e7, "round_trip_ms": 0.0}
SLOW = {"board": "jetson-nano", "time_dilation": 40000, "link": LINK}
"""Stretches a step of the tiny model to about a third of a second: time to look at a round."""


@dataclass
class CertifiedSite(Site):
    """The same with certificates for everybody."""

    broker: str = "mosquitto"

    def __post_init__(self) -> None:
        self.pki = FleetPki.create(self.folder / "pki", "site", [], time.time())

    def server_settings(self, port: int) -> Json:
        """With the authority's folder."""
        return {**super().server_settings(port), "pki": str(self.pki.folder)}

    @contextmanager
    def api(self) -> Iterator[OperatorApi]:
        """As an operator on the server's machine."""
        with OperatorApi(self.url, ca=self.pki.ca_file) as api:
            yield api

    def enroll(self, name: str) -> None:
        """Give a device its identity."""
        token = self.pki.create_token(time.time(), device_id=name)
        file = self.folder / f"{name}-enroll.yml"
        settings = {"device_id": name, "fleet": "site", "state_dir": str(self.folder / name)}
        file.write_text(yaml.safe_dump(settings))
        arguments = ["--settings", str(file), "enroll", "--url", self.url, "--token", token]
        subprocess.run(
            [sys.executable, "-m", "edge_agent.cli", *arguments], check=True, timeout=120
        )

    @contextmanager
    def as_device(self, name: str) -> Iterator[httpx.Client]:
        """What somebody can do who has stolen a device's key."""
        identity = self.folder / name / "identity"
        context = ssl.create_default_context(cafile=str(identity / "ca.pem"))
        context.load_cert_chain(identity / "device.pem", identity / "device.key")
        with httpx.Client(base_url=self.url, verify=context, timeout=60) as http:
            yield http

    def checkpoint(self, run_id: str) -> RunCheckpoint:
        """What the server remembers of a run."""
        store = Store.in_folder(self.folder / "server")
        record = store.run(run_id)
        store.close()
        assert record is not None
        assert record.checkpoint is not None
        return RunCheckpoint.model_validate_json(record.checkpoint)

    def uploads(self) -> list[Path]:
        """What devices have sent and no manifest has named."""
        return [path for path in (self.folder / "server" / "uploads").rglob("*") if path.is_file()]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CertifiedSite]:
    require("mosquitto")
    site = CertifiedSite(tmp_path_factory.mktemp("site"))
    try:
        site.start_server()
        site.add_model()
        for name in ("left", "right"):
            site.enroll(name)
            site.start_agent(name, emulate=SLOW)
        site.wait_for_devices("left", "right")
        yield site
    finally:
        site.close()


def refused(site: CertifiedSite) -> dict[str, int]:
    with site.api() as api:
        counted: dict[str, int] = api.health()["refused_requests"]
    return counted


def test_a_run_needs_no_right_that_its_devices_do_not_have(site: CertifiedSite) -> None:
    before = refused(site)
    run = site.wait_for_end(site.launch(rounds=2))
    assert run["status"] == "finished", run["reason"]
    assert all(d["status"] == "updated" for r in run["rounds"] for d in r["devices"])
    assert refused(site) == before
    assert site.uploads() == []


def test_what_one_device_does_in_a_round_is_hidden_from_the_other(site: CertifiedSite) -> None:
    run_id = site.launch(rounds=1, local_steps=12)
    site.wait_until_training(run_id, "left")
    adapter = _loaded_by_left(site, run_id)
    with site.as_device("left") as left, site.as_device("right") as right:
        (file, *_) = left.get(f"/v1/models/{_model(site)}").json()["files"]
        assert left.get(f"/v1/blobs/{file['sha256']}").status_code == 200
        assert left.get(f"/v1/blobs/{adapter}").status_code == 200
        held_out = site.run(run_id)["spec"]["evaluation"]["sha256"]
        assert left.get(f"/v1/blobs/{held_out}").status_code == 403
        assert left.get(f"/v1/runs/{run_id}").status_code == 403
        site.wait_for_end(run_id)
        for device in (left, right):
            assert device.get(f"/v1/blobs/{adapter}").status_code == 403, "the round is over"
            body: dict[str, Any] = {"sha256": "0" * 64, "size_bytes": 10}
            assert device.post("/v1/blobs", json=body).status_code == 403


@pytest.mark.trust
def test_a_server_that_is_killed_in_a_round_gives_the_same_rights_again(
    site: CertifiedSite,
) -> None:
    run_id = site.launch(rounds=2, local_steps=12)
    site.wait_until_training(run_id, "left")
    adapter = _loaded_by_left(site, run_id)
    site.kill("server", signal.SIGKILL)
    site.start_server()
    with site.as_device("left") as left:
        # Before the run goes on: its base model has to be loaded first.
        assert left.get(f"/v1/blobs/{adapter}").status_code == 200
    run = site.wait_for_end(run_id)
    assert run["status"] == "finished", run["reason"]
    assert all(d["status"] == "updated" for r in run["rounds"] for d in r["devices"])
    assert "not_assigned" not in refused(site)
    assert "no_assignment" not in refused(site)


@pytest.mark.trust
def test_a_device_that_is_revoked_in_a_round_is_out_and_the_run_goes_on(
    site: CertifiedSite,
) -> None:
    run_id = site.launch(rounds=2, local_steps=12, quorum=0.5, deadline_s=60)
    site.wait_until_training(run_id, "right")
    with site.as_device("right") as right, site.api() as api:
        assert right.get("/v1/join?device_id=right").status_code == 200
        api.decide("right", "revoke")
        assert right.get("/v1/join?device_id=right").status_code == 403
    run = site.wait_for_end(run_id)
    assert run["status"] == "finished", run["reason"]
    last = {d["device_id"]: d["status"] for d in run["rounds"][-1]["devices"]}
    assert last == {"left": "updated"}


def _loaded_by_left(site: CertifiedSite, run_id: str) -> str:
    """The adapter that a device begins with: a coarse copy of the one that the server keeps."""
    base = site.checkpoint(run_id).members["left"].base
    assert base is not None
    return base.sha256


def _model(site: CertifiedSite) -> str:
    with site.api() as api:
        return str(api.models()[0]["digest"])
