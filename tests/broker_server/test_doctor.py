"""``legend doctor``: every check finds what is wrong, says what to do, and sets the exit code."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from broker_server.api import make_api
from broker_server.fleet_doctor import Finding, examine
from broker_server.operator_cli import main
from broker_server.server import Server
from tests.support.fake_server import closed_port_url
from tests.support.in_process_server import ask, served, server_in
from tests.support.messages import a_birth, a_capability
from wire_protocol.errors import ProtocolError, Refused, ServerUnavailable

Json = dict[str, Any]
OURS = version("legend-edge")


def healthy() -> Json:
    return {
        "version": OURS,
        "fleet": "home",
        "time_s": time.time(),
        "broker": {"kind": "mosquitto", "connected": True},
        "disk": {"path": "/var/lib/x", "free_bytes": 50 * 10**9, "size_bytes": 10**11},
        "database": {"kind": "sqlite", "damage": None, "size_bytes": 4096},
        "certificates": [{"kind": "server", "name": "legend-server-home", "days_left": 80.0}],
        "dropped_messages": [],
        "unsaved_births": 0,
    }


def a_device(name: str = "pi", **changes: Any) -> Json:
    capability = a_capability(**changes.pop("capability", {})).model_dump(mode="json")
    return {
        "device_id": name,
        "state": "online",
        "agent_version": OURS,
        "last_seen_s": 3.0,
        "capability": capability,
        "note": "",
        **changes,
    }


@dataclass
class Api:
    """An operator API with these answers."""

    server: Json = field(default_factory=healthy)
    fleet: list[Json] = field(default_factory=lambda: [a_device()])
    launched: list[Json] = field(default_factory=list)
    refuses: Exception | None = None

    def doctor(self) -> Json:
        if self.refuses:
            raise self.refuses
        return self.server

    def devices(self) -> list[Json]:
        return self.fleet

    def runs(self) -> list[Json]:
        return self.launched

    @contextmanager
    def connect(self) -> Iterator[Api]:
        yield self


def wrong(api: Api) -> list[Finding]:
    found = [finding for finding in examine(api.connect) if finding.state != "ok"]
    assert all(finding.remedy for finding in found), "every finding says what to do"
    assert all("\n" not in finding.seen + finding.remedy for finding in found)
    return found


def test_a_healthy_fleet_has_only_good_findings() -> None:
    assert wrong(Api()) == []
    checks = [finding.check for finding in examine(Api().connect)]
    assert checks == [
        "server", "clock", "broker", "server's disk", "database", "certificates", "messages",
        "devices",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "check", "state", "words"),
    [
        ({"version": "0.0.9"}, "server", "warning", "0.0.9"),
        ({"time_s": 0.0}, "clock", "warning", "NTP"),
        ({"broker": {"kind": "external", "connected": False}}, "broker", "broken", "broker.url"),
        ({"database": {"kind": "sqlite", "damage": "page 3", "size_bytes": 1}}, "database",
         "broken", "restore FILE"),
        ({"unsaved_births": 2}, "database", "warning", "free some space"),
        ({"dropped_messages": [{"channel": "birth", "reason": "bad_field", "count": 9}]},
         "messages", "warning", "9 birth: bad_field"),
        ({"certificates": [{"kind": "server", "name": "s", "days_left": 3.0}]}, "certificate",
         "warning", "pki renew"),
        ({"certificates": [{"kind": "broker", "name": "b", "days_left": -1.0}]}, "certificate",
         "broken", "has ended"),
        ({"certificates": [{"kind": "device", "name": "pi", "days_left": -1.0}]}, "certificate",
         "warning", "revoke pi"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_the_server_is_named(
    change: Json, check: str, state: str, words: str
) -> None:
    found = wrong(Api(server=healthy() | change))
    # Another version of the server also differs from every device's: look at the first.
    assert (found[0].check, found[0].state) == (check, state)
    assert words in f"{found[0].seen} {found[0].remedy}"


@pytest.mark.parametrize(("free", "state"), [(1.5e9, "warning"), (1e8, "broken")])
def test_a_disk_that_fills_up_is_a_warning_and_then_broken(free: float, state: str) -> None:
    disk = {"path": "/x", "free_bytes": free, "size_bytes": 1e11}
    (found,) = wrong(Api(server=healthy() | {"disk": disk}))
    assert (found.check, found.state) == ("server's disk", state)


@pytest.mark.parametrize(
    ("device", "words"),
    [
        (a_device(state="lost", last_seen_s=9000.0), "is lost, last heard 2 h ago"),
        (a_device(agent_version="0.0.1"), "runs 0.0.1"),
        (a_device(capability={"compute": None}), "has not measured itself"),
        (a_device(capability={"throttled": True}), "runs below its speed"),
        (a_device(capability={"disk_free_bytes": 10**9}), "1.0 GB left"),
        (a_device(note="has no dataset"), "has no dataset"),
    ],
)
def test_what_is_wrong_with_a_device_is_named(device: Json, words: str) -> None:
    (found,) = wrong(Api(fleet=[device]))
    assert (found.check, found.state) == ("device", "warning")
    assert words in found.seen


def test_an_empty_fleet_and_a_waiting_run_are_said() -> None:
    run = {"run_id": "run-1", "status": "running", "reason": "waits for pi"}
    found = wrong(Api(fleet=[], launched=[run]))
    assert [finding.check for finding in found] == ["run", "devices"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ServerUnavailable("no server answers"), "start it"),
        (Refused("wants a token"), "--token"),
        (ProtocolError("no JSON"), "update"),
    ],
)
def test_without_an_answer_there_is_one_finding(error: Exception, words: str) -> None:
    (found,) = examine(Api(refuses=error).connect)
    assert found.state == "broken"
    assert words in found.remedy


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with server_in(tmp_path) as server:
        yield server


def test_the_server_tells_what_the_doctor_needs(server: Server) -> None:
    server.counters.drop("birth", ProtocolError("the message is not signed"))
    answer = ask(server, "GET", "/v1/doctor").json()
    assert answer["database"]["damage"] is None
    assert answer["broker"] == {"kind": "embedded", "connected": False}
    assert answer["dropped_messages"] == [{"channel": "birth", "reason": "not_signed", "count": 1}]
    assert abs(answer["time_s"] - time.time()) < 3600
    assert 0 < answer["disk"]["free_bytes"] <= answer["disk"]["size_bytes"]
    assert set(healthy()) <= set(answer)


@pytest.mark.integration
def test_the_command_prints_findings_and_fails_when_something_is_broken(server: Server) -> None:
    server.fleet.born("pi", 1, a_birth(), 0.0)
    with served(make_api(server)) as url:
        runner = CliRunner(env={"LEGEND_SERVER": url})
        result = runner.invoke(main, ["doctor"])
        assert result.exit_code == 1  # no broker in this test
        assert "the server has no connection" in result.stdout
        as_json = runner.invoke(main, ["doctor", "--json"])
        assert as_json.exit_code == 1
        states = {one["check"]: one["state"] for one in json.loads(as_json.stdout)}
        assert states["broker"] == "broken"
        assert states["database"] == "ok"


@pytest.mark.integration
def test_without_a_server_the_command_says_so_and_fails() -> None:
    result = CliRunner(env={"LEGEND_SERVER": closed_port_url()}).invoke(main, ["doctor"])
    assert result.exit_code == 1
    assert "no server answers" in result.stdout
