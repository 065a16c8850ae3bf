"""Valid messages for tests, each with fields to change."""

from __future__ import annotations

from typing import Any

from wire_protocol.errors import FailureCode
from wire_protocol.messages import (
    Ack,
    Benchmark,
    Birth,
    Body,
    Capability,
    CertificateIssued,
    CertificateRequest,
    Command,
    Event,
    Failure,
    Heartbeat,
    Prefix,
    Progress,
    Rebirth,
    RoundCancel,
    RoundStart,
    State,
    TrainingRecipe,
    Unmeasured,
    UpdateManifest,
)
from wire_protocol.parts import (
    BlobRef,
    CapabilityProfile,
    ComputeReport,
    InferenceReport,
    LinkReport,
    StepReport,
)

SHA = "ab" * 32


def a_capability(**changes: Any) -> CapabilityProfile:
    """A measured device."""
    fields: dict[str, Any] = {
        "fingerprint": SHA,
        "memory_budget_bytes": 2_000_000_000,
        "disk_free_bytes": 9_000_000_000,
        "cpu_count": 4,
        "accelerator": "cpu",
        "link": LinkReport(up_bytes_per_s=1e6, down_bytes_per_s=2e6, round_trip_s=0.01),
        "compute": ComputeReport(
            model_digest=SHA,
            forward_seconds_per_token_layer=1e-5,
            backward_seconds_per_token_layer=2e-5,
            memory_base_bytes=500_000_000,
            memory_bytes_per_token=1000.0,
            memory_bytes_per_token_layer=5000.0,
        ),
        "inference": InferenceReport(p50_s=0.01, p95_s=0.02, tokens=32),
    }
    return CapabilityProfile.model_validate({**fields, **changes})


def a_birth(**changes: Any) -> Birth:
    """A device that introduces itself."""
    fields: dict[str, Any] = {
        "boot_id": "boot-1",
        "agent_version": "0.1.0",
        "board": "rpi-5-8",
        "capability": a_capability(),
        "datasets": {"triage": {"examples": 100, "labels": ("disk", "network")}},
        "heartbeat_s": 10.0,
    }
    return Birth.model_validate({**fields, **changes})


def a_recipe(**changes: Any) -> TrainingRecipe:
    """How a run trains."""
    fields: dict[str, Any] = {
        "task": "classification",
        "dataset": "triage",
        "labels": ("disk", "network"),
        "batch_size": 8,
        "learning_rate": 1e-3,
        "head_learning_rate": 5e-3,
        "max_tokens": 32,
    }
    return TrainingRecipe.model_validate({**fields, **changes})


def a_round_start(**changes: Any) -> RoundStart:
    """An assignment."""
    fields: dict[str, Any] = {
        "run_id": "run-1",
        "round_number": 1,
        "assignment_id": "run-1.1-0.pi-1",
        "ranks": (0, 4, 8),
        "steps": 5,
        "deadline_s": 60.0,
        "seed": 1,
        "recipe": a_recipe(),
        "adapter": BlobRef(sha256=SHA, size_bytes=1000),
        "model_digest": SHA,
    }
    return RoundStart.model_validate({**fields, **changes})


def a_report(**changes: Any) -> StepReport:
    """What an assignment cost."""
    fields: dict[str, Any] = {
        "steps_done": 5,
        "tokens": 500,
        "forward_s": 1.0,
        "backward_s": 1.0,
        "training_s": 2.0,
        "download_s": 0.1,
        "download_bytes": 1000,
        "upload_s": 0.1,
        "upload_bytes": 800,
        "peak_memory_bytes": 900_000_000,
        "batch_size": 8,
        "first_loss": 0.9,
        "last_loss": 0.5,
    }
    return StepReport.model_validate({**fields, **changes})


def a_manifest(**changes: Any) -> UpdateManifest:
    """An update."""
    fields: dict[str, Any] = {
        "run_id": "run-1",
        "round_number": 1,
        "assignment_id": "run-1.1-0.pi-1",
        "base_sha256": SHA,
        "ranks": (0, 4, 8),
        "update": BlobRef(sha256="cd" * 32, size_bytes=800),
        "examples": 100,
        "report": a_report(),
    }
    return UpdateManifest.model_validate({**fields, **changes})


def every_message() -> list[Body]:
    """One of every kind, and of every variant inside."""
    progress = Progress(assignment_id="a", phase="training", step=1, steps=5, loss=0.7)
    failure = Failure(assignment_id="a", code=FailureCode.OUT_OF_MEMORY, detail="no memory")
    return [
        State(online=True),
        a_birth(emulated="jetson-tx2 MAXN, 8x slower than real"),
        Heartbeat(sequence=3, busy_with="a", rss_bytes=5),
        Event(event=progress),
        Event(event=failure),
        Event(event=Capability(capability=a_capability())),
        Event(event=Unmeasured(model_digest=SHA, detail="torch is not installed")),
        a_manifest(),
        Command(command=a_round_start()),
        Command(command=a_round_start(prefix=Prefix())),
        Command(command=a_round_start(prefix=Prefix(adapter=BlobRef(sha256=SHA, size_bytes=9)))),
        Command(command=RoundCancel(assignment_id="a", reason="too late")),
        Command(command=Rebirth(jitter_s=2.0)),
        Command(command=Benchmark(model_digest=SHA)),
        Ack(re="m", status="rejected", code="stale", detail="over", retry_after_s=0.0),
        CertificateRequest(csr_pem="-----BEGIN CERTIFICATE REQUEST-----"),
        CertificateIssued(certificate_pem="-----BEGIN CERTIFICATE-----"),
    ]
