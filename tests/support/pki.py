"""Certificates of a test fleet, and devices that hold them."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.reasoncodes import ReasonCode

from broker_server.broker import ChildBroker, open_broker
from broker_server.broker_address import BrokerAddress
from broker_server.mqtt import ServerLink
from broker_server.pki import FleetPki
from broker_server.pki_keeper import PkiKeeper
from edge_agent.mqtt import BrokerLogin
from tests.support.brokers import FLEET, require
from tests.support.ports import wait_until

DeviceKey = ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey


def make_pki(folder: Path, *, now: float | None = None) -> FleetPki:
    """The authority of the test fleet."""
    return FleetPki.create(folder, FLEET, [], time.time() if now is None else now)


def revocation_list(pki: FleetPki) -> x509.CertificateRevocationList:
    """What brokers and servers read."""
    return x509.load_pem_x509_crl(pki.crl_file.read_bytes())


def signing_request(key: DeviceKey, name: str = "whatever") -> str:
    """A request that is signed by its key."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    hashed = None if isinstance(key, ed25519.Ed25519PrivateKey) else SHA256()
    return builder.sign(key, hashed).public_bytes(Encoding.PEM).decode()


@dataclass(frozen=True)
class Certified:
    """A device with a key and a certificate."""

    name: str
    serial: int
    pem: str
    context: ssl.SSLContext

    def login(self, address: BrokerAddress) -> BrokerLogin:
        """How it gets into a broker."""
        return BrokerLogin(address.host, address.port, tls=self.context)


def certified_device(
    pki: FleetPki,
    name: str,
    folder: Path,
    *,
    key: DeviceKey | None = None,
    now: float | None = None,
    trusts: FleetPki | None = None,
) -> Certified:
    """A device whose certificate was issued at ``now``; it trusts the servers of ``trusts``."""
    key = key or ed25519.Ed25519PrivateKey.generate()
    moment = time.time() if now is None else now
    issued = pki.issue_device(name, signing_request(key), moment)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    both = folder / f"{issued.serial:x}.pem"
    both.write_text(issued.pem + private)
    context = anonymous_context(trusts or pki)
    context.load_cert_chain(both)
    return Certified(name, issued.serial, issued.pem, context)


def anonymous_context(pki: FleetPki) -> ssl.SSLContext:
    """Trusts the fleet's servers, and shows no certificate."""
    return ssl.create_default_context(cafile=str(pki.ca_file))


class SecuredBroker:
    """A running mosquitto with certificates, and what keeps it current."""

    def __init__(self, pki: FleetPki, launcher: ChildBroker) -> None:
        self.pki = pki
        self.launcher = launcher
        self.keeper = PkiKeeper(pki, launcher)
        self.address = launcher.start()

    def revoke(self, name_or_serial: str) -> None:
        """As the server does it."""
        self.pki.revoke(name_or_serial, time.time())
        self.keeper.check(time.time())


@contextmanager
def secured_broker(state_dir: Path) -> Iterator[SecuredBroker]:
    """A mosquitto of the test fleet; skips the test where it is not installed."""
    require("mosquitto")
    pki = make_pki(state_dir / "pki")
    launcher = open_broker("mosquitto", state_dir=state_dir, pki=pki)
    assert isinstance(launcher, ChildBroker)
    try:
        yield SecuredBroker(pki, launcher)
    finally:
        launcher.stop()


def secured_link(address: BrokerAddress, context: ssl.SSLContext | None = None) -> ServerLink:
    """The server's link to the test fleet."""
    tls = context or address.ssl_context()
    return ServerLink(address, fleet=FLEET, start_number=1, tls=tls, longest_retry_s=0.2)


class RawClient:
    """A client that does what no program of ours does.

    Args:
        address: the broker.
        context: its certificate.
        client_id: what it claims to be.
    """

    def __init__(self, address: BrokerAddress, context: ssl.SSLContext, client_id: str) -> None:
        self.heard: list[tuple[str, bytes]] = []
        self.accepted = False
        self.over = False
        self._client = Client(
            CallbackAPIVersion.VERSION2, client_id=client_id, reconnect_on_failure=False
        )
        self._client.tls_set_context(context)
        self._client.on_connect = self._on_connect
        self._client.on_disconnect = self._on_disconnect
        self._client.on_message = lambda _c, _d, message: self.heard.append(
            (message.topic, bytes(message.payload))
        )
        try:
            self._client.connect(address.host, address.port)
            self._client.loop_start()
        except OSError:
            self.over = True

    def say(self, topic: str, payload: bytes = b"{}") -> None:
        """Publish and wait for the broker's confirmation, which comes even for what it drops."""
        self._client.publish(topic, payload, qos=1).wait_for_publish(20)

    def listen(self, *filters: str) -> None:
        """Subscribe and wait for the confirmation, which comes even for what it will not hear."""
        confirmed = threading.Event()
        self._client.on_subscribe = lambda *_arguments: confirmed.set()
        self._client.subscribe([(text, 1) for text in filters])
        assert confirmed.wait(20)

    def certificate_of_the_broker(self) -> dict[str, Any]:
        """What ``getpeercert`` says about it."""
        sock = self._client.socket()
        assert isinstance(sock, ssl.SSLSocket)
        return dict(sock.getpeercert() or {})

    def close(self) -> None:
        """Go."""
        self._client.disconnect()
        self._client.loop_stop()

    def _on_connect(
        self, _client: Client, _data: object, _flags: object, reason: ReasonCode, _p: object
    ) -> None:
        self.accepted = not reason.is_failure

    def _on_disconnect(self, *_arguments: object) -> None:
        self.over = True


@contextmanager
def raw_client(
    address: BrokerAddress, context: ssl.SSLContext, client_id: str
) -> Iterator[RawClient]:
    """Connect, wait until the broker has decided, and leave at the end."""
    client = RawClient(address, context, client_id)
    try:
        wait_until(lambda: client.accepted or client.over)
        yield client
    finally:
        client.close()
