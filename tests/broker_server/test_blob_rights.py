"""What a device may fetch and send, through the API, while the server tells it what to do."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import anyio
import httpx
import pytest

from broker_server.api import make_api
from broker_server.blobs import BlobStore
from broker_server.broker_address import BrokerAddress
from broker_server.grants import UPLOADS_PER_ASSIGNMENT
from broker_server.mqtt import ServerLink
from broker_server.pki import FleetPki
from broker_server.run_state import MemberCheckpoint, RunCheckpoint
from broker_server.server import Server
from broker_server.server_state import ServerState
from broker_server.settings import ServerSettings
from broker_server.store import Store
from broker_server.voice import ServerVoice
from tests.support.messages import a_manifest, a_round_start
from wire_protocol.messages import (
    Ack,
    Benchmark,
    Command,
    Prefix,
    RoundCancel,
    RoundStart,
    UpdateManifest,
)
from wire_protocol.parts import BlobRef
from wire_protocol.signed import Signer

MODEL = "1" * 64
OLDER_MODEL = "0" * 64
CONFIG = {
    "model_type": "bert",
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
UPDATE = b"an update of some bytes"
DIGEST = hashlib.sha256(UPDATE).hexdigest()

Ask = Callable[..., httpx.Response]


class NothingRevoked:
    def is_revoked(self, _serial: int) -> bool:
        return False


def open_server(root: Path) -> Server:
    state = ServerState(root)
    settings = ServerSettings(fleet="home", state_dir=root, token="secret")
    broker = BrokerAddress("127.0.0.1", 1)
    link = ServerLink(broker, fleet="home", start_number=1)
    voice = ServerVoice(Signer(bytes(32)), 1, 0.0)
    return Server(
        settings,
        state,
        Store.in_folder(root),
        BlobStore(state.blobs),
        broker,
        link,
        voice,
        voice.signer.public_key,
        pki=cast("FleetPki", NothingRevoked()),
    )


def add_model(server: Server, digest: str, name: str, content: bytes) -> str:
    """Register a base model of one file; returns the file's digest."""
    sha256 = server.blobs.put(content)
    files = [{"path": "config.json", "sha256": sha256, "size_bytes": len(content)}]
    server.store.save_model(digest, name, files=json.dumps(files), config=json.dumps(CONFIG))
    return sha256


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = open_server(tmp_path)
    add_model(server, OLDER_MODEL, "a-model", b"older")
    add_model(server, MODEL, "b-model", b"newer")
    server.rights.model_registered()
    yield server
    server.store.close()


def asking(server: Server) -> Ask:
    def ask(
        device: str | None, method: str, path: str, *, token: str | None = None, **more: Any
    ) -> httpx.Response:
        api = make_api(server)

        async def tls(scope: Any, receive: Any, send: Any) -> None:
            if device:
                scope["extensions"] = {"legend.peer": {"name": device, "serial": 1}}
            await api(scope, receive, send)

        async def send_it() -> httpx.Response:
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            headers |= more.pop("headers", {})
            transport = httpx.ASGITransport(tls)
            async with httpx.AsyncClient(transport=transport, base_url="http://s") as client:
                return await client.request(method, path, headers=headers, **more)

        return anyio.run(send_it)

    return ask


@pytest.fixture
def ask(server: Server) -> Ask:
    return asking(server)


def start(server: Server, device: str, number: int = 1) -> RoundStart:
    """Give a device an assignment against an adapter of its own."""
    adapter = server.blobs.put(f"adapter {number} of {device}".encode())
    assignment = a_round_start().model_copy(
        update={
            "assignment_id": f"run.{number}-0.{device}",
            "ranks": (0, 4),
            "adapter": BlobRef(sha256=adapter, size_bytes=20),
            "model_digest": MODEL,
        }
    )
    server.command(device, Command(command=assignment))
    return assignment


def announce(ask: Ask, device: str, content: bytes = UPDATE, **changes: Any) -> httpx.Response:
    body = {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content), **changes}
    return ask(device, "POST", "/v1/blobs", json=body)


def append(ask: Ask, device: str, content: bytes, offset: int = 0) -> httpx.Response:
    headers = {"Upload-Offset": str(offset)}
    return ask(device, "PATCH", f"/v1/blobs/{DIGEST}", content=content, headers=headers)


def upload(ask: Ask, device: str) -> None:
    assert announce(ask, device).status_code == 201
    assert append(ask, device, UPDATE).status_code == 204


def manifest_of(given: RoundStart) -> UpdateManifest:
    update = BlobRef(sha256=DIGEST, size_bytes=len(UPDATE))
    return a_manifest().model_copy(
        update={"assignment_id": given.assignment_id, "update": update, "round_number": 1}
    )


def test_a_device_fetches_its_adapter_and_its_base_model(server: Server, ask: Ask) -> None:
    given = start(server, "pi")
    (file,) = ask("pi", "GET", f"/v1/models/{MODEL}").json()["files"]
    assert ask("pi", "GET", f"/v1/blobs/{file['sha256']}").content == b"newer"
    assert ask("pi", "GET", f"/v1/blobs/{given.adapter.sha256}").status_code == 200
    assert ask("pi", "HEAD", f"/v1/blobs/{given.adapter.sha256}").status_code == 200


def test_everything_that_an_assignment_names_may_be_fetched_and_nothing_beside_it(
    server: Server, ask: Ask
) -> None:
    below, beside = server.blobs.put(b"the layers below"), server.blobs.put(b"the whole adapter")
    given = start(server, "pi").model_copy(
        update={
            "assignment_id": "run.2-0.pi",
            "prefix": Prefix(adapter=BlobRef(sha256=below, size_bytes=16)),
        }
    )
    server.command("pi", Command(command=given))
    for sha256 in (below, given.adapter.sha256):
        assert ask("pi", "GET", f"/v1/blobs/{sha256}").status_code == 200
    assert ask("pi", "GET", f"/v1/blobs/{beside}").status_code == 403


def test_what_a_device_was_not_given_and_what_does_not_exist_look_the_same(
    server: Server, ask: Ask
) -> None:
    given = start(server, "pi")
    start(server, "nano")
    held_out = server.blobs.put(b"held-out examples")
    answers = [
        ask("nano", "GET", f"/v1/blobs/{sha256}")
        for sha256 in (given.adapter.sha256, held_out, "f" * 64)
    ]
    assert {answer.status_code for answer in answers} == {403}
    assert len({answer.content for answer in answers}) == 1


def test_another_base_model_is_read_once_the_server_asks_to_measure_it(
    server: Server, ask: Ask
) -> None:
    older = json.loads(server.models.find(OLDER_MODEL).files)[0]["sha256"]
    for path in (f"/v1/models/{OLDER_MODEL}", "/v1/models/a-model", f"/v1/blobs/{older}"):
        assert ask("pi", "GET", path).status_code == 403
    server.command("pi", Command(command=Benchmark(model_digest=OLDER_MODEL)))
    assert ask("pi", "GET", f"/v1/models/{OLDER_MODEL}").status_code == 200
    assert ask("pi", "GET", f"/v1/blobs/{older}").status_code == 200
    assert ask("nano", "GET", f"/v1/blobs/{older}").status_code == 403


def test_an_upload_becomes_a_blob_when_its_manifest_names_it(server: Server, ask: Ask) -> None:
    given = start(server, "pi")
    upload(ask, "pi")
    assert announce(ask, "pi").json() == {"state": "exists"}
    assert not server.blobs.has(DIGEST)
    assert server.rights.has_update("pi", manifest_of(given))
    assert server.rights.has_update("pi", manifest_of(given)), "a manifest may come twice"
    assert server.blobs.read(DIGEST) == UPDATE


def test_nobody_can_count_anothers_upload_as_its_own(server: Server, ask: Ask) -> None:
    theirs = start(server, "pi")
    own = start(server, "nano")
    upload(ask, "pi")
    assert server.rights.has_update("pi", manifest_of(theirs))
    assert not server.rights.has_update("nano", manifest_of(own))
    assert not server.rights.has_update("nano", manifest_of(theirs))
    assert not server.rights.has_update("stranger", manifest_of(theirs))


def test_an_upload_cannot_be_found_continued_or_spoilt_by_another_device(
    server: Server, ask: Ask
) -> None:
    start(server, "pi")
    start(server, "nano")
    assert announce(ask, "pi").status_code == 201
    assert append(ask, "pi", UPDATE[:10]).status_code == 204

    assert append(ask, "nano", b"poison", 10).status_code == 404
    probed = announce(ask, "nano")
    assert (probed.status_code, probed.json()["offset"]) == (201, 0)
    assert append(ask, "nano", b"x" * len(UPDATE)).status_code == 422
    assert announce(ask, "nano", size_bytes=5).status_code == 201

    assert announce(ask, "pi").json()["offset"] == 10
    assert append(ask, "pi", UPDATE[10:], 10).status_code == 204
    again = announce(ask, "nano")
    assert (again.status_code, again.json()["offset"]) == (201, 0), "not even that it is complete"


def test_a_blob_that_the_server_has_is_not_given_away_by_announcing_it(
    server: Server, ask: Ask
) -> None:
    start(server, "pi")
    server.blobs.put(UPDATE)
    assert announce(ask, "pi").json() == {"state": "open", "offset": 0}
    upload(ask, "pi")


def test_without_an_assignment_nothing_is_taken(server: Server, ask: Ask) -> None:
    answer = announce(ask, "pi")
    assert (answer.status_code, answer.json()["error"]) == (403, "forbidden")
    assert append(ask, "pi", UPDATE).status_code == 403
    assert server.refused["no_assignment"] == 2
    assert not server.state.uploads.exists() or list(server.state.uploads.iterdir()) == []


def test_an_update_that_no_assignment_needs_is_too_large(server: Server, ask: Ask) -> None:
    start(server, "pi")
    assert announce(ask, "pi", size_bytes=2**20).status_code == 413
    assert announce(ask, "pi", size_bytes=2**40).status_code == 413
    assert server.refused["too_large"] == 2


def test_a_device_has_few_uploads_at_a_time(server: Server, ask: Ask) -> None:
    start(server, "pi")
    start(server, "nano")
    for number in range(UPLOADS_PER_ASSIGNMENT):
        assert announce(ask, "pi", b"update %d" % number).status_code == 201
    assert announce(ask, "pi").status_code == 403
    assert server.refused["too_many_uploads"] == 1
    assert announce(ask, "pi", b"update 0").status_code == 201, "one that is open goes on"
    assert announce(ask, "nano").status_code == 201


@pytest.mark.parametrize("how", ["cancelled", "replaced", "answered"])
def test_the_end_of_an_assignment_ends_its_uploads(server: Server, ask: Ask, how: str) -> None:
    given = start(server, "pi")
    announce(ask, "pi")
    append(ask, "pi", UPDATE[:10])
    match how:
        case "cancelled":
            cancel = RoundCancel(assignment_id=given.assignment_id, reason="late")
            server.command("pi", Command(command=cancel))
        case "replaced":
            start(server, "pi", 2)
        case _:
            server.rights.reported("pi", "message", given.assignment_id)
            server.ack("pi", Ack(re="message", status="busy"))
            assert append(ask, "pi", UPDATE[10:12], 10).status_code == 204
            server.ack("pi", Ack(re="message", status="ok"))
    refused = append(ask, "pi", UPDATE[10:], 10)
    assert refused.status_code == (404 if how == "replaced" else 403)
    assert list(server.state.uploads.glob("pi/parts/*")) == []
    assert ask("pi", "GET", f"/v1/blobs/{given.adapter.sha256}").status_code == 403


def test_an_assignment_that_is_sent_again_keeps_its_upload(server: Server, ask: Ask) -> None:
    start(server, "pi")
    announce(ask, "pi")
    append(ask, "pi", UPDATE[:10])
    start(server, "pi")
    assert announce(ask, "pi").json()["offset"] == 10


def test_an_operator_uploads_base_models_that_devices_cannot_see_or_disturb(
    server: Server, ask: Ask
) -> None:
    start(server, "pi")
    body = {"sha256": DIGEST, "size_bytes": len(UPDATE)}
    assert ask(None, "POST", "/v1/blobs", json=body, token="secret").status_code == 201
    assert append(ask, "pi", b"poison").status_code == 404
    headers = {"Upload-Offset": "0"}
    sent = ask(
        None, "PATCH", f"/v1/blobs/{DIGEST}", content=UPDATE, headers=headers, token="secret"
    )
    assert sent.status_code == 204
    assert server.blobs.read(DIGEST) == UPDATE
    assert ask("pi", "GET", f"/v1/blobs/{DIGEST}").status_code == 403
    assert ask(None, "GET", f"/v1/blobs/{DIGEST}", token="secret").content == UPDATE


def test_after_a_restart_devices_go_on_before_they_are_told_again(
    server: Server, ask: Ask, tmp_path: Path
) -> None:
    given = start(server, "pi")
    start(server, "nano")
    spec = {
        "name": "r",
        "model": MODEL,
        "dataset": "d",
        "labels": ["a", "b"],
        "evaluation": {"sha256": "e" * 64, "size_bytes": 1},
    }
    server.store.create_run("run", json.dumps(spec))
    server.store.set_status("run", "running")
    part = BlobRef(sha256=server.blobs.put(b"top layers"), size_bytes=10)
    members = {
        name: MemberCheckpoint(
            assignment_id=f"run.1-0.{name}", ranks=(0, 4), steps=1, predicted_s=1.0, base=base
        )
        for name, base in (("pi", None), ("tx2", None), ("agx", part))
    }
    checkpoint = RunCheckpoint(
        round_number=1,
        attempt=0,
        adapter=given.adapter,
        baseline_done=True,
        tokens_per_step=1.0,
        members=members,
    )
    server.store.save_checkpoint("run", checkpoint.model_dump_json())
    done = manifest_of(given).model_copy(update={"run_id": "run"})
    server.store.record_update("run", 1, "tx2", done.model_dump_json())
    for device in ("pi", "nano"):
        announce(ask, device)
        append(ask, device, UPDATE[:10])

    restarted = open_server(tmp_path)
    ask = asking(restarted)
    assert ask("pi", "GET", f"/v1/blobs/{given.adapter.sha256}").status_code == 200
    assert ask("pi", "GET", f"/v1/models/{MODEL}").status_code == 200
    assert ask("agx", "GET", f"/v1/blobs/{part.sha256}").status_code == 200
    assert ask("agx", "GET", f"/v1/blobs/{given.adapter.sha256}").status_code == 403
    assert announce(ask, "pi").json()["offset"] == 10
    assert announce(ask, "nano").status_code == 403
    assert list(tmp_path.glob("uploads/nano*")) == []
    assert announce(ask, "tx2").status_code == 403, "its update was counted before"
    assert restarted.rights.has_update("tx2", done), "its acknowledgement may have been lost"
    assert not restarted.rights.has_update("nano", done)
    restarted.store.close()


def test_a_run_that_cannot_be_read_does_not_keep_the_server_from_starting(
    server: Server, tmp_path: Path
) -> None:
    server.store.create_run("broken", '{"name": 1}')
    server.store.set_status("broken", "running")
    open_server(tmp_path).store.close()
