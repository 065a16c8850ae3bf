"""Messages: read back as written, tolerant of newer peers, strict about the rest."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.messages import (
    SHA,
    a_birth,
    a_manifest,
    a_round_start,
    every_message,
)
from wire_protocol.errors import ProtocolError
from wire_protocol.messages import (
    MAX_MESSAGE_BYTES,
    SCHEMAS,
    Ack,
    Birth,
    Body,
    Command,
    Heartbeat,
    RoundStart,
    UpdateManifest,
    decode_message,
    encode_message,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "messages" / "v1"


@pytest.mark.parametrize("body", every_message(), ids=lambda body: type(body).__name__)
def test_every_message_is_read_back_as_it_was_written(body: Body) -> None:
    data = encode_message(body, message_id="m-1", sid=7)
    envelope, read = decode_message(type(body), data)
    assert (envelope.id, envelope.sid, read) == ("m-1", 7, body)


@pytest.mark.parametrize("body", every_message(), ids=lambda body: type(body).__name__)
def test_fields_of_a_newer_peer_are_ignored(body: Body) -> None:
    content = json.loads(encode_message(body, message_id="m", sid=1))
    content["invented"] = {"later": True}
    content["body"]["invented"] = [1, 2, 3]
    assert decode_message(type(body), json.dumps(content).encode())[1] == body


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.json")), ids=lambda path: path.stem)
def test_released_messages_are_read_for_ever(path: Path) -> None:
    kinds = {schema: kind for kind, schema in SCHEMAS.items()}
    data = path.read_bytes()
    kind = kinds[json.loads(data)["schema"]]
    decode_message(kind, data)


def test_there_is_a_golden_message_of_every_schema() -> None:
    seen = {json.loads(path.read_bytes())["schema"] for path in GOLDEN.glob("*.json")}
    assert seen == set(SCHEMAS.values())


@given(st.binary(max_size=400))
def test_noise_is_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_message(Birth, data)


@given(st.integers(0, 10_000), st.integers(0, 255))
def test_a_damaged_message_is_read_or_refused_but_never_crashes(place: int, value: int) -> None:
    data = bytearray(encode_message(a_birth(), message_id="m", sid=1))
    data[place % len(data)] = value
    with suppress(ProtocolError):
        decode_message(Birth, bytes(data))


def test_another_schema_is_refused_by_name() -> None:
    data = encode_message(Heartbeat(sequence=1), message_id="m", sid=1)
    with pytest.raises(ProtocolError, match=r"legend\.heartbeat/1"):
        decode_message(Ack, data)


def test_a_message_over_the_limit_is_neither_written_nor_read() -> None:
    dataset = {"examples": 1, "labels": ["x" * 80] * 9}
    birth = a_birth(datasets={f"dataset-{number}": dataset for number in range(99)})
    with pytest.raises(ProtocolError, match="exceeds"):
        encode_message(birth, message_id="m", sid=1)
    with pytest.raises(ProtocolError, match="exceeds"):
        decode_message(Birth, b" " * (MAX_MESSAGE_BYTES + 1))


@pytest.mark.parametrize("ranks", [(), (0, 0), (4, 0), (0, 4, 0, 4), (-1, 4), (4, 999)])
def test_an_assignment_without_a_valid_lora_config_cannot_be_read(ranks: tuple[int, ...]) -> None:
    content = json.loads(encode_message(Command(command=a_round_start()), message_id="m", sid=1))
    content["body"]["command"]["ranks"] = ranks
    with pytest.raises(ProtocolError):
        decode_message(Command, json.dumps(content).encode())


@pytest.mark.parametrize(
    ("field", "value"),
    [("last_loss", "NaN"), ("steps_done", 0), ("forward_s", -1.0), ("upload_s", "Infinity")],
)
def test_figures_that_cannot_be_are_refused(field: str, value: object) -> None:
    content = json.loads(encode_message(a_manifest(), message_id="m", sid=1))
    content["body"]["report"][field] = value
    text = json.dumps(content).replace('"NaN"', "NaN").replace('"Infinity"', "Infinity")
    with pytest.raises(ProtocolError):
        decode_message(UpdateManifest, text.encode())


def test_the_digest_of_an_update_must_be_a_digest() -> None:
    content = json.loads(encode_message(a_manifest(), message_id="m", sid=1))
    content["body"]["update"]["sha256"] = "../../etc/passwd"
    with pytest.raises(ProtocolError):
        decode_message(UpdateManifest, json.dumps(content).encode())


def test_an_assignment_knows_its_lora_config() -> None:
    start = a_round_start(ranks=(0, 0, 4, 8))
    assert isinstance(start, RoundStart)
    assert (start.lora.depth, list(start.lora.layers)) == (2, [2, 3])
    assert start.adapter.sha256 == SHA
