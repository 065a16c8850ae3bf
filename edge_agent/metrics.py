"""What an agent counts, and ``/metrics`` for those who ask for it with ``metrics_port``.

Off, it costs a handful of numbers: Prometheus' library is loaded by ``serve_metrics`` alone. On, it
answers from a thread of its own and only reads.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edge_agent.capability import resident_bytes
from edge_agent.settings import AgentSettings
from wire_protocol.drop_reason import drop_reason
from wire_protocol.errors import ConfigError, ProtocolError

if TYPE_CHECKING:
    from prometheus_client.core import Metric


@dataclass
class AgentCounters:
    """Counts since the start of this process.

    Attributes:
        dropped: messages that were not understood or not believed, by reason.
        refused: updates that the server did not take, by what it said first.
        resends: messages of the outbox that were sent again.
        status: what ``edge-agent status`` shows; read by the metrics, written by the agent's loop.
    """

    dropped: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    resends: int = 0
    status: dict[str, object] = field(default_factory=dict)
    _sent: set[str] = field(default_factory=set)

    def drop(self, error: ProtocolError) -> str:
        """Count a dropped message; returns the word for the reason."""
        reason = drop_reason(error)
        self.dropped[reason] += 1
        return reason

    def handed_out(self, message_id: str) -> None:
        """Count a message of the outbox that goes to the broker."""
        self.resends += message_id in self._sent
        self._sent.add(message_id)

    def answered(self, message_id: str, *, rejected: bool) -> None:
        """Forget a message that the server has answered."""
        self._sent.discard(message_id)
        self.refused += rejected


@contextmanager
def serve_metrics(settings: AgentSettings, counters: AgentCounters) -> Iterator[None]:
    """Answer scrapes while the block runs; does nothing without ``metrics_port``.

    Raises:
        ConfigError: the port is taken, or Prometheus' library is not installed.
    """
    if settings.metrics_port is None:
        yield
        return
    try:
        from prometheus_client import (  # noqa: PLC0415 - 1.3 MB that most agents need not hold
            CollectorRegistry,
            start_http_server,
        )
    except ImportError as error:
        raise ConfigError(
            "'metrics_port' needs a package: pip install prometheus-client"
        ) from error
    registry = CollectorRegistry()
    registry.register(_AgentCollector(settings, counters))
    host, port = settings.metrics_host, settings.metrics_port
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise ConfigError(
            f"cannot serve metrics on {host}:{port}: {error.strerror}; choose another metrics_port"
        ) from error
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _AgentCollector:
    """Reads the counters at every scrape; what prometheus_client calls a collector."""

    def __init__(self, settings: AgentSettings, counters: AgentCounters) -> None:
        self._settings = settings
        self._counters = counters

    def describe(self) -> Iterator[Metric]:
        """Nothing beforehand."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """One scrape."""
        from prometheus_client.core import (  # noqa: PLC0415 - loaded by serve_metrics
            CounterMetricFamily,
            GaugeMetricFamily,
        )

        dropped = CounterMetricFamily(
            "legend_agent_dropped_messages", "Not understood or not believed.", labels=("reason",)
        )
        # A copy: the agent's thread may count on meanwhile.
        for reason, count in sorted(dict(self._counters.dropped).items()):
            dropped.add_metric((reason,), count)
        yield dropped
        counts = {
            "resends": (self._counters.resends, "Messages of the outbox that were sent again."),
            "refused_updates": (self._counters.refused, "Updates that the server did not take."),
            "sent_bytes": (self._status("sent_bytes"), "To the server, over HTTP."),
            "received_bytes": (self._status("received_bytes"), "From the server, over HTTP."),
            "trainer_starts": (self._status("trainer_starts"), "Trainer processes so far."),
        }
        for name, (value, text) in counts.items():
            yield CounterMetricFamily(f"legend_agent_{name}", text, value=value)
        gauges = {
            "connected": (self._status("connected"), "Whether the broker is there."),
            "busy": (bool(self._counters.status.get("busy_with")), "Whether it has an assignment."),
            "outbox_depth": (self._status("outbox"), "Messages without the server's ack."),
            "resident_memory_bytes": (resident_bytes(os.getpid()), "Of the agent itself."),
            "disk_free_bytes": (
                shutil.disk_usage(self._settings.state_dir).free,
                "Where state_dir lies.",
            ),
        }
        for name, (value, text) in gauges.items():
            yield GaugeMetricFamily(f"legend_agent_{name}", text, value=float(value))

    def _status(self, key: str) -> float:
        value = self._counters.status.get(key, 0)
        return float(value) if isinstance(value, (int, float)) else 0.0
