"""What devices and the server say to each other over MQTT.

Every message is a compact JSON envelope that a person can read with
``mosquitto_sub``:

    {"schema":"legend.birth/1","id":"...","sid":7,"body":{...}}

Tolerant reader: fields that a newer peer added are ignored; a schema of
another major version is a ``ProtocolError``. Durations cross the wire, never
clock values: boards without a battery boot with a wrong date.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from wire_protocol.errors import FailureCode, ProtocolError, one_line
from wire_protocol.lora import Codec, LoraConfig
from wire_protocol.parts import (
    BlobRef,
    CapabilityProfile,
    Count,
    DatasetReport,
    Finite,
    Identifier,
    Line,
    Part,
    Seconds,
    Sha256,
    StepReport,
)

MAX_MESSAGE_BYTES = 16 * 1024
MAX_WIRE_BYTES = 32 * 1024
"""The largest message with its signature, its voucher and the quotes that JSON escapes."""

PROTOCOL_VERSION = 1


class Birth(Part):
    """A device (re)joined: who it is and what it can do. Sent after every connect.

    ``not_training`` is why its owner does not let it train now, empty when it may.
    """

    boot_id: Identifier
    agent_version: Line
    protocol: tuple[Count, ...] = Field((PROTOCOL_VERSION,), max_length=20)
    board: Identifier
    emulated: Line | None = None
    capability: CapabilityProfile
    datasets: dict[Annotated[str, Field(max_length=80)], DatasetReport]
    heartbeat_s: float = Field(gt=0, le=3600)
    not_training: Line = ""


class State(Part):
    """Retained, for people and dashboards; also the Last Will."""

    online: bool


class Heartbeat(Part):
    """Still here. Renews the lease that scheduling trusts."""

    sequence: Count
    busy_with: Identifier | None = None
    rss_bytes: Count = 0
    temperature_c: Finite | None = None
    dropped_messages: Count = 0
    not_training: Line = ""


class Progress(Part):
    """How far one assignment is. Lost ones do no harm: the next says more."""

    kind: Literal["progress"] = "progress"
    assignment_id: Identifier
    phase: Literal["fetching", "training", "uploading"]
    step: Count = 0
    steps: Count = 0
    loss: Finite | None = None


class Failure(Part):
    """One assignment ends without an update, and why. Must be acknowledged."""

    kind: Literal["failure"] = "failure"
    assignment_id: Identifier
    code: FailureCode
    detail: Line


class Capability(Part):
    """A new capability profile from a benchmark that ran after the birth."""

    kind: Literal["capability"] = "capability"
    capability: CapabilityProfile


class Unmeasured(Part):
    """The benchmark that was asked for did not work, and why."""

    kind: Literal["unmeasured"] = "unmeasured"
    model_digest: Sha256
    detail: Line


class Event(Part):
    """Anything that happens between birth and update."""

    event: Annotated[Progress | Failure | Capability | Unmeasured, Field(discriminator="kind")]


class UpdateManifest(Part):
    """What one device learned in one round: a delta against the global adapter.

    ``ranks`` is what was really trained; a device short of memory may train
    fewer layers than it was assigned, never others and never other ranks.
    """

    run_id: Identifier
    round_number: int = Field(ge=1)
    assignment_id: Identifier
    base_sha256: Sha256
    ranks: tuple[int, ...]
    update: BlobRef
    examples: int = Field(ge=1, le=2**53)
    report: StepReport
    emulated: Line | None = None


class TailPenalty(Part):
    """Add ``weight`` times the size of the last ranks of every module to the loss.

    The last ranks are those behind the whole part of ``share`` of them.
    """

    share: float = Field(gt=0, lt=1)
    weight: float = Field(ge=0, allow_inf_nan=False)


class TrainingRecipe(Part):
    """How every device of a run trains; the same for all of them.

    Updates are written with ``codec``; what devices load was written with ``adapter_codec``.
    With ``clip_norm`` a device scales its whole update down to that norm before it
    sends it; the server does so again. With the ``balanced`` loss it adds the logarithm of how
    often each class occurs in its own data to the logits while it trains.
    """

    task: Literal["classification", "instruction"]
    dataset: Annotated[str, Field(max_length=80)]
    labels: tuple[Annotated[str, Field(max_length=80)], ...] = ()
    batch_size: int = Field(ge=1, le=4096)
    learning_rate: float = Field(gt=0, le=1)
    head_learning_rate: float = Field(gt=0, le=1)
    max_tokens: int = Field(ge=4, le=8192)
    codec: Codec = Codec.FP32
    adapter_codec: Codec = Codec.FP32
    clip_norm: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    tail: TailPenalty | None = None
    loss: Literal["plain", "balanced"] = "plain"


class Prefix(Part):
    """What a device applies below the layers that it trains; unchanged for many rounds.

    Without ``adapter`` it is the base model as it is. It stays for ``rounds_left``
    rounds after this one; None where no end is known.
    """

    adapter: BlobRef | None = None
    rounds_left: Count | None = None


class RoundStart(Part):
    """Train this LoRA config on local data, from this global adapter.

    With ``factors`` A or B only that LoRA factor is trained and sent; the
    other is applied as it is. With ``prefix`` the adapter holds the trained
    layers only, and the device may keep what its frozen layers compute; without
    it the adapter holds every layer, and those that are not trained are applied
    as they are. The lowest ``quantised_layers`` trained ones keep what they need
    for their backward pass in eight bits.
    """

    type: Literal["round.start"] = "round.start"
    run_id: Identifier
    round_number: int = Field(ge=1)
    assignment_id: Identifier
    ranks: tuple[int, ...]
    factors: Literal["both", "A", "B"] = "both"
    quantised_layers: Count = 0
    steps: int = Field(ge=1)
    deadline_s: float = Field(gt=0, le=1e7)
    seed: Count
    recipe: TrainingRecipe
    adapter: BlobRef
    prefix: Prefix | None = None
    model_digest: Sha256

    @field_validator("ranks")
    @classmethod
    def _ranks_are_a_lora_config(cls, ranks: tuple[int, ...]) -> tuple[int, ...]:
        return LoraConfig(ranks).ranks

    @property
    def lora(self) -> LoraConfig:
        """The assigned depth and ranks."""
        return LoraConfig(self.ranks)


class RoundCancel(Part):
    """Stop working on an assignment; nothing of it will be used."""

    type: Literal["round.cancel"] = "round.cancel"
    assignment_id: Identifier
    reason: Line


class Rebirth(Part):
    """Say again who you are, after a random delay of at most ``jitter_s``."""

    type: Literal["rebirth"] = "rebirth"
    jitter_s: Seconds = 0.0


class Benchmark(Part):
    """Measure yourself with this base model and report a new capability profile."""

    type: Literal["benchmark"] = "benchmark"
    model_digest: Sha256


class Command(Part):
    """Something the server wants a device to do; always answered with an ack."""

    command: Annotated[RoundStart | RoundCancel | Rebirth | Benchmark, Field(discriminator="type")]


class Ack(Part):
    """Answer to the message ``re``; from the server only after its commit."""

    re: Identifier
    status: Literal["ok", "rejected", "busy"]
    code: Annotated[str, Field(max_length=60)] = ""
    detail: Line = ""
    retry_after_s: Seconds = 0.0


class CertificateRequest(Part):
    """A device asks for its next certificate, with the key that it has."""

    csr_pem: Annotated[str, Field(max_length=4096)]


class CertificateIssued(Part):
    """The next certificate of a device; the one before stays good until it ends."""

    certificate_pem: Annotated[str, Field(max_length=4096)]


Body = (
    State
    | Birth
    | Heartbeat
    | Event
    | UpdateManifest
    | Command
    | Ack
    | CertificateRequest
    | CertificateIssued
)
BodyType = TypeVar("BodyType", bound=Part)

SCHEMAS: dict[type[Part], str] = {
    State: "legend.state/1",
    Birth: "legend.birth/1",
    Heartbeat: "legend.heartbeat/1",
    Event: "legend.event/1",
    UpdateManifest: "legend.update/1",
    Command: "legend.command/1",
    Ack: "legend.ack/1",
    CertificateRequest: "legend.certificate-request/1",
    CertificateIssued: "legend.certificate/1",
}


EVERY_DEVICE = "*"
"""The receiver of what the server says to the whole fleet."""


class Delivery(Part):
    """For whom one message of the server is, and what tells it from every other.

    Attributes:
        to: a device, or ``EVERY_DEVICE``.
        seq: larger than that of every message before.
        at_s: seconds since the server's start; no date, as devices may not know theirs.
        ttl_s: seconds after which the message means nothing any more.
    """

    to: Annotated[str, Field(max_length=60)]
    seq: Annotated[int, Field(ge=0, lt=2**63)]
    at_s: Seconds
    ttl_s: Seconds


class Envelope(BaseModel):
    """What every message shares.

    Attributes:
        id: made once per logical message, the same on every resend.
        sid: the device's connection number; a death older than the last birth
            is recognised by it. On commands: the session they are meant for.
        delivery: on signed messages of the server.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    schema_name: str = Field(alias="schema", max_length=60)
    id: Identifier
    sid: Count
    delivery: Delivery | None = None
    body: dict[str, object]


def encode_message(
    body: Body, *, message_id: str, sid: int, delivery: Delivery | None = None
) -> bytes:
    """Write one message.

    Raises:
        ProtocolError: it is larger than ``MAX_MESSAGE_BYTES``.
    """
    envelope = Envelope(
        schema=SCHEMAS[type(body)],
        id=message_id,
        sid=sid,
        delivery=delivery,
        body=body.model_dump(mode="json", exclude_none=True),
    )
    data = envelope.model_dump_json(by_alias=True, exclude_none=True).encode()
    if len(data) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"message of {len(data)} bytes exceeds {MAX_MESSAGE_BYTES}")
    return data


def decode_message(body_type: type[BodyType], data: bytes) -> tuple[Envelope, BodyType]:
    """Read one message of a known kind; the inverse of ``encode_message``.

    Raises:
        ProtocolError: too large, not JSON, another schema, or a bad field.
    """
    envelope = read_envelope(data)
    if envelope.schema_name != SCHEMAS[body_type]:
        raise ProtocolError(f"schema {envelope.schema_name!r} instead of {SCHEMAS[body_type]!r}")
    try:
        return envelope, body_type.model_validate(envelope.body)
    except ValidationError as error:
        raise _bad_field(error) from error


def read_envelope(data: bytes) -> Envelope:
    """Read what every message shares; the body is not understood yet.

    Raises:
        ProtocolError: too large, not JSON, or a bad field.
    """
    if len(data) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"message of {len(data)} bytes exceeds {MAX_MESSAGE_BYTES}")
    try:
        return Envelope.model_validate_json(data)
    except ValidationError as error:
        raise _bad_field(error) from error


def _bad_field(error: ValidationError) -> ProtocolError:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"]) or "message"
    return ProtocolError(one_line(f"{place}: {first['msg']}"))
