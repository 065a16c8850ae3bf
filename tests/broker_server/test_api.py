"""The HTTP API, asked in process: who may ask what, and how a no sounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from broker_server.api import make_api
from broker_server.blobs import BlobStore
from broker_server.broker_address import BrokerAddress, Credentials
from broker_server.mqtt import ServerLink
from broker_server.server import Server
from broker_server.server_state import ServerState
from broker_server.settings import ServerSettings
from broker_server.store import Store
from broker_server.voice import ServerVoice
from tests.support.messages import SHA, a_birth
from wire_protocol.signed import Signer

BROKER = BrokerAddress(
    "127.0.0.1", 1, device_credentials=Credentials("device", "pass/word"), loopback_only=True
)
Ask = Callable[..., httpx.Response]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    state = ServerState(tmp_path)
    store = Store.in_folder(tmp_path)
    settings = ServerSettings(fleet="home", state_dir=tmp_path, token="secret")
    link = ServerLink(BROKER, fleet="home", start_number=1)
    voice = ServerVoice(Signer(bytes(32)), 1, 0.0)
    blobs = BlobStore(state.blobs)
    yield Server(settings, state, store, blobs, BROKER, link, voice, voice.signer.public_key)
    store.close()


@pytest.fixture
def ask(server: Server) -> Ask:
    def ask(
        method: str,
        path: str,
        *,
        token: str | None = "secret",
        host: str = "127.0.0.1",
        **body: Any,
    ) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(make_api(server), client=(host, 5000))
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            headers |= body.pop("more", {})
            async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
                return await client.request(method, path, headers=headers, **body)

        return anyio.run(send)

    return ask


@pytest.mark.parametrize("token", [None, "", "Secret", "secret "])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/health"),
        ("GET", "/v1/join?device_id=pi"),
        ("GET", "/v1/devices"),
        ("POST", "/v1/models"),
        ("POST", "/v1/runs"),
        ("GET", "/v1/runs/x/files/summary.json"),
        ("POST", "/v1/blobs"),
        ("GET", f"/v1/blobs/{SHA}"),
        ("PATCH", f"/v1/blobs/{SHA}"),
        ("GET", "/v1/probe?bytes=1"),
    ],
)
def test_without_the_token_nothing_is_told(
    ask: Ask, method: str, path: str, token: str | None
) -> None:
    answer = ask(method, path, token=token)
    assert answer.status_code == 401
    assert answer.json()["error"] == "unauthorised"
    assert "secret" not in answer.text


def test_a_stranger_learns_nothing_about_a_body_and_an_endless_one_is_refused(ask: Ask) -> None:
    assert ask("POST", "/v1/runs", token=None, content=b"{not json").status_code == 401

    chunked = {"Transfer-Encoding": "chunked"}
    assert ask("POST", "/v1/runs", content=b"x" * 2_000_000).status_code == 413
    assert ask("POST", "/v1/models", content=b"{}", more=chunked).status_code == 413


def test_a_local_device_learns_the_broker_with_its_password(ask: Ask) -> None:
    answer = ask("GET", "/v1/join?device_id=pi").json()
    assert answer["broker_url"] == "mqtt://device:pass%2Fword@127.0.0.1:1"
    assert (answer["fleet"], answer["protocol"]) == ("home", [1])


def test_a_broker_on_every_address_is_found_where_the_server_was_found(
    ask: Ask, server: Server
) -> None:
    server.broker = replace(BROKER, loopback_only=False)
    answer = ask("GET", "/v1/join?device_id=pi", host="10.1.2.3").json()
    assert answer["broker_url"].endswith("@server:1")


def test_a_device_elsewhere_is_refused_by_the_embedded_broker_with_the_reason(ask: Ask) -> None:
    answer = ask("GET", "/v1/join?device_id=pi", host="10.1.2.3")
    assert answer.status_code == 403
    detail = answer.json()["detail"]
    assert "10.1.2.3" in detail
    assert "mosquitto" in detail


@pytest.mark.parametrize("name", ["a/b", "../x", "UPPER", ""])
def test_a_device_id_that_is_no_name_is_refused(ask: Ask, name: str) -> None:
    assert ask("GET", "/v1/join", params={"device_id": name}).status_code == 422


@pytest.mark.parametrize("path", ["../../etc/passwd", "/etc/passwd", "a/../../b", ""])
def test_a_model_file_cannot_leave_its_folder(ask: Ask, path: str) -> None:
    file = {"path": path, "sha256": SHA, "size_bytes": 1}
    answer = ask("POST", "/v1/models", json={"name": "evil", "files": [file]})
    assert answer.status_code == 422
    assert ask("GET", "/v1/models").json() == {"models": []}


def test_a_model_needs_its_blobs_first(ask: Ask) -> None:
    file = {"path": "config.json", "sha256": SHA, "size_bytes": 1}
    answer = ask("POST", "/v1/models", json={"name": "m", "files": [file]})
    assert "not uploaded" in answer.json()["detail"]


def test_a_model_without_supported_layers_is_refused_and_leaves_nothing(
    ask: Ask, server: Server
) -> None:
    sha = server.blobs.put(b'{"model_type": "t5"}')
    file = {"path": "config.json", "sha256": sha, "size_bytes": 20}
    answer = ask("POST", "/v1/models", json={"name": "t5", "files": [file]})
    assert answer.status_code == 422
    assert "t5" in answer.json()["detail"]
    assert list(server.state.models.iterdir()) == []


@pytest.mark.parametrize(
    "path", ["/v1/runs/none", "/v1/runs/none/files", "/v1/runs/none/files/x", "/nowhere"]
)
def test_what_is_not_there_is_not_found(ask: Ask, path: str) -> None:
    answer = ask("GET", path)
    assert answer.status_code == 404
    assert set(answer.json()) == {"error", "detail"}


def test_files_outside_the_result_folder_are_not_served(ask: Ask, server: Server) -> None:
    server.store.create_run("run-1", "{}")
    (server.state.runs / "run-1").mkdir()
    for name in ("../../server.db", "%2e%2e/%2e%2e/server.db", "..%2fserver.db"):
        assert ask("GET", f"/v1/runs/run-1/files/{name}").status_code == 404


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({}, "missing"),
        ({"nmae": "x"}, "nmae"),
        ([1], ""),
    ],
)
def test_a_run_that_is_no_run_is_refused_in_one_line(
    ask: Ask, document: object, words: str
) -> None:
    answer = ask("POST", "/v1/runs", json=document)
    assert answer.status_code == 422
    assert "\n" not in answer.json()["detail"]
    assert words in answer.json()["detail"]


def test_the_api_describes_itself(ask: Ask) -> None:
    paths = ask("GET", "/openapi.json").json()["paths"]
    assert {"/v1/runs", "/v1/devices", "/v1/blobs/{sha256}"} <= set(paths)


def test_devices_are_listed_with_what_they_can_do(ask: Ask, server: Server) -> None:
    server.fleet.born("pi", 1, a_birth(), 0.0)
    (device,) = ask("GET", "/v1/devices").json()["devices"]
    assert (device["device_id"], device["state"], device["board"]) == ("pi", "online", "rpi-5-8")
    assert device["capability"]["compute"]["model_digest"] == SHA
