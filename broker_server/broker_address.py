"""Where a broker is and how to get in. Plain values: nothing is opened here."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path

from wire_protocol.errors import ConfigError


@dataclass(frozen=True)
class Credentials:
    """A user of the broker. The password shows in no repr and so in no log."""

    username: str
    password: str = field(repr=False)


@dataclass(frozen=True)
class TlsFiles:
    """PEM files: the authority to trust, and the certificate and key to present."""

    authority: Path
    certificate: Path
    key: Path


@dataclass(frozen=True)
class BrokerAddress:
    """A broker that answers.

    Attributes:
        host: as this server reaches it.
        port: TCP port.
        server_credentials: for this server; None when the broker asks for none.
        device_credentials: what to hand to devices; None when whoever runs the broker does that.
        tls: the connection is encrypted.
        tls_files: with TLS, who to trust and what to present; None trusts the system's authorities
            and presents nothing.
        loopback_only: devices on other machines cannot reach it.
    """

    host: str
    port: int
    server_credentials: Credentials | None = None
    device_credentials: Credentials | None = None
    tls: bool = False
    tls_files: TlsFiles | None = None
    loopback_only: bool = False

    @property
    def url(self) -> str:
        """For people: without user and password."""
        return f"{'mqtts' if self.tls else 'mqtt'}://{self.host}:{self.port}"

    def ssl_context(self) -> ssl.SSLContext | None:
        """What verifies the broker's certificate and presents ours; None without TLS.

        Raises:
            ConfigError: a file is missing or damaged.
        """
        if not self.tls:
            return None
        files = self.tls_files
        if files is None:
            return ssl.create_default_context()
        try:
            context = ssl.create_default_context(cafile=str(files.authority))
            context.load_cert_chain(files.certificate, files.key)
        except OSError as error:  # ssl.SSLError is one
            raise ConfigError(
                f"cannot connect with {files.certificate}, its key and {files.authority}: {error}"
            ) from error
        return context
