"""Brokers as children of the server: they come back the same, and they never stay behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker_server.broker import ChildBroker, ExternalBroker, open_broker
from broker_server.broker_address import BrokerAddress, Credentials
from broker_server.broker_process import BrokerProcess, check_that_it_answers
from tests.support.brokers import Kind, RunningBroker, require, running_broker
from tests.support.ports import answers, free_port, wait_until
from wire_protocol.errors import BrokerUnavailable, ConfigError

pytestmark = pytest.mark.integration

HOLDS_A_BROKER = """
import sys
from pathlib import Path
from broker_server.broker import open_broker
kind, state_dir = sys.argv[1:]
launcher = open_broker(kind, state_dir=Path(state_dir))
address = launcher.start()
print(address.port, launcher.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture(params=["embedded", "mosquitto"])
def kind(request: pytest.FixtureRequest) -> Kind:
    chosen: Kind = request.param
    require(chosen)
    return chosen


@pytest.fixture
def broker(kind: Kind, tmp_path: Path) -> Iterator[RunningBroker]:
    with running_broker(kind, tmp_path / "server") as running:
        yield running


def test_it_answers_when_start_returns(broker: RunningBroker) -> None:
    check_that_it_answers(broker.address)
    assert broker.address.loopback_only
    assert broker.launcher.start() == broker.address


def test_its_files_are_for_the_server_only(broker: RunningBroker, tmp_path: Path) -> None:
    assert (tmp_path / "server" / "broker").stat().st_mode & 0o077 == 0
    kept = tmp_path / "server" / "broker" / "broker.json"
    assert kept.stat().st_mode & 0o077 == 0


def test_a_restarted_server_has_the_same_address_and_passwords(
    broker: RunningBroker, kind: Kind, tmp_path: Path
) -> None:
    broker.launcher.stop()
    assert not answers(broker.address.port)
    assert not broker.launcher.running
    again = open_broker(kind, state_dir=tmp_path / "server")
    try:
        assert again.start() == broker.address
    finally:
        again.stop()


def test_a_broker_that_was_killed_is_started_again(broker: RunningBroker) -> None:
    assert broker.launcher.pid is not None
    os.kill(broker.launcher.pid, signal.SIGKILL)
    wait_until(lambda: not broker.launcher.running)
    assert broker.launcher.start() == broker.address
    check_that_it_answers(broker.address)


def test_it_ends_when_the_server_is_killed_and_the_next_server_takes_over(
    kind: Kind, tmp_path: Path
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS_A_BROKER, kind, str(tmp_path / "state")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as server:
        assert server.stdout is not None
        port, pid = (int(word) for word in server.stdout.readline().split())
        assert answers(port)
        server.kill()
    # At once, while the orphan may still be ending.
    following = open_broker(kind, state_dir=tmp_path / "state")
    try:
        assert following.start().port == port
    finally:
        following.stop()
    wait_until(lambda: not Path(f"/proc/{pid}").exists() and not answers(port))


def test_an_orphan_that_does_not_end_by_itself_is_ended(kind: Kind, tmp_path: Path) -> None:
    launcher = open_broker(kind, state_dir=tmp_path / "state")
    assert isinstance(launcher, ChildBroker)
    address = launcher.start()
    try:
        # The pipe to it stays open, as if a stuck process had inherited it.
        following = open_broker(kind, state_dir=tmp_path / "state")
        try:
            assert following.start() == address
            assert not launcher.running
        finally:
            following.stop()
    finally:
        launcher.stop()


def test_the_password_file_of_our_own_making_is_understood(broker: RunningBroker) -> None:
    address = broker.address
    assert address.device_credentials is not None
    as_device = BrokerAddress(
        address.host, address.port, server_credentials=address.device_credentials
    )
    check_that_it_answers(as_device)
    wrong = BrokerAddress(
        address.host, address.port, server_credentials=Credentials("server", "wrong")
    )
    with pytest.raises((ConfigError, BrokerUnavailable), match="user and password"):
        check_that_it_answers(wrong, timeout_s=5.0)
    with pytest.raises((ConfigError, BrokerUnavailable), match="user and password"):
        check_that_it_answers(BrokerAddress(address.host, address.port), timeout_s=5.0)


def test_an_external_broker_is_used_as_it_is(broker: RunningBroker) -> None:
    external = ExternalBroker(broker.address)
    assert external.start() == broker.address
    external.stop()
    assert answers(broker.address.port)


def test_a_wanted_port_that_is_taken_is_a_configuration_error(kind: Kind, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = int(stranger.getsockname()[1])
        with pytest.raises(ConfigError, match=str(port)):
            open_broker(kind, state_dir=tmp_path / "state", port=port).start()


def test_a_kept_port_that_a_stranger_took_is_replaced(tmp_path: Path) -> None:
    launcher = open_broker("embedded", state_dir=tmp_path / "state")
    first = launcher.start()
    launcher.stop()
    with socket.create_server(("127.0.0.1", first.port)):
        second = launcher.start()
        launcher.stop()
    assert second.port != first.port
    assert second.device_credentials == first.device_credentials
    kept = json.loads((tmp_path / "state" / "broker" / "broker.json").read_text())
    assert kept["port"] == second.port


def test_a_broker_that_dies_at_its_start_is_quoted(tmp_path: Path) -> None:
    class Broken:
        name = "broken broker"

        def files(self, listener: object) -> dict[str, str]:
            return {}

        def command(self, folder: Path) -> list[str]:
            complaint = "import sys; sys.exit('no such setting: frobnicate')"
            return ["program", sys.executable, "-c", complaint]

    launcher = ChildBroker(Broken(), folder=tmp_path, port=free_port())
    with pytest.raises(BrokerUnavailable, match=r"broken broker.*frobnicate"):
        launcher.start()
    assert not launcher.running


def test_something_else_on_the_port_is_not_taken_for_a_broker() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = BrokerAddress("127.0.0.1", int(silent.getsockname()[1]))
        with pytest.raises(BrokerUnavailable, match="without an answer"):
            check_that_it_answers(address, timeout_s=0.3)


def test_stopping_twice_is_harmless(tmp_path: Path) -> None:
    process = BrokerProcess(tmp_path)
    process.stop()
    process.stop()
    assert not process.running
