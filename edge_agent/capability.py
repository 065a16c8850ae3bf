"""What this device is and can do: board, budgets, datasets, the last benchmark.

Reads the machine through ``board`` and ``sensors`` and writes nothing but the
cached benchmark. Knows no MQTT and no HTTP.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import time
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import structlog
from pydantic import ValidationError

from edge_agent.board import BoardFacts, detect_board, memory_budget
from edge_agent.dataset import describe
from edge_agent.emulation import Emulation
from edge_agent.sensors import SensorReading, read_sensors, run_program
from edge_agent.settings import AgentSettings
from edge_agent.state_dir import StateDir, write_durably
from profiles.loader import load_board
from wire_protocol.errors import DeviceError
from wire_protocol.parts import CapabilityProfile, DatasetReport
from wire_protocol.records import Columns

log = structlog.get_logger()

MEASURED_PACKAGES = ("legend-edge", "torch", "transformers", "peft", "onnxruntime")
"""A new version of one of these changes what a benchmark would measure."""

PROBE_FILE_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True)
class Device:
    """This machine, as far as the agent needs to know it.

    Args:
        settings: the agent's settings.
        emulation: the board to imitate, if any.
        facts: the board that this really is.
    """

    settings: AgentSettings
    emulation: Emulation | None
    facts: BoardFacts

    @property
    def board(self) -> str:
        """The board to schedule for: the imitated one, else the real one."""
        return self.emulation.board if self.emulation else self.facts.board_id

    @property
    def precision(self) -> str:
        """Number format that the board profile allows for training."""
        return load_board(self.facts.board_id).precision

    def memory_budget_bytes(self, *, trainer_pid: int | None) -> int:
        """Memory that the trainer may hold in all.

        Args:
            trainer_pid: a warm trainer, whose memory is not free but its own.
        """
        held = resident_bytes(trainer_pid) if trainer_pid else 0
        limits = [memory_budget(self.settings.sysroot).available_bytes + held]
        if self.emulation:
            limits.append(self.emulation.memory_bytes)
        if self.settings.memory_limit_bytes:
            limits.append(self.settings.memory_limit_bytes)
        return min(limits)

    def sensors(self) -> SensorReading:
        """Temperature, throttling and power, where the board tells."""
        return read_sensors(self.settings.sysroot, run_program)

    def fingerprint(self, model_digest: str) -> str:
        """Changes whenever a benchmark would measure something else."""
        parts = {
            "facts": asdict(self.facts),
            "emulation": asdict(self.emulation) if self.emulation else None,
            "packages": {name: _version(name) for name in MEASURED_PACKAGES},
            "python": platform.python_version(),
            "threads": self.settings.threads,
            "memory_limit_bytes": self.settings.memory_limit_bytes,
            "model": model_digest,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def this_device(settings: AgentSettings, emulation: Emulation | None) -> Device:
    """Look at the machine that we run on."""
    return Device(settings, emulation, detect_board(settings.sysroot, machine=platform.machine()))


def plain_capability(
    device: Device, state: StateDir, *, trainer_pid: int | None = None
) -> CapabilityProfile:
    """What can be said without a benchmark; cheap enough for every birth."""
    reading = device.sensors()
    power_mode = device.emulation.power_mode if device.emulation else device.facts.power_mode
    return CapabilityProfile(
        fingerprint=device.fingerprint(""),
        memory_budget_bytes=device.memory_budget_bytes(trainer_pid=trainer_pid),
        disk_free_bytes=shutil.disk_usage(state.root).free,
        cpu_count=device.facts.cpu_count,
        accelerator=load_board(device.board).accelerator,
        temperature_c=reading.temperature_c,
        power_mode=power_mode,
        throttled=reading.throttled,
    )


def current_capability(
    device: Device, state: StateDir, *, trainer_pid: int | None = None
) -> CapabilityProfile:
    """The last benchmark that still holds, with today's budgets; else without one."""
    plain = plain_capability(device, state, trainer_pid=trainer_pid)
    cached = last_benchmark(device, state)
    if cached is None:
        return plain
    return cached.model_copy(
        update={
            "memory_budget_bytes": plain.memory_budget_bytes,
            "disk_free_bytes": plain.disk_free_bytes,
            "temperature_c": plain.temperature_c,
            "throttled": plain.throttled,
        }
    )


def last_benchmark(device: Device, state: StateDir) -> CapabilityProfile | None:
    """The last benchmark, if it still holds; asks no sensor, so its budgets are of that time."""
    cached = _benchmark_on_disk(state)
    if cached is None or cached.compute is None:
        return None
    return cached if cached.fingerprint == device.fingerprint(cached.compute.model_digest) else None


def describe_datasets(settings: AgentSettings) -> dict[str, DatasetReport]:
    """Sizes and labels; a dataset that cannot be read is reported with the reason."""
    reports = {}
    for name, dataset in settings.datasets.items():
        columns = Columns(dataset.text, dataset.text_pair, dataset.label)
        try:
            examples, labels = describe(dataset.path, columns)
            reports[name] = DatasetReport(examples=examples, labels=labels)
        except DeviceError as error:
            log.error("dataset_unreadable", dataset=name, code=error.code.value, error=str(error))
            reports[name] = DatasetReport(examples=0, problem=str(error)[:500])
    return reports


def remember_benchmark(state: StateDir, capability: CapabilityProfile) -> None:
    """Keep a benchmark for the next start."""
    content = capability.model_dump_json().encode()
    write_durably(_cache_file(state), content, site="agent.benchmark_cache")


def resident_bytes(pid: int) -> int:
    """Memory that a process holds now; 0 when it is gone. Source: proc(5), statm."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure_disk(folder: Path) -> float:
    """Write speed to the disk itself, in bytes per second."""
    path = folder / ".disk-probe"
    data = os.urandom(PROBE_FILE_BYTES)
    began = time.perf_counter()
    try:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return PROBE_FILE_BYTES / max(1e-6, time.perf_counter() - began)
    finally:
        path.unlink(missing_ok=True)


def _cache_file(state: StateDir) -> Path:
    return state.cache / "benchmark.json"


def _benchmark_on_disk(state: StateDir) -> CapabilityProfile | None:
    path = _cache_file(state)
    try:
        return CapabilityProfile.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValidationError, OSError) as error:
        log.warning("benchmark_cache_ignored", path=str(path), error=str(error))
        return None


@cache
def _version(package: str) -> str | None:
    # Every round asks; reading it anew takes milliseconds, and what is loaded does not change.
    try:
        return version(package)
    except PackageNotFoundError:
        return None
