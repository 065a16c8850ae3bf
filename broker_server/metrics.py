"""``GET /metrics``: the server's counters and gauges in Prometheus' text format.

Nothing is kept twice: a collector reads the server when it is asked. What rounds cost is summed up
from the store, so those totals survive a restart.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from broker_server.run_state import RoundResult, RunStatus
from broker_server.server import Server
from broker_server.store import Store

__all__ = ["CONTENT_TYPE_LATEST", "Metrics"]

ROUND_SECONDS = (5.0, 15.0, 60.0, 180.0, 600.0, 1800.0, 3600.0, 10800.0)
"""Upper bounds of the buckets of round times."""


class RoundTotals:
    """Sums over every committed round; reads each of them once."""

    def __init__(self) -> None:
        self._read: dict[str, int] = {}
        self._within = [0] * (len(ROUND_SECONDS) + 1)
        self.duration_s = 0.0
        self.waiting_s = 0.0
        self.bytes_up = 0
        self.bytes_down = 0
        self.members: dict[str, int] = {}

    def catch_up(self, store: Store) -> None:
        """Add what was committed since the last time."""
        for run_id, count in store.round_counts().items():
            done = self._read.get(run_id, 0)
            if count <= done:
                continue
            for text in store.rounds(run_id, after=done):
                self._add(RoundResult.model_validate_json(text))
            self._read[run_id] = count

    @property
    def buckets(self) -> list[tuple[str, float]]:
        """Rounds that took at most so long, as the text format wants them."""
        names = [str(bound) for bound in ROUND_SECONDS] + ["+Inf"]
        sums = [sum(self._within[: index + 1]) for index in range(len(names))]
        return [(name, float(count)) for name, count in zip(names, sums, strict=True)]

    def _add(self, result: RoundResult) -> None:
        bounds = (*ROUND_SECONDS, float("inf"))
        self._within[next(i for i, bound in enumerate(bounds) if result.duration_s <= bound)] += 1
        self.duration_s += result.duration_s
        self.waiting_s += result.waiting_s
        self.bytes_up += result.bytes_up
        self.bytes_down += result.bytes_down
        for device in result.devices:
            self.members[device.status] = self.members.get(device.status, 0) + 1


class Metrics(Collector):
    """Everything that a server tells Prometheus.

    Args:
        server: is read at every scrape, on the event loop.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self._rounds = RoundTotals()
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def text(self) -> bytes:
        """The answer to one scrape."""
        return generate_latest(self._registry)

    def describe(self) -> Iterator[Metric]:
        """Nothing beforehand: registering must not read a server that is being put together."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Read the server."""
        yield from self._fleet()
        yield from self._messages()
        yield from self._runs()
        yield from self._http()
        yield from self._machine()

    def _fleet(self) -> Iterator[Metric]:
        known = self._server.fleet.devices.values()
        online = sum(device.online for device in known)
        states = {"online": online, "lost": len(known) - online}
        yield _gauges("legend_devices", "Known devices.", "state", states)
        measured = sum(device.capability.compute is not None for device in known)
        yield _gauge("legend_devices_measured", "Devices with a benchmark.", measured)
        throttled = sum(bool(device.capability.throttled) for device in known)
        yield _gauge("legend_devices_throttled", "Devices below their speed.", throttled)
        link = self._server.link
        yield _gauge("legend_broker_connected", "Whether the broker is there.", link.connected)

    def _messages(self) -> Iterator[Metric]:
        counters = self._server.counters
        yield _counter(
            "legend_dropped_messages",
            "Messages of devices that were not understood or not believed.",
            ("channel", "reason"),
            counters.dropped,
        )
        yield _counter(
            "legend_answers_to_devices",
            "Application acks sent; rejected ones are refused updates.",
            ("status", "code"),
            counters.acks,
        )
        commands = {(kind,): count for kind, count in counters.commands.items()}
        yield _counter("legend_commands", "Commands sent to devices.", ("type",), commands)
        yield _counter("legend_resent_assignments", "Sent more than once.", (), counters.resent)
        yield _counter(
            "legend_unsaved_births", "Kept in memory only: no space.", (), counters.unsaved
        )
        waiting = self._server.link.waiting
        yield _gauge("legend_message_queue_depth", "Messages waiting to be processed.", waiting)

    def _runs(self) -> Iterator[Metric]:
        store, active = self._server.store, self._server.runs.active
        totals = self._rounds
        totals.catch_up(store)
        states = {status.value: 0 for status in RunStatus}
        for status in store.statuses().values():
            states[status] += 1
        yield _gauges("legend_runs", "Runs by state; queued ones wait.", "state", states)
        round_number = active.coordinator.round_number if active else 0
        yield _gauge("legend_run_round", "Round of the active run; 0: none.", round_number)
        times = HistogramMetricFamily("legend_round_seconds", "From assignment to new adapter.")
        times.add_metric([], buckets=totals.buckets, sum_value=totals.duration_s)
        yield times
        yield _counter("legend_waiting_seconds", "Mean waits, summed up.", (), totals.waiting_s)
        members = {(status,): count for status, count in totals.members.items()}
        yield _counter("legend_round_devices", "What became of members.", ("status",), members)
        up, down = totals.bytes_up, totals.bytes_down
        yield _counter("legend_round_up_bytes", "Bytes of accepted updates.", (), up)
        yield _counter("legend_round_down_bytes", "Bytes of global adapters.", (), down)

    def _http(self) -> Iterator[Metric]:
        counters = self._server.counters
        answers = {(method, str(status)): n for (method, status), n in counters.answers.items()}
        labels = ("method", "status")
        yield _counter("legend_http_answers", "Answers of the HTTP API.", labels, answers)
        refused = {(reason,): count for reason, count in self._server.refused.items()}
        yield _counter("legend_refused_requests", "Not allowed.", ("reason",), refused)
        received, sent = counters.received_bytes, counters.sent_bytes
        yield _counter("legend_http_received_bytes", "Bodies that came in.", (), received)
        yield _counter("legend_http_sent_bytes", "Bodies that went out.", (), sent)
        yield _counter("legend_uploads", "Blobs that arrived whole.", (), counters.uploads)
        parts = open_uploads(self._server.state.blobs)
        yield _gauge("legend_open_uploads", "Blobs that arrived in part.", len(parts))
        yield _gauge("legend_open_upload_bytes", "Bytes of those.", sum(parts))

    def _machine(self) -> Iterator[Metric]:
        state = self._server.state
        disk = os.statvfs(state.root)
        yield _gauge("legend_disk_free_bytes", "For the server.", disk.f_bavail * disk.f_frsize)
        yield _gauge("legend_disk_bytes", "The whole disk.", disk.f_blocks * disk.f_frsize)
        if (file := self._server.store.file) is not None:
            yield _gauge("legend_database_bytes", "With its log.", database_bytes(file))
        yield _gauge("legend_resident_memory_bytes", "Of this process.", resident_bytes())
        started = self._server.voice.start_number
        yield _gauge("legend_server_starts", "How often this server has started.", started)
        build = GaugeMetricFamily("legend_build", "What runs here.", labels=("version", "fleet"))
        build.add_metric((version("legend-edge"), self._server.settings.fleet), 1.0)
        yield build


def open_uploads(blobs: Path) -> list[int]:
    """Bytes of every upload that is not complete."""
    sizes = []
    for part in (blobs / "parts").iterdir():
        try:
            sizes.append(part.stat().st_size)
        except FileNotFoundError:
            continue  # complete since we looked
    return sizes


def database_bytes(file: Path) -> int:
    """An SQLite file with its write-ahead log and index."""
    names = (file, file.with_name(file.name + "-wal"), file.with_name(file.name + "-shm"))
    return sum(path.stat().st_size for path in names if path.exists())


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _gauge(name: str, help_text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, help_text, value=float(value))


def _gauges(name: str, help_text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(name, help_text, labels=(label,))
    for key, value in values.items():
        family.add_metric((key,), float(value))
    return family


def _counter(
    name: str, help_text: str, labels: tuple[str, ...], values: float | Mapping[Any, float]
) -> Metric:
    family = CounterMetricFamily(name, help_text, labels=labels)
    if isinstance(values, Mapping):
        for key, value in sorted(values.items()):
            family.add_metric(key, float(value))
    else:
        family.add_metric((), float(values))
    return family
