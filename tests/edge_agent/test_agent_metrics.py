"""The agent's /metrics: off by default and then free; on, a real scrape says what happened."""

from __future__ import annotations

import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from edge_agent.metrics import AgentCounters, serve_metrics
from edge_agent.settings import AgentSettings
from tests.support.ports import free_port
from wire_protocol.errors import ConfigError, ProtocolError


def test_a_scrape_says_what_the_agent_counted(tmp_path: Path) -> None:
    settings = AgentSettings(device_id="pi", state_dir=tmp_path, metrics_port=free_port())
    counters = AgentCounters()
    counters.drop(ProtocolError("the message is not signed"))
    for _ in range(3):
        counters.handed_out("update-a")
    counters.handed_out("update-b")
    counters.answered("update-a", rejected=True)
    counters.handed_out("update-a")  # a new life of the same name is no resend
    counters.status = {"connected": True, "outbox": 2, "sent_bytes": 500, "busy_with": "a"}
    with serve_metrics(settings, counters):
        url = f"http://127.0.0.1:{settings.metrics_port}/metrics"
        with urllib.request.urlopen(url) as answer:
            text = answer.read().decode()
    found = {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert found["legend_agent_dropped_messages_total"] == 1
    assert 'reason="not_signed"' in text
    assert found["legend_agent_resends_total"] == 2
    assert found["legend_agent_refused_updates_total"] == 1
    assert found["legend_agent_outbox_depth"] == 2
    assert found["legend_agent_sent_bytes_total"] == 500
    assert (found["legend_agent_connected"], found["legend_agent_busy"]) == (1, 1)
    assert found["legend_agent_resident_memory_bytes"] > 10_000_000
    assert found["legend_agent_disk_free_bytes"] > 0
    with socket.create_server(("127.0.0.1", settings.metrics_port or 0)):
        pass  # given back


def test_a_taken_port_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings = AgentSettings(device_id="pi", state_dir=tmp_path, metrics_port=port)
        with (
            pytest.raises(ConfigError, match="choose another metrics_port"),
            serve_metrics(settings, AgentCounters()),
        ):
            pass


def test_off_it_loads_nothing() -> None:
    code = (
        "import sys; import edge_agent.app; from edge_agent.metrics import *\n"
        "from edge_agent.settings import AgentSettings\n"
        "with serve_metrics(AgentSettings(), AgentCounters()): pass\n"
        "print('prometheus_client' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
