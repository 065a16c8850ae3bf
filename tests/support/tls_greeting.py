"""A server that does nothing but shake hands, and a device that does it with it."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from broker_server.http_tls import https_context
from broker_server.pki import FleetPki
from edge_agent.fleet_tls import tls_advice
from edge_agent.identity import Identity
from edge_agent.x509 import read_certificate_der


@contextmanager
def tls_server(context: ssl.SSLContext) -> Iterator[int]:
    """Shake hands with everybody on a loopback port, and greet them."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def greet() -> None:
            while True:
                try:
                    plain, _ = listener.accept()
                except OSError:
                    return
                with plain:
                    try:
                        with context.wrap_socket(plain, server_side=True) as connection:
                            shown = read_certificate_der(connection.getpeercert(True) or b"")
                            connection.sendall(f"{shown.common_name} {shown.serial}".encode())
                    except OSError:
                        continue

        thread = threading.Thread(target=greet, daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
    thread.join(10)


def greeting(identity: Identity, port: int, name: str = "localhost") -> tuple[str, int]:
    """Whom the server took us for: name, and serial of the certificate."""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        identity.context.wrap_socket(plain, server_hostname=name) as connection,
    ):
        shown, _, serial = connection.recv(100).decode().partition(" ")
        return shown, int(serial)


def server_side(pki: FleetPki) -> ssl.SSLContext:
    context = https_context(pki)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def refusal(identity: Identity, port: int, name: str = "localhost") -> str:
    """What a person reads when the handshake fails, as it must."""
    with pytest.raises(ssl.SSLError) as caught:
        greeting(identity, port, name)
    return str(tls_advice(caught.value))
