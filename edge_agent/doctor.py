"""``edge-agent doctor``: everything that this device needs, checked one by one.

Each finding says what was seen and, when something is wrong, what to do.
"""

from __future__ import annotations

import importlib.util
import shutil
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import anyio

from edge_agent.blobs import BlobClient
from edge_agent.capability import describe_datasets, this_device
from edge_agent.doctor_finding import Finding
from edge_agent.doctor_limit import prove
from edge_agent.doctor_memory import limit_findings
from edge_agent.emulation import emulation_of
from edge_agent.identity import identity_of, remaining_s, tls_of
from edge_agent.join import find_broker_once
from edge_agent.renewal import renewal_due
from edge_agent.settings import AgentSettings, load_settings
from edge_agent.state_dir import StateDir
from wire_protocol.errors import LegendError

TRAINING_PACKAGES = ("torch", "transformers", "peft", "safetensors", "numpy")
REMEDIES = {
    "server": "start the server; correct 'server' and 'token' in the settings; or, if it refuses "
    "this device: edge-agent enroll --again",
    "state directory": "run as its owner, or choose another 'state_dir' in the settings",
    "board": "correct 'emulate' or 'sysroot' in the settings",
    "memory": "check that 'sysroot' holds /proc of this machine",
    "identity": "see what was seen; nothing is sent to the server until then",
}
LEAST_DISK_BYTES = 2 * 2**30
LEAST_MEMORY_BYTES = 700 * 2**20
"""What importing the training packages and loading a small model takes."""


def examine(settings_file: Path | None) -> list[Finding]:
    """Run every check; one that fails does not stop the others."""
    try:
        settings = load_settings(settings_file)
    except LegendError as error:
        return [Finding("settings", "broken", str(error), "correct the settings file")]
    findings = [Finding("settings", "ok", f"device {settings.device_id}")]
    checks: tuple[tuple[str, Callable[[AgentSettings], Iterator[Finding]]], ...] = (
        ("board", _board),
        ("state directory", _state_directory),
        ("memory", _memory),
        ("memory limit", _memory_limit),
        ("temperature", _temperature),
        ("datasets", _datasets),
        ("packages", _packages),
        ("identity", _identity),
        ("server", _server),
    )
    for name, check in checks:
        try:
            findings += check(settings)
        except LegendError as error:
            findings.append(Finding(name, "broken", str(error), REMEDIES.get(name, "")))
    return findings


def print_findings(findings: list[Finding]) -> None:
    """Show the findings as a table."""
    from rich.console import Console  # noqa: PLC0415 - slow to import
    from rich.markup import escape  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    colours = {"ok": "green", "warning": "yellow", "broken": "red"}
    table = Table("check", "state", "seen", "what to do")
    for finding in findings:
        colour = colours[finding.state]
        table.add_row(
            finding.check,
            f"[{colour}]{finding.state}[/]",
            escape(finding.seen),
            escape(finding.remedy),
        )
    Console().print(table)


def _board(settings: AgentSettings) -> Iterator[Finding]:
    emulation = emulation_of(settings.emulate) if settings.emulate else None
    device = this_device(settings, emulation)
    note = device.facts.note or device.facts.description
    yield Finding("board", "ok", f"{device.facts.board_id} ({note})")
    if emulation:
        yield Finding("emulation", "warning", emulation.label, "remove 'emulate' on a real board")


def _state_directory(settings: AgentSettings) -> Iterator[Finding]:
    state = StateDir(settings.state_dir)
    free = shutil.disk_usage(state.root).free
    enough = free >= LEAST_DISK_BYTES
    yield Finding(
        "disk",
        "ok" if enough else "warning",
        f"{free / 2**30:.1f} GiB free in {state.root}",
        "" if enough else "free some space: base models and caches need about 2 GiB",
    )


def _memory(settings: AgentSettings) -> Iterator[Finding]:
    budget = this_device(settings, None).memory_budget_bytes(trainer_pid=None)
    enough = budget >= LEAST_MEMORY_BYTES
    yield Finding(
        "memory",
        "ok" if enough else "broken",
        f"{budget / 2**20:.0f} MiB for training",
        "" if enough else "stop other programs or raise the memory limit of this service",
    )


def _memory_limit(settings: AgentSettings) -> Iterator[Finding]:
    yield from limit_findings(settings.sysroot, this_device(settings, None).facts, prove())


def _temperature(settings: AgentSettings) -> Iterator[Finding]:
    reading = this_device(settings, None).sensors()
    if reading.throttled:
        yield Finding(
            "throttling", "warning", "the board runs below its speed", "check cooling and supply"
        )
    elif reading.temperature_c is not None:
        yield Finding("temperature", "ok", f"{reading.temperature_c:.0f} degrees Celsius")


def _datasets(settings: AgentSettings) -> Iterator[Finding]:
    if not settings.datasets:
        yield Finding(
            "datasets", "warning", "none in the settings", "add one under 'datasets' to take part"
        )
    for name, report in describe_datasets(settings).items():
        if report.examples:
            seen = f"{name}: {report.examples} examples, {len(report.labels)} labels"
            yield Finding("dataset", "ok", seen)
        else:
            seen = f"{name}: {report.problem or 'it is empty'}"
            yield Finding(
                "dataset", "broken", seen, "correct the file, or its columns in 'datasets'"
            )


def _packages(settings: AgentSettings) -> Iterator[Finding]:
    if settings.trainer_python:
        yield Finding("packages", "warning", f"trainer runs under {settings.trainer_python}")
        return
    missing = [name for name in TRAINING_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        remedy = "pip install 'legend-edge[train]'; on aarch64 install torch<2.11 first"
        yield Finding("packages", "broken", f"missing: {', '.join(missing)}", remedy)
        return
    yield Finding("packages", "ok", ", ".join(f"{n} {_version(n)}" for n in TRAINING_PACKAGES))


def _identity(settings: AgentSettings) -> Iterator[Finding]:
    identity = identity_of(settings)
    if identity is None:
        yield Finding(
            "identity", "ok", "none: this device is not enrolled, and uses no TLS of ours"
        )
        return
    certificate, now = identity.certificate, time.time()
    days = remaining_s(certificate, now) / 86400
    seen = f"{certificate.common_name}, certificate good for {days:.0f} days"
    if now < certificate.not_before:
        yield Finding("clock", "warning", "earlier than this device's certificate", "set it: NTP")
    if renewal_due(certificate.not_before, certificate.not_after, now):
        yield Finding("identity", "warning", seen, "start the agent: it renews its certificate")
    else:
        yield Finding("identity", "ok", seen)


def _server(settings: AgentSettings) -> Iterator[Finding]:
    identity = identity_of(settings)

    async def ask() -> str:
        async with BlobClient(
            settings.server, token=settings.token, tls=tls_of(identity)
        ) as server:
            login = (await find_broker_once(settings, server, identity)).broker
            return f"{settings.server}, broker {login.host}:{login.port}"

    yield Finding("server", "ok", anyio.run(ask))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "?"
