"""The agent's settings: one YAML file, overridden by ``EDGE_AGENT_...`` variables."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator

from edge_agent.training_policy import TrainingPolicy
from wire_protocol.errors import ConfigError, ProtocolError
from wire_protocol.settings import Settings, parse_settings
from wire_protocol.topics import check_name

DEFAULT_SETTINGS = Path("/etc/edge-agent/settings.yml")
ENVIRONMENT_PREFIX = "EDGE_AGENT_"


def _host_name() -> str:
    name = re.sub(r"[^a-z0-9-]+", "-", socket.gethostname().lower()).strip("-")
    return name[:48] or "device"


class DatasetSettings(Settings):
    """Where a dataset lies on this device, and which columns hold what."""

    path: Path = Field(description="csv, tsv, jsonl or parquet file")
    text: str = Field("text", description="column of the input text, or of the prompt")
    text_pair: str | None = Field(None, description="column of the second text of a pair")
    label: str = Field("label", description="column of the label, or of the response")


class LinkSettings(Settings):
    """A link to imitate."""

    up_mbps: float = Field(gt=0, description="uplink, megabits a second")
    down_mbps: float = Field(gt=0, description="downlink, megabits a second")
    round_trip_ms: float = Field(5.0, ge=0, description="round trip, milliseconds")


class EmulateSettings(Settings):
    """Stretch compute and bandwidth to those of a board; said in every report."""

    board: str = Field(description="board profile, e.g. jetson-tx2")
    power_mode: str | None = Field(None, description="power mode of that board; default its own")
    time_dilation: float = Field(
        1.0, gt=0, description="every second of the board takes this many seconds here"
    )
    link: LinkSettings | None = Field(None, description="default: the board's typical link")
    memory_limit_bytes: int | None = Field(None, gt=0, description="default: the board's memory")


class AgentSettings(Settings):
    """Everything that an agent can be told."""

    device_id: str = Field(default_factory=_host_name, description="default: the host name")
    fleet: str = Field("default", description="the fleet this device belongs to")
    server: str = Field(
        "http://127.0.0.1:8300", pattern=r"^https?://", description="the server's HTTP address"
    )
    token: str | None = Field(None, repr=False, description="the server's device token")
    identity: Path | None = Field(
        None, description="folder of key and certificate; default: STATE_DIR/identity if enrolled"
    )
    broker: str | None = Field(
        None,
        pattern=r"^mqtts?://",
        repr=False,
        description="mqtt://user:password@host:port; default: the server says which",
    )
    state_dir: Path = Field(Path("/var/lib/edge-agent"), description="what survives a restart")
    datasets: dict[Annotated[str, Field(min_length=1, max_length=80)], DatasetSettings] = Field(
        default_factory=dict, description="dataset name to local file"
    )
    threads: int = Field(
        default_factory=lambda: os.cpu_count() or 1, ge=1, description="threads that may train"
    )
    heartbeat_s: float = Field(30.0, gt=0, le=3600, description="mean time between heartbeats")
    memory_limit_bytes: int | None = Field(
        None, gt=0, description="never plan to use more than this for training"
    )
    prefix_cache_bytes: int = Field(
        1_000_000_000,
        ge=0,
        description="disk for hidden states of frozen layers, never over a quarter of what is free",
    )
    trainer_python: str | None = Field(
        None, description="interpreter of the trainer; default: the agent's own"
    )
    benchmark_onnx: bool = Field(True, description="measure onnxruntime inference too")
    training: TrainingPolicy = Field(
        default_factory=TrainingPolicy, description="when this device may train"
    )
    emulate: EmulateSettings | None = Field(None, description="imitate a board (demo, validation)")
    metrics_port: int | None = Field(
        None, ge=1, le=65535, description="serve Prometheus metrics here; default: not at all"
    )
    metrics_host: str = Field("127.0.0.1", description="address of the metrics")
    sysroot: Path = Field(Path("/"), description="where /proc, /sys and /etc of the board lie")

    @field_validator("device_id", "fleet")
    @classmethod
    def _can_stand_in_a_topic(cls, name: str) -> str:
        try:
            return check_name("name", name)
        except ProtocolError as error:
            raise ValueError(str(error)) from error


def load_settings(path: Path | None) -> AgentSettings:
    """Read the settings file and the environment.

    Args:
        path: None means the default file, which may be absent.

    Raises:
        ConfigError: the named file is missing or something in it is wrong.
    """
    chosen = path or DEFAULT_SETTINGS
    try:
        text = chosen.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        if path is not None:
            raise ConfigError(f"settings file {path} does not exist") from error
        text = ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"settings file {chosen} cannot be read: {error}") from error
    return parse_settings(
        AgentSettings, text, source=str(chosen), environ=os.environ, prefix=ENVIRONMENT_PREFIX
    )
