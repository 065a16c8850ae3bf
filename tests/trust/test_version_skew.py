"""Old beside new: what is understood, what is refused, and that both sides are told."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from click.testing import CliRunner

from broker_server.operator_cli import main as legend
from edge_agent.blobs import BlobClient
from edge_agent.command_guard import CommandGuard
from edge_agent.incoming import event_from
from edge_agent.session import CommandArrived
from tests.support.light_device import LightDevice
from tests.support.light_site import LightSite, light_site
from tests.support.messages import a_birth, every_message
from wire_protocol.errors import ProtocolError, Refused
from wire_protocol.messages import (
    PROTOCOL_VERSION,
    SCHEMAS,
    Ack,
    Birth,
    Body,
    Command,
    Delivery,
    Rebirth,
    decode_message,
    encode_message,
)
from wire_protocol.signed import ServerKeyStatement, Signer, read_signed, sign_statement
from wire_protocol.topics import Channel, DeviceTopic
from wire_protocol.versions import WRONG_PROTOCOL, protocol_problem

GOLDEN = sorted((Path(__file__).parents[1] / "golden" / "messages").glob("*/*.json"))
KINDS = {schema: kind for kind, schema in SCHEMAS.items()}

AGENT_OF_LATER = """
import sys
from wire_protocol import messages
messages.PROTOCOL_VERSION = 2
messages.Birth.model_fields["protocol"].default = (2,)
messages.Birth.model_rebuild(force=True)
from edge_agent.cli import main
sys.argv = ["edge-agent", "--settings", sys.argv[1], "start"]
main()
"""


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_released_message_means_the_same_to_every_later_version(path: Path) -> None:
    content = json.loads(path.read_bytes())
    envelope, body = decode_message(KINDS[content["schema"]], path.read_bytes())
    assert (envelope.id, envelope.sid) == (content["id"], content["sid"])
    # Nothing that it said is lost or changed; fields added since have their defaults.
    said, understood = content["body"], body.model_dump(mode="json")
    assert understood == merged(understood, said)


def merged(base: object, over: object) -> object:
    """``base`` with everything that ``over`` says."""
    if isinstance(base, dict) and isinstance(over, dict):
        return {**base, **{key: merged(base.get(key), value) for key, value in over.items()}}
    return over


@pytest.mark.parametrize("body", every_message(), ids=lambda body: type(body).__name__)
def test_whatever_a_newer_peer_adds_at_any_depth_is_ignored(body: Body) -> None:
    content = json.loads(encode_message(body, message_id="m", sid=1))
    free = {"datasets"}  # keys of these are names and not fields

    def add(value: object, *, named: bool = False) -> None:
        if isinstance(value, list):
            for item in value:
                add(item)
        elif isinstance(value, dict):
            for key, inner in list(value.items()):
                add(inner, named=key in free)
            if not named:
                value["added_in_version_9"] = {"deep": [1, {"er": None}]}

    add(content)
    assert decode_message(type(body), json.dumps(content).encode())[1] == body


@pytest.mark.parametrize("kind", list(SCHEMAS), ids=lambda kind: kind.__name__)
def test_the_next_major_version_of_a_message_is_refused_by_its_name(kind: type[Body]) -> None:
    body = next(one for one in every_message() if type(one) is kind)
    content = json.loads(encode_message(body, message_id="m", sid=1))
    content["schema"] = later = content["schema"].replace("/1", "/2")
    with pytest.raises(ProtocolError, match=later):
        decode_message(kind, json.dumps(content).encode())


@pytest.mark.parametrize("spoken", [(), (0,), (2,), (2, 3)])
def test_a_device_without_a_common_protocol_is_named_with_what_to_do(spoken: tuple[int]) -> None:
    problem = protocol_problem(spoken)
    assert "update the older one" in problem
    assert f"this server {PROTOCOL_VERSION}" in problem


@pytest.mark.parametrize("spoken", [(1,), (0, 1), (1, 2)])
def test_one_common_protocol_is_enough(spoken: tuple[int]) -> None:
    assert protocol_problem(spoken) == ""


# Before messages were signed


def test_a_new_device_does_not_obey_a_server_from_before_signatures() -> None:
    operator = Signer(b"o" * 32)
    guard = CommandGuard("lab", "pi-1", operator.public_key)
    unsigned = encode_message(Command(command=Rebirth()), message_id="m", sid=1)
    topic = str(DeviceTopic("lab", "pi-1", Channel.COMMAND))
    with pytest.raises(ProtocolError, match="not signed"):
        event_from(topic, unsigned, guard, sid=1, now=1.0)


def test_without_an_operator_key_a_device_hears_servers_of_both_ages() -> None:
    guard = CommandGuard("lab", "pi-1", None)
    topic = str(DeviceTopic("lab", "pi-1", Channel.COMMAND))
    unsigned = encode_message(Command(command=Rebirth()), message_id="m", sid=1)
    for payload in (unsigned, Signer(b"s" * 32).sign(unsigned)):
        event = event_from(topic, payload, guard, sid=1, now=1.0)
        assert isinstance(event, CommandArrived)


def test_a_device_from_before_signatures_drops_what_is_signed() -> None:
    server, operator = Signer(b"s" * 32), Signer(b"o" * 32)
    statement = ServerKeyStatement(fleet="lab", server_key=server.public_key, number=1)
    signed = Signer(b"s" * 32, sign_statement(statement, operator)).sign(
        encode_message(
            Command(command=Rebirth()),
            message_id="m",
            sid=1,
            delivery=Delivery(to="pi-1", seq=1, at_s=0.0, ttl_s=60.0),
        )
    )
    # An agent of then called this, and counted and logged the error: it stays in the fleet, idle.
    with pytest.raises(ProtocolError):
        decode_message(Command, signed)
    assert decode_message(Command, read_signed(signed).text.encode())[1] == Command(
        command=Rebirth()
    )


def test_a_refusal_ends_the_agent_and_any_other_rejection_does_not() -> None:
    guard = CommandGuard("lab", "pi-1", None)
    topic = str(DeviceTopic("lab", "pi-1", Channel.SERVER_ACK))

    def hear(code: str) -> object:
        ack = Ack(re="birth-1", status="rejected", code=code, detail="speaks protocol 0")
        payload = encode_message(ack, message_id="m", sid=1)
        return event_from(topic, payload, guard, sid=1, now=1.0)

    assert hear("stale") is not None
    with pytest.raises(Refused, match="speaks protocol 0"):
        hear(WRONG_PROTOCOL)


# Real programs


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LightSite]:
    with light_site(tmp_path_factory.mktemp("skew")) as site:
        yield site


async def said_by_the_server(site: LightSite, name: str, birth: Birth) -> Ack:
    """The server's answer to a birth; waits for the registry to show it."""
    async with BlobClient(site.url) as blobs:
        device = LightDevice(name, site.for_devices(blobs, heartbeat_s=3600.0))
        await device.start(birth)
        ack = await device.asked(Channel.BIRTH, birth, "birth-of-old")
        await device.stop()
        return ack


@pytest.mark.e2e
@pytest.mark.train
@pytest.mark.parametrize(
    ("name", "spoken", "said"), [("too-old", (0,), "protocol 0"), ("too-new", (2,), "protocol 2")]
)
def test_the_server_refuses_another_protocol_and_tells_both_sides(
    site: LightSite, name: str, spoken: tuple[int], said: str
) -> None:
    birth = a_birth(protocol=spoken, heartbeat_s=3600.0)
    ack = asyncio.run(asyncio.wait_for(said_by_the_server(site, name, birth), 60))
    assert (ack.status, ack.code) == ("rejected", WRONG_PROTOCOL)
    assert said in ack.detail
    assert "update the older one" in ack.detail
    (device,) = [one for one in site.real.devices().values() if one["device_id"] == name]
    assert device["state"] == "refused"
    assert said in device["note"]
    shown = CliRunner().invoke(legend, ["--server", site.url, "devices"], env={"COLUMNS": "300"})
    (line,) = [line for line in shown.output.splitlines() if line.startswith(name)]
    assert "refused" in line
    assert said in line


@pytest.mark.e2e
@pytest.mark.train
@pytest.mark.parametrize(
    "broker_is_named", [False, True], ids=["asks the server", "knows a broker"]
)
def test_an_agent_of_another_protocol_ends_with_one_line_and_its_exit_code(
    site: LightSite, tmp_path: Path, broker_is_named: bool
) -> None:
    settings = {
        "device_id": "of-later" if broker_is_named else "of-later-2",
        "fleet": "site",
        "server": site.url,
        "state_dir": str(tmp_path / "state"),
    }
    if broker_is_named:
        settings["broker"] = httpx.get(f"{site.url}/v1/join?device_id=x").json()["broker_url"]
    (tmp_path / "agent.yml").write_text(yaml.safe_dump(settings))
    ended = subprocess.run(
        [sys.executable, "-c", AGENT_OF_LATER, str(tmp_path / "agent.yml")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == Refused.exit_code, ended.stderr
    last = ended.stderr.strip().splitlines()[-1]
    assert "update the older one" in last
    assert "protocol" in last
    assert "Traceback" not in ended.stderr
