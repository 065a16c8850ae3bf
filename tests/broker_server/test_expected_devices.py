"""``legend fleet``: an inventory goes into a real server and comes out again."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from structlog.testing import capture_logs

from broker_server.api import make_api
from broker_server.enrollment_desk import EnrolmentDesk
from broker_server.expected_devices import ExpectedDevices
from broker_server.fleet_doctor import examine
from broker_server.fleet_inventory import read_inventory
from broker_server.operator_api_client import OperatorApi
from broker_server.operator_cli import main
from broker_server.pki import FleetPki
from broker_server.server import Server
from broker_server.store import Store
from edge_agent.x509 import certificate_request
from tests.support.identities import a_pki
from tests.support.in_process_server import ask, served, server_in
from tests.support.messages import a_birth
from wire_protocol.errors import Refused

Json = dict[str, Any]
INVENTORY = """
devices:
  hosts:
    pi: {ansible_host: 10.0.0.21}
    orin: {ansible_host: 10.0.0.22}
    nano:
"""


def request_of(name: str, number: int = 1) -> str:
    return certificate_request(bytes([number]) * 32, name)


@dataclass(frozen=True)
class Shell:
    """The command line next to a real server."""

    server: Server
    folder: Path
    url: str

    def run(self, *arguments: str, inventory: str = INVENTORY) -> Result:
        (self.folder / "inventory.yml").write_text(inventory, encoding="utf-8")
        words = [one.replace("INV", str(self.folder / "inventory.yml")) for one in arguments]
        return CliRunner(env={"LEGEND_SERVER": self.url}).invoke(main, words)

    def devices(self) -> dict[str, Json]:
        listed = ask(self.server, "GET", "/v1/devices").json()["devices"]
        return {one["device_id"]: one for one in listed}

    def born(self, name: str) -> None:
        self.server.fleet.born(name, 1, a_birth(), time.monotonic())


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The server runs in this process: what it logs is not what a command says."""
    with capture_logs():
        yield


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    with server_in(tmp_path / "server") as server, served(make_api(server)) as url:
        yield Shell(server, tmp_path, url)


@pytest.fixture
def pki(tmp_path: Path) -> FleetPki:
    return a_pki(tmp_path / "pki")


@pytest.fixture
def enrolling(tmp_path: Path, pki: FleetPki) -> Iterator[Shell]:
    """The same with a server that lets devices in."""
    with server_in(tmp_path / "server") as plain:
        server = replace(plain, pki=pki, enrolment=EnrolmentDesk(pki))
        with served(make_api(server)) as url:
            yield Shell(server, tmp_path, url)


def test_imported_devices_are_expected_until_they_are_born(shell: Shell) -> None:
    shell.born("pi")
    done = shell.run("fleet", "import", "INV", "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert (answer["waiting"], answer["seen"]) == (["nano", "orin"], ["pi"])
    assert {name: one["state"] for name, one in shell.devices().items()} == {
        "nano": "expected",
        "orin": "expected",
        "pi": "online",
    }
    assert "expected" in shell.run("devices").stdout
    shell.born("orin")
    assert shell.devices()["orin"]["state"] == "online"


def test_what_is_known_and_not_listed_is_reported_and_stays(shell: Shell) -> None:
    shell.born("attic")
    answer = json.loads(shell.run("fleet", "import", "INV", "--json").stdout)
    assert answer["unlisted"] == ["attic"]
    assert shell.devices()["attic"]["state"] == "online"
    assert "not in the inventory" in shell.run("fleet", "import", "INV").stdout


def test_the_last_inventory_is_the_one_that_counts(shell: Shell) -> None:
    shell.run("fleet", "import", "INV")
    again = shell.run("fleet", "import", "INV", "--json", inventory="devices: {hosts: {pi: }}")
    assert json.loads(again.stdout)["forgotten"] == ["nano", "orin"]
    assert set(shell.devices()) == {"pi"}


def test_expected_devices_survive_a_restart(shell: Shell) -> None:
    shell.run("fleet", "import", "INV")
    shell.server.store.close()
    store = Store.in_folder(shell.server.state.root)
    assert store.expected() == {"nano": "", "orin": "10.0.0.22", "pi": "10.0.0.21"}
    store.close()


def test_an_export_can_be_imported(shell: Shell) -> None:
    shell.run("fleet", "import", "INV")
    shell.born("pi")
    shell.born("attic")
    out = shell.folder / "out.yml"
    assert shell.run("fleet", "export", "--out", str(out)).exit_code == 0
    assert {host.device_id: host.address for host in read_inventory(out)} == {
        "attic": "",
        "nano": "",
        "orin": "10.0.0.22",
        "pi": "10.0.0.21",
    }
    assert shell.run("fleet", "export").stdout == out.read_text(encoding="utf-8")
    listed = json.loads(shell.run("fleet", "export", "--json").stdout)
    assert listed[-1] == {
        "device_id": "pi",
        "address": "10.0.0.21",
        "board": "rpi-5-8",
        "state": "online",
    }


def test_a_token_lets_its_device_in_at_once_and_no_other(enrolling: Shell, pki: FleetPki) -> None:
    pki.issue_device("orin", request_of("orin"), time.time())
    file = enrolling.folder / "tokens.yml"
    done = enrolling.run("fleet", "import", "INV", "--tokens", str(file))
    assert done.exit_code == 0, done.output
    assert file.stat().st_mode & 0o777 == 0o600
    tokens: dict[str, str] = json.loads("{" + ",".join(file.read_text().splitlines()) + "}")
    # orin has a certificate already.
    assert set(tokens) == {"nano", "pi"}
    assert not any(token in done.output for token in tokens.values())
    secret = tokens["pi"].partition(".")[0]
    desk = enrolling.server.enrolment
    assert desk is not None
    with pytest.raises(Refused, match="not for device nano"):
        desk.ask("nano", request_of("nano"), secret, time.time())
    assert desk.ask("pi", request_of("pi"), secret, time.time()).status == "accepted"
    assert enrolling.devices()["pi"]["state"] == "expected"


def test_a_revoked_device_gets_no_token(enrolling: Shell, pki: FleetPki) -> None:
    pki.issue_device("pi", request_of("pi"), time.time())
    pki.revoke("pi", time.time())
    file = enrolling.folder / "tokens.yml"
    answer = json.loads(
        enrolling.run("fleet", "import", "INV", "--json", "--tokens", str(file)).stdout
    )
    assert answer["revoked"] == ["pi"]
    assert answer["tokens"] == ["nano", "orin"]
    assert enrolling.devices()["pi"]["state"] == "revoked"
    assert "pi" not in enrolling.run("fleet", "export").stdout


def test_a_certificate_that_was_never_used_is_known_too(enrolling: Shell, pki: FleetPki) -> None:
    pki.issue_device("attic", request_of("attic"), time.time())
    answer = json.loads(enrolling.run("fleet", "import", "INV", "--json").stdout)
    assert answer["unlisted"] == ["attic"]


def test_without_certificates_there_are_no_tokens_and_nothing_changes(shell: Shell) -> None:
    done = shell.run("fleet", "import", "INV", "--tokens", str(shell.folder / "t.yml"))
    assert (done.exit_code, done.output.count("\n")) == (77, 1)
    assert "enrols no devices" in done.output
    assert shell.devices() == {}


@pytest.mark.parametrize(
    ("inventory", "words"),
    [
        ("devices: {hosts: {Pi_1: }}", "edge_agent_device_id"),
        ("devices: {hosts: {legend-x: }}", "legend-"),
        ("devices: 7", "must be a mapping"),
        ("devices: {hosts: {pi: {ansible_host: " + "x" * 300 + "}}}", "253"),
    ],
)
def test_a_bad_inventory_ends_in_one_line(shell: Shell, inventory: str, words: str) -> None:
    done = shell.run("fleet", "import", "INV", inventory=inventory)
    assert (done.exit_code, done.output.count("\n")) == (78, 1)
    assert words in done.output


def test_tokens_are_not_made_for_a_folder_that_is_not_there(enrolling: Shell) -> None:
    nowhere = str(enrolling.folder / "none" / "tokens.yml")
    done = enrolling.run("fleet", "import", "INV", "--tokens", nowhere)
    assert (done.exit_code, done.output.count("\n")) == (78, 1)
    assert enrolling.devices() == {}


def test_the_doctor_names_devices_that_never_came(shell: Shell) -> None:
    shell.run("fleet", "import", "INV")
    found = {one.seen: one for one in examine(lambda: OperatorApi(shell.url))}
    assert found["nano is expected and was never seen"].remedy


def test_a_born_device_is_in_exactly_one_list(shell: Shell) -> None:
    for name in ("pi", "attic"):
        shell.born(name)
    expected = ExpectedDevices(shell.server.store, shell.server.fleet, None)
    expected.take({"gone": ""})
    found = expected.take({"pi": "", "new": ""})
    assert found.waiting == ("new",)
    assert found.seen == ("pi",)
    assert found.unlisted == ("attic",)
    assert found.forgotten == ("gone",)
