"""What a person writes to start a run, and what the server accepts for it.

Two specifications share every key but one: in a YAML file ``evaluation`` names
a local held-out file (``LocalRunSpec``), at the server it names bytes that were
uploaded before (``RunSpec``). Knows files and their formats; knows no HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)
from typing_extensions import Self

from wire_protocol.errors import ConfigError
from wire_protocol.lora import Codec
from wire_protocol.parts import Count, Sha256
from wire_protocol.plain_yaml import read_yaml as yaml_values
from wire_protocol.records import Columns, Example, parse_rows, to_examples
from wire_protocol.settings import explain

Name = Annotated[str, Field(min_length=1, max_length=80)]

StrategyName = Literal[
    "legend",
    "legend-paper",
    "fedlora",
    "hetlora",
    "flexlora",
    "fedadapter",
    "fedquad",
    "ffa",
    "rolora",
]
"""Written out, because this module is read where NumPy need not be installed."""

LossName = Literal["plain", "balanced"]

DEFAULTS: Mapping[str, Mapping[str, object]] = {
    "legend": {"codec": Codec.INT8, "adapter_codec": Codec.INT8, "loss": "balanced"}
}
"""What a run has where it does not say, by strategy; the papers write fp32 and train plainly."""


class _Strict(BaseModel):
    """A misspelled key must stop us; YAML reads a label 0 as a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)


class LocalEvaluation(_Strict):
    """A held-out file on this machine and its columns."""

    path: Path
    text: Name = "text"
    text_pair: Name | None = None
    label: Name = "label"

    @property
    def columns(self) -> Columns:
        """Which columns hold what."""
        return Columns(self.text, self.text_pair, self.label)


class StoredEvaluation(_Strict):
    """Held-out examples in the server's blob store, as canonical JSON lines."""

    sha256: Sha256
    size_bytes: Count


class PrivacySettings(_Strict):
    """User-level differential privacy: how much one device may change the adapter.

    Attributes:
        clip_norm: largest Euclidean norm of a device's whole update.
        noise_multiplier: standard deviation of the noise on the sum of the
            updates, in units of ``clip_norm``.
        delta: chance that epsilon does not hold; below one over the devices.
        test_noise_seed: makes the noise repeatable and therefore worthless; for
            tests alone. Without it the operating system seeds the noise.
    """

    clip_norm: float = Field(gt=0, le=1e6, allow_inf_nan=False)
    noise_multiplier: float = Field(gt=0, le=1e6, allow_inf_nan=False)
    delta: float = Field(default=1e-5, gt=0, lt=0.1)
    test_noise_seed: Count | None = None


class RunOptions(_Strict):
    """Every key of a run except where its held-out examples are.

    Attributes:
        model: name or digest of a registered base model.
        dataset: name that each device maps to a local file.
        labels: classes in the order of the head; empty means the labels of
            the held-out examples, sorted.
        devices_per_round: size of the cohort; None means every device.
        deadline_s: seconds a round may take; None lets the server choose.
        quorum: share of the cohort whose updates end a round early.
        target_accuracy: the run ends once it is reached.
        loss: ``balanced`` lets each device allow for how often its classes occur.
        privacy: user-level differential privacy; None for none.
    """

    name: Name
    model: Name
    strategy: StrategyName = "legend"
    strategy_options: dict[str, JsonValue] = Field(default_factory=dict)
    task: Literal["classification", "instruction"] = "classification"
    dataset: Name
    labels: tuple[Name, ...] = ()
    rounds: int = Field(default=8, ge=1, le=100_000)
    devices_per_round: int | None = Field(default=None, ge=1)
    local_steps: int = Field(default=10, ge=1, le=1_000_000)
    batch_size: int = Field(default=16, ge=1, le=4096)
    learning_rate: float = Field(default=1e-3, gt=0, le=1)
    head_learning_rate: float = Field(default=5e-3, gt=0, le=1)
    max_tokens: int = Field(default=64, ge=4, le=8192)
    codec: Codec = Codec.FP32
    adapter_codec: Codec = Codec.FP32
    deadline_s: float | None = Field(default=None, gt=0, le=1e7)
    quorum: float = Field(default=1.0, gt=0, le=1)
    target_accuracy: float | None = Field(default=None, gt=0, le=1)
    loss: LossName = "plain"
    privacy: PrivacySettings | None = None
    seed: Count = 0

    @model_validator(mode="before")
    @classmethod
    def _defaults_are_those_of_the_strategy(cls, document: Any) -> Any:
        if not isinstance(document, Mapping):
            return document
        strategy = document.get("strategy", cls.model_fields["strategy"].default)
        # Whatever a person wrote there, it is not looked up before it is checked.
        defaults = dict(DEFAULTS.get(str(strategy), {}))
        if document.get("task") == "instruction":
            defaults.pop("loss", None)
        return {**defaults, **document}

    @model_validator(mode="after")
    def _only_classes_are_balanced(self) -> Self:
        if self.loss == "balanced" and self.task != "classification":
            raise ValueError("loss balanced needs task classification: it counts classes")
        return self

    @field_validator("labels")
    @classmethod
    def _labels_differ(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(labels)) != len(labels):
            raise ValueError("a label is listed twice")
        return labels


class RunSpec(RunOptions):
    """A run as the server accepts it: the body of ``POST /v1/runs``."""

    evaluation: StoredEvaluation


class LocalRunSpec(RunOptions):
    """A run as a person writes it: the YAML file of ``legend launch``."""

    evaluation: LocalEvaluation

    def submitted(self, held_out: HeldOut, stored: StoredEvaluation) -> RunSpec:
        """The same run for the server, which gets bytes instead of a path."""
        labels = self.labels or (held_out.labels if self.task == "classification" else ())
        rest = self.model_dump(exclude={"evaluation", "labels"})
        return RunSpec(**rest, labels=labels, evaluation=stored)


@dataclass(frozen=True)
class HeldOut:
    """Held-out examples, ready to be uploaded.

    Attributes:
        content: one JSON object a line, keys text, text_pair (if any), label.
        labels: the labels that occur, sorted.
    """

    content: bytes
    labels: tuple[str, ...]


_Spec = TypeVar("_Spec", RunSpec, LocalRunSpec)


def parse_run_spec(document: Mapping[str, Any]) -> RunSpec:
    """Check the body of ``POST /v1/runs``.

    Raises:
        ConfigError: a key is unknown, missing or has a bad value; one line.
    """
    return _validated(RunSpec, document)


def load_run_spec(path: Path, overrides: Sequence[str] = ()) -> LocalRunSpec:
    """Read a run file and apply ``key=value`` overrides to it.

    Args:
        path: a YAML file; without a ``name`` the run is called like the file.
        overrides: values are YAML; dots reach inside (``strategy_options.rank_min=4``).

    Raises:
        ConfigError: the file is missing or not YAML, or a key is unknown,
            missing or has a bad value.
    """
    document = read_yaml(path)
    document.setdefault("name", path.stem)
    for override in overrides:
        apply_override(document, override)
    evaluation = document.get("evaluation")
    if isinstance(evaluation, dict) and isinstance(evaluation.get("path"), str):
        local = Path(evaluation["path"]).expanduser()
        document["evaluation"] = {**evaluation, "path": path.parent / local}
    try:
        return _validated(LocalRunSpec, document)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def read_held_out(evaluation: LocalEvaluation) -> HeldOut:
    """Convert a held-out file to canonical JSON lines.

    Raises:
        ConfigError: the file cannot be read, lacks a column or is empty.
    """
    path = evaluation.path
    try:
        examples = to_examples(read_rows(path), evaluation.columns)
    except ConfigError as error:
        raise ConfigError(f"held-out file {path}: {error}") from error
    if not examples:
        raise ConfigError(f"held-out file {path} holds no examples")
    labels = tuple(sorted({example.label for example in examples}))
    return HeldOut(canonical_lines(examples), labels)


def canonical_lines(examples: Iterable[Example]) -> bytes:
    """One JSON object a line with the keys text, text_pair (if any) and label."""
    return "".join(_json_line(example) for example in examples).encode()


def read_rows(path: Path) -> list[Mapping[str, Any]]:
    """Every row of a csv, tsv, JSON lines or parquet file.

    Raises:
        ConfigError: the file is missing, not UTF-8 or of another format.
    """
    try:
        if path.suffix == ".parquet":
            return _parquet_rows(path)
        return list(parse_rows(path.read_bytes().decode("utf-8-sig"), path.suffix))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text") from error


def _parquet_rows(path: Path) -> list[Mapping[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet  # noqa: PLC0415 - large and optional
    except ImportError as error:
        raise ConfigError(f"{path} needs pyarrow: pip install 'legend-edge[train]'") from error
    try:
        rows: list[Mapping[str, Any]] = parquet.read_table(path).to_pylist()
    except ArrowException as error:
        raise ConfigError(f"{path} is not a parquet file") from error
    return rows


def _json_line(example: Example) -> str:
    # Escaped to ASCII: readers split at U+2028 and U+0085 too, which JSON allows in strings.
    fields = {"text": example.text, "text_pair": example.text_pair, "label": example.label}
    present = {key: value for key, value in fields.items() if value is not None}
    return json.dumps(present, separators=(",", ":")) + "\n"


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys of a YAML file.

    Raises:
        ConfigError: it is missing, not YAML or holds no keys.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read run file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not YAML: it is not UTF-8 text") from error
    document = yaml_values(text, source=str(path))
    if not isinstance(document, dict):
        raise ConfigError(f"{path} does not hold the keys of a run")
    return document


def apply_override(document: dict[str, Any], override: str) -> None:
    """Put ``key=value`` into a document; dots in the key reach inside.

    Raises:
        ConfigError: no key, a value that is not YAML, or a key below a plain value.
    """
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set needs key=value, not {override!r}")
    value = yaml_values(text, source=f"--set {key}: the value")
    *parents, last = key.split(".")
    place = document
    for parent in parents:
        child = place.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {key}: {parent} has no keys below it")
        place = child
    place[last] = value


def _validated(model: type[_Spec], document: Mapping[str, Any]) -> _Spec:
    try:
        return model.model_validate(document)
    except ValidationError as error:
        raise ConfigError(explain(error, model)) from error
