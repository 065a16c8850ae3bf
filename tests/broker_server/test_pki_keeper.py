"""When the broker is told that somebody was thrown out: not before it can know whom."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import cast

import pytest

from broker_server.broker import BrokerLauncher
from broker_server.pki import FleetPki
from broker_server.pki_keeper import PkiKeeper
from edge_agent.x509 import certificate_request
from tests.support.pki import revocation_list
from wire_protocol.errors import ConfigError


class Launcher:
    """Notes what a broker would find in the list when it is told to read it."""

    def __init__(self, pki: FleetPki) -> None:
        self._pki = pki
        self.told: list[tuple[list[str | None], set[int]]] = []

    def apply_certificates(self, revoked: list[str | None]) -> None:
        listed = {entry.serial_number for entry in revocation_list(self._pki)}
        self.told.append((revoked, listed))


def test_the_broker_is_told_once_the_list_could_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    pki = FleetPki.create(tmp_path / "pki", "home", ["localhost"], now)
    serial = pki.issue_device("nano-1", certificate_request(bytes(32), "nano-1"), now).serial
    launcher = Launcher(pki)
    keeper = PkiKeeper(pki, cast("BrokerLauncher", launcher))

    def full(*_args: object, **_options: object) -> None:
        raise ConfigError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("broker_server.pki_ledger.replace_file", full)
        with pytest.raises(ConfigError, match="no space"):
            pki.revoke("nano-1", now)
        keeper.check(now)
        assert launcher.told == []
    keeper.check(now)
    keeper.check(now)
    assert launcher.told == [(["nano-1"], {serial})]


def test_the_broker_waits_for_a_list_that_comes_from_elsewhere_after_the_journal(
    tmp_path: Path,
) -> None:
    now = time.time()
    authority = FleetPki.create(tmp_path / "elsewhere", "home", ["localhost"], now)
    request = certificate_request(bytes(32), "nano-1")
    serial = authority.issue_device("nano-1", request, now).serial
    here = tmp_path / "here"
    shutil.copytree(authority.folder, here)
    (here / "ca.key").unlink()
    pki = FleetPki(here)
    launcher = Launcher(pki)
    keeper = PkiKeeper(pki, cast("BrokerLauncher", launcher))
    authority.revoke("nano-1", now)
    shutil.copy(authority.folder / "issued.jsonl", here)
    keeper.check(now)
    assert pki.is_revoked(serial)
    assert launcher.told == []
    shutil.copy(authority.crl_file, here)
    keeper.check(now)
    assert launcher.told == [(["nano-1"], {serial})]
