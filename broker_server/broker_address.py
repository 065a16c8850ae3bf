"""Where a broker is and how to get in. Plain values: nothing is opened here."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Credentials:
    """A user of the broker. The password shows in no repr and so in no log."""

    username: str
    password: str = field(repr=False)


@dataclass(frozen=True)
class BrokerAddress:
    """A broker that answers.

    Attributes:
        host: as this server reaches it.
        port: TCP port.
        server_credentials: for this server; None when the broker asks for none.
        device_credentials: what to hand to devices; None when whoever runs the broker does that.
        tls: the connection is encrypted.
        loopback_only: devices on other machines cannot reach it.
    """

    host: str
    port: int
    server_credentials: Credentials | None = None
    device_credentials: Credentials | None = None
    tls: bool = False
    loopback_only: bool = False

    @property
    def url(self) -> str:
        """For people: without user and password."""
        return f"{'mqtts' if self.tls else 'mqtt'}://{self.host}:{self.port}"

    def ssl_context(self, ca_file: str | None = None) -> ssl.SSLContext | None:
        """What verifies the broker's certificate; None without TLS.

        Args:
            ca_file: PEM file of the authority that signed it; None trusts the system's.

        Raises:
            OSError: the file cannot be read.
        """
        return ssl.create_default_context(cafile=ca_file) if self.tls else None
