"""What ``GET /metrics`` says, read back with Prometheus' own parser."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel, ValidationError

from broker_server import metrics as metrics_module
from broker_server.api import make_api
from broker_server.blobs import BlobStore
from broker_server.broker_address import BrokerAddress
from broker_server.counters import ServerCounters
from broker_server.metrics import Metrics
from broker_server.mqtt import Incoming, ServerLink
from broker_server.run_state import MemberResult, RoundResult
from broker_server.server import Server
from broker_server.server_state import ServerState
from broker_server.settings import ServerSettings
from broker_server.store import Store
from broker_server.voice import ServerVoice
from tests.support.messages import SHA, a_birth, a_capability, a_round_start
from wire_protocol import drop_reason as drop_reason_module
from wire_protocol.drop_reason import drop_reason
from wire_protocol.errors import ProtocolError
from wire_protocol.messages import (
    MAX_MESSAGE_BYTES,
    Ack,
    Command,
    Heartbeat,
    Rebirth,
    State,
    decode_message,
    encode_message,
)
from wire_protocol.signed import Signer, read_signed
from wire_protocol.topics import parse_topic

BROKER = BrokerAddress("127.0.0.1", 1, loopback_only=True)
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    state = ServerState(tmp_path)
    store = Store.in_folder(tmp_path)
    settings = ServerSettings(fleet="home", state_dir=tmp_path)
    link = ServerLink(BROKER, fleet="home", start_number=7)
    voice = ServerVoice(Signer(bytes(32)), 7, 0.0)
    blobs = BlobStore(state.blobs)
    yield Server(settings, state, store, blobs, BROKER, link, voice, voice.signer.public_key)
    store.close()


def samples(text: bytes) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def value(found: Samples, name: str, **labels: str) -> float:
    return found[name, frozenset(labels.items())]


def a_round(number: int, duration_s: float, *statuses: str) -> str:
    devices = tuple(
        MemberResult(
            device_id=f"pi-{index}",
            depth=1,
            ranks=(0, 4),
            steps=1,
            predicted_s=1.0,
            completion_s=1.0,
            waiting_s=0.5,
            loss=0.1,
            bytes_up=10,
            bytes_down=20,
            status=status,
            detail="",
        )
        for index, status in enumerate(statuses)
    )
    return RoundResult(
        round=number,
        accuracy=0.5,
        loss=1.0,
        duration_s=duration_s,
        waiting_s=0.5,
        bytes_up=10 * len(devices),
        bytes_down=20 * len(devices),
        devices=devices,
    ).model_dump_json()


def test_devices_are_counted_by_state_measured_and_throttled(server: Server) -> None:
    server.fleet.born("pi", 1, a_birth(), 0.0)
    server.fleet.born("nano", 1, a_birth(capability=a_capability(throttled=True)), 0.0)
    server.fleet.born("new", 1, a_birth(capability=a_capability(compute=None)), 0.0)
    server.fleet.said_offline("pi", 1)
    found = samples(Metrics(server).text())
    assert value(found, "legend_devices", state="online") == 2
    assert value(found, "legend_devices", state="lost") == 1
    assert value(found, "legend_devices_measured") == 2
    assert value(found, "legend_devices_throttled") == 1
    assert value(found, "legend_broker_connected") == 0
    assert value(found, "legend_server_starts") == 7


def test_rounds_are_summed_up_from_the_store_each_of_them_once(server: Server) -> None:
    metrics = Metrics(server)
    server.store.create_run("run", '{"name": "x"}')
    server.store.save_checkpoint("run", "{}", result=(1, a_round(1, 4.0, "updated", "straggler")))
    metrics.text()
    server.store.save_checkpoint("run", "{}", result=(2, a_round(2, 99999.0, "updated")))
    for text in (metrics.text(), Metrics(server).text()):  # the second one: after a restart
        found = samples(text)
        assert value(found, "legend_round_seconds_count") == 2
        assert value(found, "legend_round_seconds_sum") == 100003.0
        assert value(found, "legend_round_seconds_bucket", le="5.0") == 1
        assert value(found, "legend_round_seconds_bucket", le="10800.0") == 1
        assert value(found, "legend_round_seconds_bucket", le="+Inf") == 2
        assert value(found, "legend_round_up_bytes_total") == 30
        assert value(found, "legend_round_down_bytes_total") == 60
        assert value(found, "legend_round_devices_total", status="updated") == 2
        assert value(found, "legend_round_devices_total", status="straggler") == 1
        assert value(found, "legend_runs", state="queued") == 1


def test_resends_and_refused_updates_are_counted_by_name(server: Server) -> None:
    start = Command(command=a_round_start())
    server.fleet.born("pi-1", 1, a_birth(), 0.0)
    for command in (start, start, Command(command=Rebirth())):
        server.command("pi-1", command)
    server.ack("pi-1", Ack(re="m", status="rejected", code="bad_update"))
    server.ack("pi-1", Ack(re="m", status="ok"))
    found = samples(Metrics(server).text())
    assert value(found, "legend_commands_total", type="round.start") == 2
    assert value(found, "legend_commands_total", type="rebirth") == 1
    assert value(found, "legend_resent_assignments_total") == 1
    acks = "legend_answers_to_devices_total"
    assert value(found, acks, status="rejected", code="bad_update") == 1
    assert value(found, acks, status="ok", code="") == 1


def test_open_uploads_and_disk_and_memory_are_those_of_now(server: Server) -> None:
    server.blobs.open_upload(SHA, 1000)
    server.blobs.append(SHA, 0, b"x" * 300)
    found = samples(Metrics(server).text())
    assert value(found, "legend_open_uploads") == 1
    assert value(found, "legend_open_upload_bytes") == 300
    assert value(found, "legend_database_bytes") > 4096
    assert 0 < value(found, "legend_disk_free_bytes") <= value(found, "legend_disk_bytes")
    assert value(found, "legend_resident_memory_bytes") > 10_000_000


def test_what_goes_over_http_is_counted_refusals_too(server: Server) -> None:
    api = make_api(server)

    async def scrape() -> bytes:
        transport = httpx.ASGITransport(api, client=("127.0.0.1", 5000))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            await client.get("/v1/runs/none")
            await client.request("BREW", "/v1/health")
            await client.get("/v1/health", headers={"Authorization": "Bearer wrong"})
            await client.post("/v1/probe", content=b"x" * 5000)
            answer = await client.get("/metrics")
            assert answer.headers["content-type"].startswith("text/plain; version=")
            return answer.content

    found = samples(anyio.run(scrape))
    assert value(found, "legend_http_answers_total", method="GET", status="404") == 1
    assert value(found, "legend_http_answers_total", method="POST", status="200") == 1
    assert [labels for name, labels in found if ("method", "BREW") in labels] == []
    assert value(found, "legend_http_received_bytes_total") >= 5000
    refused = [labels for name, labels in found if name == "legend_refused_requests_total"]
    assert refused != []
    assert value(found, "legend_http_sent_bytes_total") > 0


def test_a_dropped_message_is_counted_with_its_channel_and_reason(server: Server) -> None:
    link = server.link
    done: list[str] = []

    def incoming(topic: str, payload: bytes) -> Incoming:
        return Incoming(topic, payload, False, lambda: done.append(topic))

    async def feed() -> None:
        messages = iter(
            [
                incoming("legend/v1/home/d/pi/up/birth", b"{}"),
                incoming("legend/v1/home/d/pi/up/birth", b"\xff"),
                incoming("legend/v1/home/d/pi/down/cmd", b"{}"),
                incoming("elsewhere/with/an/invented/name", b"{}"),
            ]
        )

        async def source() -> object:
            for message in messages:
                yield message

        link.incoming = source  # type: ignore[method-assign,assignment]
        await server.pump()

    anyio.run(feed)
    assert len(done) == 4
    found = samples(Metrics(server).text())
    name = "legend_dropped_messages_total"
    assert value(found, name, channel="birth", reason="bad_field") == 2
    assert value(found, name, channel="cmd", reason="wrong_topic") == 1
    assert not [labels for _, labels in found if any("invented" in text for _, text in labels)]


class Number(BaseModel):
    number: int


def bad_field() -> None:
    try:
        Number.model_validate({})
    except ValidationError as error:
        raise ProtocolError("number: Field required") from error


SIGNED = Signer(bytes(32)).sign(b"hello")


@pytest.mark.parametrize(
    ("cause", "word"),
    [
        (lambda: read_signed(b"{}"), "not_signed"),
        (lambda: read_signed(SIGNED.replace(b"hello", b"jello")), "bad_signature"),
        (lambda: decode_message(State, b"x" * (MAX_MESSAGE_BYTES + 1)), "too_large"),
        (
            lambda: decode_message(
                State, encode_message(Heartbeat(sequence=1), message_id="m", sid=1)
            ),
            "unknown_schema",
        ),
        (lambda: parse_topic("legend/v1/home/nonsense"), "wrong_topic"),
        (lambda: parse_topic("nonsense"), "wrong_topic"),
        (bad_field, "bad_field"),
    ],
)
def test_every_reason_to_drop_a_message_has_a_word(cause: Callable[[], object], word: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        cause()
    assert drop_reason(caught.value) == word


MODULES_THAT_DROP = (
    "wire_protocol.signed",
    "wire_protocol.messages",
    "wire_protocol.topics",
    "edge_agent.command_guard",
    "edge_agent.incoming",
    "broker_server.voice",
)


def test_no_protocol_error_of_a_message_is_counted_as_other() -> None:
    """Reads the sources: a new sentence needs a word, or it would vanish among the others."""
    unnamed = []
    for name in MODULES_THAT_DROP:
        __import__(name)
        tree = ast.parse(inspect.getsource(sys.modules[name]))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "ProtocolError":
                text = ast.unparse(node.args[0])
                if drop_reason(ProtocolError(text)) == "other" and "first" not in text:
                    unnamed.append(f"{name}: {text}")
    assert unnamed == []


PAGE = (Path(__file__).parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")


def test_the_documentation_names_every_metric_and_every_reason(server: Server) -> None:
    families = text_string_to_metric_families(Metrics(server).text().decode())
    names = {family.name for family in families}
    missing = [name for name in names if not re.search(rf"`{name}(_total)?[`{{]", PAGE)]
    assert missing == []
    words = {word for _, word in drop_reason_module._WORDS} | {"bad_field"}
    assert [word for word in words if f"`{word}`" not in PAGE] == []


def test_the_library_s_global_registry_is_not_used() -> None:
    assert "REGISTRY" not in inspect.getsource(metrics_module)
    assert ServerCounters().dropped_by_channel == {}
