"""Certificates that are revoked or renewed while a real mosquitto runs with them."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import anyio
import pytest
from anyio import to_thread

from broker_server.broker import ChildBroker
from broker_server.mqtt import BrokerConnected, BrokerLost
from broker_server.pki import FleetPki
from broker_server.pki_keeper import PkiKeeper
from broker_server.pki_x509 import DAY_S
from edge_agent.mqtt import Connected, Disconnected
from tests.support.brokers import device_link, next_message, next_of, settled, topic
from tests.support.pki import (
    SecuredBroker,
    certified_device,
    make_pki,
    raw_client,
    secured_broker,
    secured_link,
)
from tests.support.ports import wait_until
from wire_protocol.errors import BrokerUnavailable
from wire_protocol.topics import Channel

pytestmark = [pytest.mark.integration, pytest.mark.anyio]


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[SecuredBroker]:
    with secured_broker(tmp_path / "server") as running:
        yield running


async def test_revoking_ends_a_live_session_and_only_that(
    broker: SecuredBroker, tmp_path: Path
) -> None:
    names = ("pi-1", "pi-2", "pi-3")
    devices = {name: certified_device(broker.pki, name, tmp_path) for name in names}
    async with (
        secured_link(broker.address) as server,
        device_link(devices["pi-1"].login(broker.address), "pi-1", tmp_path) as first,
        device_link(devices["pi-2"].login(broker.address), "pi-2", tmp_path) as second,
        device_link(devices["pi-3"].login(broker.address), "pi-3", tmp_path) as third,
    ):
        await settled(server, BrokerConnected)
        for link in (first, second, third):
            await next_of(link, Connected)
        # At once one after the other: both lists carry nearly the same time.
        await to_thread.run_sync(broker.revoke, "pi-1")
        await to_thread.run_sync(broker.revoke, "pi-2")
        for link in (first, second):
            with anyio.fail_after(30):
                # The session ends, and the attempts to come back fail.
                await next_of(link, Disconnected)
                await next_of(link, Disconnected)
                assert not link.connected
        offline = topic("pi-1", Channel.STATE)
        await next_message(server, lambda m: m.topic == offline and b"false" in m.payload)
        assert third.connected
        assert third.sid == 1
        assert server.connected


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_kept_tls_session_does_not_bring_a_revoked_device_back(
    broker: SecuredBroker, tmp_path: Path, version: ssl.TLSVersion
) -> None:
    context = certified_device(broker.pki, "pi-1", tmp_path).context
    context.maximum_version = version
    kept = _greeted(broker, context, None)
    assert kept is not None
    assert _greeted(broker, context, kept) is not None
    broker.revoke("pi-1")
    assert _greeted(broker, context, kept) is None


def _greeted(
    broker: SecuredBroker, context: ssl.SSLContext, session: ssl.SSLSession | None
) -> ssl.SSLSession | None:
    """Say CONNECT in a resumed TLS session; the session when the broker accepts."""
    hello = b"\x00\x04MQTT\x04\x02\x00\x3c\x00\x04pi-1"
    try:
        with (
            socket.create_connection((broker.address.host, broker.address.port), 20) as plain,
            context.wrap_socket(
                plain, server_hostname=broker.address.host, session=session
            ) as secured,
        ):
            secured.sendall(bytes([0x10, len(hello)]) + hello)
            return secured.session if secured.recv(4) == b"\x20\x02\x00\x00" else None
    except OSError:
        return None


async def test_a_revoked_device_finds_nothing_that_waited_for_it(
    broker: SecuredBroker, tmp_path: Path
) -> None:
    device = certified_device(broker.pki, "pi-1", tmp_path)
    async with secured_link(broker.address) as server:
        await settled(server, BrokerConnected)
        async with device_link(device.login(broker.address), "pi-1", tmp_path) as link:
            await next_of(link, Connected)
        assert server.publish(topic("pi-1", Channel.COMMAND), b"secret")
        await to_thread.run_sync(broker.revoke, f"{device.serial:x}")
        again = certified_device(broker.pki, "pi-1", tmp_path)
        async with device_link(again.login(broker.address), "pi-1", tmp_path) as link:
            connected = await next_of(link, Connected)
            assert not connected.session_present


async def test_without_the_authority_s_key_the_broker_restarts_to_end_sessions(
    broker: SecuredBroker, tmp_path: Path
) -> None:
    bad, good = (certified_device(broker.pki, name, tmp_path) for name in ("pi-1", "pi-2"))
    elsewhere = FleetPki(shutil.copytree(broker.pki.folder, tmp_path / "elsewhere"))
    (broker.pki.folder / "ca.key").unlink()
    elsewhere.revoke("pi-1", time.time())
    async with (
        secured_link(broker.address) as server,
        device_link(bad.login(broker.address), "pi-1", tmp_path) as revoked,
        device_link(good.login(broker.address), "pi-2", tmp_path) as link,
    ):
        await settled(server, BrokerConnected)
        await next_of(revoked, Connected)
        await next_of(link, Connected)
        shutil.copy(elsewhere.crl_file, broker.pki.crl_file)
        await to_thread.run_sync(broker.keeper.check, time.time())
        await next_of(revoked, Disconnected)
        await next_of(link, Disconnected)
        again = await next_of(link, Connected)
        assert again.session_present
        await settled(server, BrokerConnected)
        await next_of(revoked, Disconnected)
        assert not revoked.connected


def test_a_broker_that_does_not_say_that_it_reloads_is_started_anew(
    broker: SecuredBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker_server.broker.RELOADED", "words that no broker says")
    monkeypatch.setattr("broker_server.broker_process._RELOAD_S", 0.2)
    device = certified_device(broker.pki, "pi-1", tmp_path)
    pid = broker.launcher.pid
    broker.revoke("pi-1")
    assert broker.launcher.pid != pid
    with raw_client(broker.address, device.context, "pi-1") as client:
        assert not client.accepted


def test_a_log_that_grew_large_is_shortened(broker: SecuredBroker, tmp_path: Path) -> None:
    log = tmp_path / "server" / "broker" / "broker.log"
    with log.open("ab") as file:
        file.truncate(9 * 1024 * 1024)
    device = certified_device(broker.pki, "pi-1", tmp_path)
    pid = broker.launcher.pid
    broker.revoke("pi-1")
    assert broker.launcher.pid == pid
    assert log.stat().st_size < 100_000
    with raw_client(broker.address, device.context, "pi-1") as client:
        assert not client.accepted


async def test_renewed_certificates_are_taken_into_use_without_a_restart(tmp_path: Path) -> None:
    make_pki(tmp_path / "server" / "pki", now=time.time() - 70 * DAY_S)
    with secured_broker(tmp_path / "server") as broker:
        context = broker.address.ssl_context()
        assert context is not None
        broker.keeper.follow(context)
        old = broker.pki.records()
        pid = broker.launcher.pid
        assert pid is not None
        async with secured_link(broker.address, context) as server:
            await settled(server, BrokerConnected)
            assert _serial_shown(broker, tmp_path) in {record.serial for record in old}
            await to_thread.run_sync(broker.keeper.check, time.time())
            assert _serial_shown(broker, tmp_path) not in {record.serial for record in old}
            for record in old:
                await to_thread.run_sync(broker.revoke, f"{record.serial:x}")
            assert server.connected
            assert broker.launcher.pid == pid
            # With the certificate of before, the server would not come back now.
            os.kill(pid, signal.SIGKILL)
            await settled(server, BrokerLost)
            await to_thread.run_sync(wait_until, lambda: not broker.launcher.running)
            await to_thread.run_sync(broker.launcher.start)
            await settled(server, BrokerConnected)


def _serial_shown(broker: SecuredBroker, folder: Path) -> int:
    context = certified_device(broker.pki, "pi-9", folder).context
    with raw_client(broker.address, context, "pi-9") as client:
        assert client.accepted
        shown = client.certificate_of_the_broker()
    return int(shown["serialNumber"], 16)


def test_what_was_revoked_while_the_server_was_down_is_refused(tmp_path: Path) -> None:
    with secured_broker(tmp_path / "server") as first:
        device = certified_device(first.pki, "pi-1", tmp_path)
        with raw_client(first.address, device.context, "pi-1") as client:
            assert client.accepted
    first.pki.revoke("pi-1", time.time())
    with (
        secured_broker(tmp_path / "server") as second,
        raw_client(second.address, device.context, "pi-1") as client,
    ):
        assert not client.accepted


def test_a_revocation_that_the_broker_did_not_take_is_tried_again(
    broker: SecuredBroker, tmp_path: Path
) -> None:
    class Hangs:
        asked = 0

        def apply_certificates(self, revoked: list[str | None]) -> None:
            self.asked += 1
            assert revoked == ["pi-1"]
            if self.asked == 1:
                raise BrokerUnavailable("mosquitto did not read its files again")

    launcher = Hangs()
    # Only this method of a launcher is used.
    keeper = PkiKeeper(broker.pki, cast("ChildBroker", launcher))
    certified_device(broker.pki, "pi-1", tmp_path)
    broker.pki.revoke("pi-1", time.time())
    for _ in range(3):
        keeper.check(time.time())
    assert launcher.asked == 2
