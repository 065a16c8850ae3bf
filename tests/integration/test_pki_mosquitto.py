"""A real mosquitto that knows everybody by certificate: who gets in, and what they can do there."""

from __future__ import annotations

import os
import signal
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from anyio import to_thread

from broker_server.broker import ChildBroker, ExternalBroker, open_broker
from broker_server.broker_tls import check_with_own_certificate
from broker_server.mqtt import BrokerConnected, BrokerLost, Incoming
from broker_server.pki_x509 import DAY_S, server_name
from edge_agent.mqtt import Connected, Received
from tests.support.brokers import FLEET, device_link, next_message, next_of, settled, topic
from tests.support.pki import (
    SecuredBroker,
    anonymous_context,
    certified_device,
    make_pki,
    raw_client,
    secured_broker,
    secured_link,
)
from tests.support.ports import answers, wait_until
from wire_protocol.errors import ConfigError
from wire_protocol.topics import Broadcast, Channel, FleetTopic

pytestmark = [pytest.mark.integration, pytest.mark.anyio]


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[SecuredBroker]:
    with secured_broker(tmp_path / "server") as running:
        yield running


async def test_a_certified_device_and_the_server_hear_each_other(
    broker: SecuredBroker, tmp_path: Path
) -> None:
    device = certified_device(broker.pki, "pi-1", tmp_path)
    async with secured_link(broker.address) as server:
        await settled(server, BrokerConnected)
        async with device_link(device.login(broker.address), "pi-1", tmp_path) as link:
            await next_of(link, Connected)
            heard = await next_message(server)
            assert heard.topic == topic("pi-1", Channel.STATE)
            heard.acknowledge()
            assert server.publish(topic("pi-1", Channel.COMMAND), b"for pi-1")
            received = await next_of(link, Received)
            while received.payload != b"for pi-1":
                received = await next_of(link, Received)


@pytest.mark.parametrize("stranger", ["none", "foreign", "expired", "revoked"])
def test_without_a_valid_certificate_nobody_gets_in(
    broker: SecuredBroker, tmp_path: Path, stranger: str
) -> None:
    now = time.time()
    context = anonymous_context(broker.pki)
    if stranger == "foreign":
        # A foreign authority of the same name, so that only the signature gives it away.
        foreign = make_pki(tmp_path / "foreign")
        context = certified_device(foreign, "pi-1", tmp_path, trusts=broker.pki).context
    if stranger == "expired":
        context = certified_device(broker.pki, "pi-1", tmp_path, now=now - 91 * DAY_S).context
    if stranger == "revoked":
        context = certified_device(broker.pki, "pi-1", tmp_path).context
        broker.revoke("pi-1")
    with raw_client(broker.address, context, "pi-1") as client:
        assert not client.accepted
        assert client.over
    valid = certified_device(broker.pki, "pi-2", tmp_path)
    with raw_client(broker.address, valid.context, "pi-2") as client:
        assert client.accepted


async def test_nobody_takes_another_s_session_by_its_client_id(
    broker: SecuredBroker, tmp_path: Path
) -> None:
    victim, thief = (certified_device(broker.pki, name, tmp_path) for name in ("pi-1", "pi-2"))
    async with (
        secured_link(broker.address) as server,
        device_link(victim.login(broker.address), "pi-1", tmp_path) as link,
    ):
        await settled(server, BrokerConnected)
        await next_of(link, Connected)
        for claimed in ("pi-1", server_name(FLEET)):
            wanted = f"not for who claims to be {claimed}".encode()

            def steal(claimed: str = claimed, wanted: bytes = wanted) -> None:
                with raw_client(broker.address, thief.context, claimed) as client:
                    assert client.accepted
                    client.listen(topic("pi-1", Channel.COMMAND), "#")
                    assert server.publish(topic("pi-1", Channel.COMMAND), wanted)
                    # It is named by its certificate, so it hears its own in the end.
                    assert server.publish(topic("pi-2", Channel.COMMAND), b"for pi-2")
                    wait_until(
                        lambda: (topic("pi-2", Channel.COMMAND), b"for pi-2") in client.heard
                    )
                    assert wanted not in [payload for _, payload in client.heard]

            await to_thread.run_sync(steal)
            while (await next_of(link, Received)).payload != wanted:
                pass
        assert link.connected
        assert link.sid == 1
        assert server.connected


async def test_what_is_said_in_another_s_name_is_not_heard(
    broker: SecuredBroker, tmp_path: Path
) -> None:
    victim, liar = (certified_device(broker.pki, name, tmp_path) for name in ("pi-1", "pi-2"))
    async with (
        secured_link(broker.address) as server,
        device_link(victim.login(broker.address), "pi-1", tmp_path) as link,
    ):
        await settled(server, BrokerConnected)
        await next_of(link, Connected)

        def lie() -> None:
            with raw_client(broker.address, liar.context, "pi-2") as client:
                client.say(topic("pi-1", Channel.UPDATE), b"lie")
                client.say(topic("pi-1", Channel.COMMAND), b"lie")
                client.say(str(FleetTopic(FLEET, Broadcast.COMMAND)), b"lie")
                client.say(str(FleetTopic(FLEET, Broadcast.SERVER_STATE)), b"lie")
                client.say(topic("pi-2", Channel.UPDATE), b"truth")

        await to_thread.run_sync(lie)
        heard: list[Incoming] = []
        while not heard or heard[-1].payload != b"truth":
            heard.append(await next_message(server))
            heard[-1].acknowledge()
        assert not [message for message in heard if message.payload == b"lie"]
        assert server.publish(topic("pi-1", Channel.COMMAND), b"end")
        while (received := await next_of(link, Received)).payload != b"end":
            assert received.payload != b"lie"


def test_the_broker_s_own_certificate_has_no_rights(broker: SecuredBroker, tmp_path: Path) -> None:
    own = check_with_own_certificate(broker.pki, broker.address).ssl_context()
    assert own is not None
    device = certified_device(broker.pki, "pi-1", tmp_path)
    server = broker.address.ssl_context()
    assert server is not None
    with (
        raw_client(broker.address, own, "x") as nobody,
        raw_client(broker.address, server, "y") as listener,
        raw_client(broker.address, device.context, "pi-1") as speaker,
    ):
        nobody.listen("#", "$SYS/#")
        listener.listen("legend/#", "$SYS/broker/version")
        nobody.say(topic("pi-1", Channel.UPDATE), b"lie")
        speaker.say(topic("pi-1", Channel.UPDATE), b"truth")
        wait_until(lambda: (topic("pi-1", Channel.UPDATE), b"truth") in listener.heard)
        wait_until(lambda: "$SYS/broker/version" in dict(listener.heard))
        assert b"lie" not in [payload for _, payload in listener.heard]
        assert nobody.heard == []


async def test_the_server_comes_back_to_a_broker_that_was_killed(
    broker: SecuredBroker, tmp_path: Path
) -> None:
    device = certified_device(broker.pki, "pi-1", tmp_path)
    async with secured_link(broker.address) as server:
        await settled(server, BrokerConnected)
        assert broker.launcher.pid is not None
        os.kill(broker.launcher.pid, signal.SIGKILL)
        await settled(server, BrokerLost)
        await to_thread.run_sync(wait_until, lambda: not broker.launcher.running)
        await to_thread.run_sync(wait_until, lambda: not answers(broker.address.port))
        assert await to_thread.run_sync(broker.launcher.start) == broker.address
        await settled(server, BrokerConnected)
        async with device_link(device.login(broker.address), "pi-1", tmp_path):
            await next_message(server, lambda message: b"true" in message.payload)


async def test_asking_whether_the_broker_answers_leaves_the_server_s_session_alone(
    broker: SecuredBroker,
) -> None:
    async with secured_link(broker.address) as server:
        await settled(server, BrokerConnected)
        await to_thread.run_sync(broker.launcher.start)
        external = ExternalBroker(broker.address, session=server_name(FLEET))
        assert server.connected
    # The same of a broker that is not ours: what waits for the server still does.
    with raw_client(broker.address, _device_context(broker), "pi-1") as device:
        device.say(topic("pi-1", Channel.UPDATE), b"waits")
    await to_thread.run_sync(external.start)
    async with secured_link(broker.address) as server:
        assert (await next_message(server)).payload == b"waits"


def _device_context(broker: SecuredBroker) -> ssl.SSLContext:
    return certified_device(broker.pki, "pi-1", broker.pki.folder).context


def test_a_server_that_restarts_keeps_port_and_certificates(tmp_path: Path) -> None:
    with secured_broker(tmp_path / "server") as first:
        address, pki = first.address, first.pki
    with secured_broker(tmp_path / "server") as second:
        assert second.address == address
        assert second.pki.ca_fingerprint == pki.ca_fingerprint


def test_brokers_that_cannot_do_it_are_refused_with_the_reason(tmp_path: Path) -> None:
    pki = make_pki(tmp_path / "pki")
    for choice, reason in (
        ("embedded", "cannot check certificates"),
        ("mqtt://user:pass@b.example", "must be reached by TLS"),
    ):
        with pytest.raises(ConfigError, match=reason):
            open_broker(choice, state_dir=tmp_path, pki=pki)
    elsewhere = open_broker("mosquitto", state_dir=tmp_path, host="10.1.2.3", pki=pki)
    assert isinstance(elsewhere, ChildBroker)
    with pytest.raises(ConfigError, match=r"--broker --host 10\.1\.2\.3"):
        elsewhere.start()


def test_a_device_s_certificate_does_not_make_it_a_broker(tmp_path: Path) -> None:
    with secured_broker(tmp_path / "server") as broker:
        device = certified_device(broker.pki, "pi-1", tmp_path)
        imposter = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        imposter.load_cert_chain(tmp_path / f"{device.serial:x}.pem")
        client = anonymous_context(broker.pki)
        client.check_hostname = False
        with pytest.raises(ssl.SSLCertVerificationError, match=r"purpose|CA cert"):
            _handshake(client, imposter)


def _handshake(client: ssl.SSLContext, server: ssl.SSLContext) -> None:
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = client.wrap_bio(to_client, to_server)
    theirs = server.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(5):
        for side in (ours, theirs):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
