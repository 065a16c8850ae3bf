"""The pieces that messages are made of: names and quantities with their limits, and reports."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Identifier = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,119}$")]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False, le=1e9)]
Count = Annotated[int, Field(ge=0, le=2**53)]
Line = Annotated[str, Field(max_length=500)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Part(BaseModel):
    """A piece of a message: immutable, unknown fields ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class BlobRef(Part):
    """Bytes in the server's blob store, named by their digest."""

    sha256: Sha256
    size_bytes: Count


class LinkReport(Part):
    """The path between a device and the server, as the device saw it."""

    up_bytes_per_s: float = Field(gt=0, allow_inf_nan=False)
    down_bytes_per_s: float = Field(gt=0, allow_inf_nan=False)
    round_trip_s: Seconds


class ComputeReport(Part):
    """What one training step costs on this device with one base model.

    A step over ``t`` tokens at depth ``k`` of ``L`` layers takes about
    ``t * (forward * L + backward * k)`` seconds and peaks at
    ``base + t * (frozen + trained * k)`` bytes of memory.

    Source: arXiv:2412.20004, capacity estimation (F and mu per device).
    """

    model_digest: Sha256
    forward_seconds_per_token_layer: float = Field(gt=0, allow_inf_nan=False)
    backward_seconds_per_token_layer: float = Field(gt=0, allow_inf_nan=False)
    memory_base_bytes: Count
    memory_bytes_per_token: float = Field(ge=0, allow_inf_nan=False)
    memory_bytes_per_token_layer: float = Field(ge=0, allow_inf_nan=False)


class InferenceReport(Part):
    """onnxruntime latency of the base model, one sequence at a time."""

    p50_s: Seconds
    p95_s: Seconds
    tokens: Count


class DatasetReport(Part):
    """One local dataset, without any of its contents."""

    examples: Count
    labels: tuple[Annotated[str, Field(max_length=80)], ...] = ()
    problem: Line = ""


class CapabilityProfile(Part):
    """What one device measured about itself."""

    fingerprint: Sha256
    memory_budget_bytes: Count
    disk_free_bytes: Count
    disk_write_bytes_per_s: Finite | None = None
    cpu_count: Count
    accelerator: Line
    link: LinkReport | None = None
    compute: ComputeReport | None = None
    inference: InferenceReport | None = None
    temperature_c: Finite | None = None
    power_mode: Line | None = None
    throttled: bool | None = None


GradientSize = Annotated[float, Field(ge=0, le=1e30)]


class StepReport(Part):
    """What the assignment really cost; feeds the server's capacity estimates.

    The bytes are those that really crossed the link in the seconds beside
    them: what was cached, or there from an earlier attempt, does not count.
    ``forward_token_layers`` counts the token-layer pairs of all forward passes:
    fewer than tokens times layers where frozen layers were read back from a
    cache; None where all of them ran. ``energy_j`` is what the board drew in
    training, where it can be measured or its profile tells. ``layer_gradients``
    is the root mean square of a value's gradient in each trained layer, the output
    layer last.
    """

    steps_done: int = Field(ge=1, le=2**53)
    tokens: int = Field(ge=1, le=2**53)
    forward_s: Seconds
    backward_s: Seconds
    training_s: Seconds
    download_s: Seconds
    download_bytes: Count
    upload_s: Seconds
    upload_bytes: Count
    peak_memory_bytes: Count
    batch_size: int = Field(ge=1)
    gradient_checkpointing: bool = False
    first_loss: float = Field(allow_inf_nan=False)
    last_loss: float = Field(allow_inf_nan=False)
    forward_token_layers: Count | None = None
    energy_j: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    layer_gradients: Annotated[tuple[GradientSize, ...], Field(max_length=512)] | None = None
