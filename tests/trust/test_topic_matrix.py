"""Everybody tries every topic of a real mosquitto with the fleet's certificates.

The topics are those of the wire protocol, so that one that is added later without a word here
fails. What a broker answers is no proof (it grants every subscription), so what counts is who
hears what.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from broker_server.broker_tls import tls_files
from broker_server.pki_x509 import server_name
from tests.support.brokers import FLEET
from tests.support.guarded_site import DAY_S
from tests.support.mqtt_client import MqttClient
from tests.support.pki import (
    SecuredBroker,
    anonymous_context,
    certified_device,
    make_pki,
    secured_broker,
)
from wire_protocol.topics import ROOT, Broadcast, Channel, DeviceTopic, FleetTopic, server_filters

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

DEVICE_MAY: dict[Channel | Broadcast, str] = {
    Channel.STATE: "write",
    Channel.BIRTH: "write",
    Channel.HEARTBEAT: "write",
    Channel.EVENT: "write",
    Channel.UPDATE: "write",
    Channel.DEVICE_ACK: "write",
    Channel.CERTIFICATE_REQUEST: "write",
    Channel.COMMAND: "read",
    Channel.SERVER_ACK: "read",
    Channel.CERTIFICATE: "read",
    Broadcast.COMMAND: "read",
    Broadcast.SERVER_STATE: "read",
}
"""On its own topics, and on those for all; on everything else nothing."""

SERVER = server_name(FLEET)
OWN, OTHER = "pi", "nano"
END = b"end"


@dataclass
class Bus:
    """A broker, and certificates by the name of who shows them."""

    broker: SecuredBroker
    contexts: dict[str, ssl.SSLContext]

    def client(
        self, who: str, client_id: str | None = None, *, will: tuple[str, bytes] | None = None
    ) -> MqttClient:
        """Somebody who is not connected yet."""
        port = self.broker.address.port
        return MqttClient(port, self.contexts[who], client_id or who, will=will)

    def connected(self, who: str, client_id: str | None = None) -> MqttClient:
        """Somebody who is."""
        client = self.client(who, client_id)
        assert client.connect()
        return client


@pytest.fixture(scope="module")
def bus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bus]:
    folder = tmp_path_factory.mktemp("bus")
    with secured_broker(folder) as broker:
        yield Bus(broker, _contexts(broker, folder))


def _contexts(broker: SecuredBroker, folder: Path) -> dict[str, ssl.SSLContext]:
    pki, now = broker.pki, time.time()
    stranger = make_pki(folder / "foreign")
    revoked = certified_device(pki, OWN, folder)
    broker.revoke(f"{revoked.serial:x}")
    server = anonymous_context(pki)
    files = tls_files(pki, "server")
    server.load_cert_chain(files.certificate, files.key)
    as_server = certified_device(stranger, OWN, folder, trusts=pki)
    return {
        OWN: certified_device(pki, OWN, folder).context,
        OTHER: certified_device(pki, OTHER, folder).context,
        SERVER: server,
        "nobody": anonymous_context(pki),
        "foreign": as_server.context,
        "expired": certified_device(pki, OWN, folder, now=now - 200 * DAY_S).context,
        "revoked": revoked.context,
    }


def topics() -> dict[str, tuple[str | None, Channel | Broadcast | None]]:
    """Every topic of two devices, of a fleet, and some that are no part of the protocol."""
    found: dict[str, tuple[str | None, Channel | Broadcast | None]] = {}
    for fleet in (FLEET, "elsewhere"):
        ours = fleet == FLEET
        for device in (OWN, OTHER):
            for channel in Channel:
                topic = str(DeviceTopic(fleet, device, channel))
                found[topic] = (device, channel) if ours else (None, None)
        for broadcast in Broadcast:
            topic = str(FleetTopic(fleet, broadcast))
            found[topic] = (None, broadcast if ours else None)
    for device in (OWN, OTHER):
        found[f"{ROOT}/{FLEET}/d/{device}/prov/csr"] = (None, None)
    return {**found, "elsewhere": (None, None), "$SYS/broker/uptime/x": (None, None)}


def may(device: str, verb: str, topic: str) -> bool:
    """What the table says."""
    owner, channel = topics()[topic]
    return channel is not None and owner in (None, device) and DEVICE_MAY[channel] == verb


def test_every_topic_of_the_protocol_is_in_the_table() -> None:
    assert set(DEVICE_MAY) == {*Channel, *Broadcast}, "say who may read or write it"


@pytest.mark.parametrize("who", ["nobody", "foreign", "expired", "revoked"])
@pytest.mark.parametrize("client_id", [OWN, OTHER, SERVER, ""])
def test_who_has_no_good_certificate_does_not_get_in(bus: Bus, who: str, client_id: str) -> None:
    with bus.client(who, client_id) as client:
        assert not client.connect()


@pytest.mark.parametrize(("device", "client_id"), [(OWN, OWN), (OTHER, OTHER), (OWN, OTHER)])
def test_a_device_writes_its_own_topics_and_no_others(
    bus: Bus, device: str, client_id: str
) -> None:
    last = str(DeviceTopic(FLEET, device, Channel.HEARTBEAT))
    with bus.connected(SERVER) as server, bus.connected(device, client_id) as client:
        server.subscribe(f"{ROOT}/#")
        for topic in topics():
            client.publish(topic, f"{client_id} writes {topic}".encode())
        client.publish(last, END)
        heard = {
            one.topic
            for one in server.wait_for(END)
            if one.payload.startswith(client_id.encode() + b" writes")
        }
    assert heard == {topic for topic in topics() if may(device, "write", topic)}


@pytest.mark.parametrize(("device", "client_id"), [(OWN, OWN), (OTHER, OTHER), (OWN, OTHER)])
def test_a_device_hears_what_is_meant_for_it_and_nothing_else(
    bus: Bus, device: str, client_id: str
) -> None:
    last = str(FleetTopic(FLEET, Broadcast.COMMAND))
    with bus.connected(SERVER) as server, bus.connected(device, client_id) as client:
        client.subscribe("#", "+/#", "$SYS/#", f"{ROOT}/#", f"{ROOT}/{FLEET}/d/+/down/#")
        client.subscribe(*topics(), *(f"$share/g/{topic}" for topic in topics()))
        for topic in topics():
            server.publish(topic, f"said on {topic}".encode())
        server.publish(last, END)
        heard = {one.topic for one in client.wait_for(END)}
    assert heard == {topic for topic in topics() if may(device, "read", topic)}


def test_the_server_hears_every_device_and_only_its_own_fleet(bus: Bus) -> None:
    with bus.connected(OWN) as own, bus.connected(OTHER) as other, bus.connected(SERVER) as server:
        server.subscribe(*server_filters(FLEET), "#")
        for device, client in ((OWN, own), (OTHER, other)):
            for topic in topics():
                if may(device, "write", topic):
                    client.publish(topic, b"hello")
            client.publish(str(DeviceTopic(FLEET, device, Channel.EVENT)), device.encode())
        server.wait_for(OWN.encode())
        heard = {one.topic for one in server.wait_for(OTHER.encode())}
        server.publish(f"{ROOT}/elsewhere/all/cmd", b"to another fleet")
        server.publish(str(DeviceTopic(FLEET, OWN, Channel.EVENT)), END)
        beyond = {one.topic for one in server.wait_for(END)} - heard
    assert beyond == set()
    written = {t for t in topics() for device in (OWN, OTHER) if may(device, "write", t)}
    assert written <= heard
    assert all(topic.startswith((f"{ROOT}/{FLEET}/", "$SYS/")) for topic in heard)


def test_what_is_retained_is_not_handed_to_another_device(bus: Bus) -> None:
    state = str(DeviceTopic(FLEET, OTHER, Channel.STATE))
    command = str(DeviceTopic(FLEET, OTHER, Channel.COMMAND))
    with bus.connected(SERVER) as server, bus.connected(OTHER) as other:
        other.publish(state, b"retained state", retain=True)
        server.publish(command, b"retained command", retain=True)
        try:
            with bus.connected(OWN) as own:
                own.subscribe("#", state, command)
                own.publish(state, b"", retain=True)
                server.publish(str(FleetTopic(FLEET, Broadcast.COMMAND)), END)
                assert {one.payload for one in own.wait_for(END)} == {END}
            server.subscribe(state)
            server.wait_for(b"retained state")
        finally:
            server.publish(state, b"", retain=True)
            server.publish(command, b"", retain=True)


def test_a_last_will_speaks_for_nobody_else(bus: Bus) -> None:
    foreign = str(DeviceTopic(FLEET, OTHER, Channel.STATE))
    own_topic = str(DeviceTopic(FLEET, OWN, Channel.STATE))
    with bus.connected(SERVER) as server:
        server.subscribe(*server_filters(FLEET))
        for topic in (foreign, own_topic):
            with bus.client(OWN, will=(topic, f"will on {topic}".encode())) as dying:
                if dying.connect():
                    dying.die()
        heard = server.wait_for(f"will on {own_topic}".encode())
    assert foreign not in {one.topic for one in heard}


@pytest.mark.parametrize("victim", [OTHER, SERVER])
def test_a_certificate_cannot_take_over_anothers_session(bus: Bus, victim: str) -> None:
    with bus.connected(victim) as staying:
        for _ in range(3):
            with bus.client(OWN, victim) as thief:
                thief.connect()
        # A round trip: had the broker closed the connection, this could not come back.
        topic = FleetTopic(FLEET, Broadcast.COMMAND)
        staying.subscribe(str(topic))
        if victim == SERVER:
            staying.publish(str(topic), END)
        else:
            with bus.connected(SERVER) as server:
                server.publish(str(topic), END)
                staying.wait_for(END)
        staying.wait_for(END)
        assert staying.connected


def test_a_certificate_for_the_servers_name_cannot_be_asked_for(bus: Bus, tmp_path: Path) -> None:
    for name in (SERVER, "legend-broker-lab", "legend-", "#", "+", "a/b", "pi nano", "PI"):
        with pytest.raises(Exception, match=r"reserved|must be"):
            certified_device(bus.broker.pki, name, tmp_path)


def test_revoking_ends_the_session_and_everything_that_waited_in_it(
    bus: Bus, tmp_path: Path
) -> None:
    name = "lost"
    bus.contexts[name] = certified_device(bus.broker.pki, name, tmp_path).context
    with bus.connected(name) as lost, bus.connected(OTHER) as kept:
        bus.broker.revoke(name)
        lost.wait_for_disconnect()
        assert not lost.connect()
        with bus.connected(SERVER) as server:
            kept.subscribe(str(FleetTopic(FLEET, Broadcast.COMMAND)))
            server.publish(str(FleetTopic(FLEET, Broadcast.COMMAND)), END)
            kept.wait_for(END)
