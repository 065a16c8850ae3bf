"""Whatever a peer or a file says: it is understood, or refused in one line, and nothing else.

Every case comes from ``SEED`` and a number that a failure names. The long form is ``-m trust``.
"""

from __future__ import annotations

import itertools
import json
import random
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from broker_server.base_model import read_config, tensor_shapes
from broker_server.run_spec import apply_override, load_run_spec, parse_run_spec
from broker_server.settings import ServerSettings
from edge_agent import session
from edge_agent.command_guard import CommandGuard
from edge_agent.incoming import NewCertificate, event_from
from edge_agent.settings import AgentSettings
from tests.support.messages import a_round_start, every_message
from tests.support.mutations import (
    DEFLATED,
    alias_bomb,
    case,
    mutated_adapter,
    mutated_bytes,
    mutated_json,
    mutated_message,
    mutated_yaml,
)
from wire_protocol.errors import ConfigError, LegendError, ProtocolError
from wire_protocol.initial_adapter import initial_adapter
from wire_protocol.lora import Codec
from wire_protocol.messages import SCHEMAS, Command, Delivery, decode_message, encode_message
from wire_protocol.model_family import adapter_shapes, model_shape
from wire_protocol.plain_yaml import read_yaml
from wire_protocol.settings import parse_settings
from wire_protocol.signed import ServerKeyStatement, Signer, sign_statement
from wire_protocol.tensors import MAX_ADAPTER_BYTES, check_shapes, decode, encode
from wire_protocol.topics import Broadcast, Channel, DeviceTopic, FleetTopic, parse_topic

SEED = "legend-1"
GOLDEN = sorted((Path(__file__).parents[1] / "golden" / "messages" / "v1").glob("*.json"))
SAMPLES = [path.read_bytes() for path in GOLDEN]
SHAPE = model_shape(
    {"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2}
)
RANKS = (0, 2, 4)
LONGEST_LINE = 1200

every_form = pytest.mark.parametrize(
    "times", [pytest.param(1, id="short"), pytest.param(20, id="long", marks=pytest.mark.trust)]
)
"""The short form is a twentieth of the long one."""


def refused_or_read(work: Callable[[random.Random], object], count: int) -> int:
    """Run every case; only a ``LegendError`` of one printable line may come out.

    Returns:
        How many were read.
    """
    read = 0
    for number in range(count):
        try:
            work(case(SEED, number))
            read += 1
        except LegendError as error:
            text = str(error)
            assert len(text) < LONGEST_LINE, f"case {number}: {text[:200]}..."
            assert len(text.splitlines()) == 1, f"case {number}: {text!r}"
            text.encode()
        except Exception as error:
            raise AssertionError(f"case {number} of seed {SEED!r}: {error!r}") from error
    return read


@every_form
def test_a_mutated_message_is_read_or_refused_on_every_channel(times: int) -> None:
    kinds = {schema.encode(): kind for kind, schema in SCHEMAS.items()}

    def read(rng: random.Random) -> None:
        data = mutated_message(rng, SAMPLES)
        fitting = next((kind for schema, kind in kinds.items() if schema in data), Command)
        kind = rng.choice(list(SCHEMAS)) if rng.random() < 0.1 else fitting
        envelope, body = decode_message(kind, data)
        # What was read can be stored, and read again as the same.
        again = kind.model_validate_json(body.model_dump_json())
        assert again == body
        json.dumps(body.model_dump(mode="json"), allow_nan=False)
        assert envelope.sid >= 0

    count = 5_000 * times
    assert 0 < refused_or_read(read, count) < count / 2


@every_form
def test_a_device_that_hears_nonsense_goes_on(times: int) -> None:
    guard = CommandGuard("lab", "pi-1", None)
    topics = [str(DeviceTopic("lab", "pi-1", channel)) for channel in Channel]
    topics += [str(FleetTopic("lab", channel)) for channel in Broadcast]
    mind = session.Session(10.0, random.Random(1))
    clock = itertools.count()
    mind.handle(session.Connected(sid=1), next(clock))

    def hear(rng: random.Random) -> None:
        topic = rng.choice(topics)
        if rng.random() < 0.1:
            topic = mutated_bytes(rng, topic.encode(), [b"legend/v1/lab/d/"]).decode(
                errors="replace"
            )
        data = mutated_message(rng, SAMPLES)
        event = event_from(topic, data, guard, sid=1, now=float(next(clock)))
        if event is not None and not isinstance(event, NewCertificate):
            mind.handle(event, next(clock))

    count = 5_000 * times
    assert 0 < refused_or_read(hear, count) < count / 2


@every_form
def test_no_mutation_of_a_signed_command_is_obeyed(times: int) -> None:
    operator, server = Signer(b"o" * 32), Signer(b"s" * 32)
    statement = ServerKeyStatement(fleet="lab", server_key=server.public_key, number=1)
    speaker = Signer(b"s" * 32, voucher=sign_statement(statement, operator))
    message = encode_message(
        Command(command=a_round_start()),
        message_id="m-1",
        sid=7,
        delivery=Delivery(to="pi-1", seq=2**32 + 1, at_s=1.0, ttl_s=60.0),
    )
    signed = speaker.sign(message)

    def open_it(rng: random.Random) -> None:
        change = rng.choice((mutated_json, lambda r, d: mutated_bytes(r, d, [d, message])))
        guard = CommandGuard("lab", "pi-1", operator.public_key)
        text = guard.open(change(rng, signed), sid=7, now=1.0)
        assert text == message, "something was obeyed that nobody signed"

    refused_or_read(open_it, 500 * times)


@every_form
def test_a_mutated_adapter_is_read_or_refused(times: int) -> None:
    adapter = initial_adapter(SHAPE, RANKS, label_count=2, seed=1)
    blobs = [encode(adapter, codec) for codec in Codec]

    def read(rng: random.Random) -> None:
        data = mutated_adapter(rng, rng.choice(blobs))
        check_shapes(decode(data), adapter_shapes(SHAPE, RANKS, 2))

    count = 2_000 * times
    assert 0 < refused_or_read(read, count) < count / 2


def test_an_adapter_that_inflates_without_end_is_refused_early() -> None:
    bomb = DEFLATED + zlib.compress(b"\0" * (4 * MAX_ADAPTER_BYTES), 9)
    assert len(bomb) < MAX_ADAPTER_BYTES / 100
    tracemalloc.start()
    with pytest.raises(ProtocolError, match="beyond"):
        decode(bomb)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 3 * MAX_ADAPTER_BYTES


AGENT_FILE = """\
device_id: pi-1
fleet: home
server: http://10.0.0.1:8300
state_dir: /var/lib/edge-agent
datasets:
  triage: {path: /data/triage.csv, text: text, label: label}
  other:
    path: /data/other.jsonl
threads: 4
heartbeat_s: 30.0
emulate:
  board: jetson-tx2
  link: {up_mbps: 5, down_mbps: 10}
"""
SERVER_FILE = """\
fleet: home
host: 127.0.0.1
port: 8300
token: secret
broker: {kind: mosquitto, host: 0.0.0.0, port: 1883}
evaluation_threads: 2
"""
RUN_FILE = """\
name: review
model: tiny
strategy_options: {rank_min: 4}
dataset: reviews
labels: [negative, positive]
rounds: 3
learning_rate: 0.001
codec: int8
evaluation:
  path: held-out.jsonl
  text: text
"""


@every_form
def test_a_mutated_settings_file_is_read_or_refused(times: int) -> None:
    files = ((AgentSettings, AGENT_FILE), (ServerSettings, SERVER_FILE))

    def read(rng: random.Random) -> None:
        model, text = rng.choice(files)
        environ = {"X_FLEET": mutated_yaml(rng, "home")} if rng.random() < 0.1 else {}
        parse_settings(model, mutated_yaml(rng, text), source="s.yml", environ=environ, prefix="X_")

    count = 500 * times
    assert 0 < refused_or_read(read, count) < count


@every_form
def test_a_mutated_run_is_read_or_refused(times: int, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    document = {**yaml.safe_load(RUN_FILE), "evaluation": {"sha256": "ab" * 32, "size_bytes": 9}}
    submitted = json.dumps(document).encode()

    def read_file(rng: random.Random) -> None:
        file.write_text(mutated_yaml(rng, RUN_FILE), encoding="utf-8", errors="surrogatepass")
        load_run_spec(file, [f"seed={mutated_yaml(rng, '1')}"] if rng.random() < 0.2 else [])

    def read_body(rng: random.Random) -> None:
        try:
            body = json.loads(mutated_json(rng, submitted))
        except ValueError as error:
            raise ConfigError("FastAPI refuses it before us") from error
        if not isinstance(body, dict):
            raise ConfigError("FastAPI refuses it before us")
        json.dumps(parse_run_spec(body).model_dump(mode="json"))

    assert 0 < refused_or_read(read_file, 500 * times) < 500 * times
    assert 0 < refused_or_read(read_body, 2_000 * times) < 2_000 * times


@every_form
def test_a_mutated_base_model_is_refused_or_has_sizes(times: int, tmp_path: Path) -> None:
    config = json.dumps(
        {"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2}
    ).encode()
    weights = encode(initial_adapter(SHAPE, RANKS, label_count=2, seed=1), Codec.FP32)

    def read(rng: random.Random) -> None:
        (tmp_path / "config.json").write_bytes(mutated_message(rng, [config]))
        (tmp_path / "model.safetensors").write_bytes(mutated_adapter(rng, weights))
        tensor_shapes(tmp_path)
        assert model_shape(read_config(tmp_path)).layer_count < 10_000

    count = 1_000 * times
    assert 0 < refused_or_read(read, count) < count


def bombs() -> Iterator[Any]:
    """Small files that stand for large work."""
    yield pytest.param(alias_bomb(), "too many values", id="billion laughs")
    nested = alias_bomb().replace("a9:", "strategy_options: &options\n  a9:")
    yield pytest.param(nested, "is not YAML", id="laughs inside")
    yield pytest.param("a: &a {b: *a}", "contains itself", id="a value inside itself")
    yield pytest.param("[" * 100_000, "nested too deeply", id="deep list")
    yield pytest.param("{a: " * 100_000, "nested too deeply", id="deep mapping")
    yield pytest.param("? " + "k" * 1_000_000 + "\n: 1", "unknown key", id="a key of 1 MB")
    yield pytest.param("x: " + "k" * 2_000_000, "longer than", id="a file of 2 MB")
    yield pytest.param("- x\n" * 150_000, "too many values", id="endless list")
    yield pytest.param("x: " + "9" * 5_000, "is not YAML", id="a number of 5000 digits")


@pytest.mark.parametrize(("text", "words"), list(bombs()))
def test_a_bomb_is_refused_before_it_goes_off(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        parse_settings(ServerSettings, text, source="s.yml", environ={}, prefix="X_")
    assert len(str(caught.value)) < LONGEST_LINE
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_run_spec(file)
    assert len(str(caught.value)) < LONGEST_LINE + len(str(file))
    if "\n" not in text:
        with pytest.raises(ConfigError):
            apply_override({}, f"labels={text}")


def test_aliases_that_a_person_writes_are_read() -> None:
    text = "defaults: &d {text: t}\ndatasets:\n  a: {<<: *d, path: x}\n  b: {<<: *d, path: y}\n"
    assert read_yaml(text, source="s")["datasets"]["b"] == {"text": "t", "path": "y"}


@every_form
def test_a_mutated_topic_is_ours_or_refused(times: int) -> None:
    samples = [str(DeviceTopic("lab", "pi-1", channel)).encode() for channel in Channel]

    def read(rng: random.Random) -> None:
        data = mutated_bytes(rng, rng.choice(samples), samples)
        text = data.decode(errors=rng.choice(("replace", "surrogateescape")))
        assert str(parse_topic(text)) == text

    refused_or_read(read, 1_000 * times)


def test_the_samples_cover_every_channel_and_every_kind() -> None:
    assert {json.loads(sample)["schema"] for sample in SAMPLES} == set(SCHEMAS.values())
    assert len(SAMPLES) == len(every_message())
