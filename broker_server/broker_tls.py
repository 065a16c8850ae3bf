"""A mosquitto that knows its clients by the certificates of the fleet's authority.

The common name of the certificate is user and client id, so nobody can take another's session.
Source of every setting: mosquitto.conf(5).
"""

from __future__ import annotations

import ssl
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from broker_server.broker_address import BrokerAddress, TlsFiles
from broker_server.broker_process import check_that_it_answers
from broker_server.broker_programs import Listener, mosquitto_command, mosquitto_limits
from broker_server.pki import FleetPki, Service
from broker_server.pki_x509 import server_name
from wire_protocol.errors import BrokerUnavailable, ConfigError
from wire_protocol.topics import ROOT

RELOADED = "Reloading config"
"""What mosquitto logs, at level information, before it reads its files again."""


@dataclass(frozen=True)
class MosquittoTls:
    """The mosquitto program of the system, for clients with a certificate only.

    Attributes:
        pki: the fleet's certificates.
    """

    pki: FleetPki
    name: str = "mosquitto"

    def files(self, listener: Listener) -> Mapping[str, str]:
        """Configuration and access rules; there are no passwords."""
        folder = listener.folder
        broker = self.pki.pair("broker")
        text = f"""\
per_listener_settings false
listener {listener.port} {listener.host}
cafile {self.pki.ca_file.absolute()}
certfile {broker.certificate.absolute()}
keyfile {broker.key.absolute()}
crlfile {self.pki.crl_file.absolute()}
tls_version tlsv1.2
require_certificate true
use_identity_as_username true
use_username_as_clientid true
allow_anonymous false
acl_file {folder / "acl"}
log_type error
log_type warning
log_type notice
log_type information
connection_messages true
{mosquitto_limits(folder)}"""
        return {"mosquitto.conf": text, "acl": access_rules(self.pki.fleet)}

    def command(self, folder: Path) -> list[str]:
        """Start the installed program."""
        return mosquitto_command(folder)


def access_rules(fleet: str) -> str:
    """Who may say and hear what; ``%u`` is the common name of the certificate."""
    return f"""\
user {server_name(fleet)}
topic readwrite {ROOT}/{fleet}/#
topic read $SYS/#

pattern write {ROOT}/{fleet}/d/%u/up/#
pattern read {ROOT}/{fleet}/d/%u/down/#
pattern read {ROOT}/{fleet}/all/#
"""


def tls_files(pki: FleetPki, service: Service) -> TlsFiles:
    """What a service presents, and whom it trusts."""
    pair = pki.pair(service)
    return TlsFiles(pki.ca_file, pair.certificate, pair.key)


def check_host(pki: FleetPki, host: str) -> None:
    """Check that the broker's certificate is valid for where it listens.

    Raises:
        ConfigError: it is not, so every client would refuse it.
    """
    if host not in pki.hosts("broker"):
        raise ConfigError(
            f"the broker's certificate is not valid for {host}; make another: "
            f"broker-server pki issue --broker --host {host}"
        )


def check_with_own_certificate(pki: FleetPki, address: BrokerAddress) -> BrokerAddress:
    """Where to ask a broker of ours whether it answers.

    As the broker itself: with the server's certificate, the question would take over the session
    of the server.
    """
    return replace(address, tls_files=tls_files(pki, "broker"))


def end_session(pki: FleetPki, address: BrokerAddress, name: str, now: float) -> None:
    """End a client's session at the broker, with everything that waits in it.

    Connects under the client's name, which makes the broker close the connection of before.

    Raises:
        ConfigError: the authority's key is not here.
        BrokerUnavailable: the broker does not answer.
    """
    certificate, key = pki.takeover(name, now)
    context = ssl.create_default_context(cafile=str(pki.ca_file))
    # The ssl module reads keys from files only; this one lives as long as the call.
    with tempfile.TemporaryDirectory(prefix="legend-") as folder:
        both = Path(folder) / "takeover.pem"
        both.touch(mode=0o600)
        both.write_text(certificate + key, encoding="ascii")
        context.load_cert_chain(both)
    try:
        check_that_it_answers(address, tls=context)
    except ConfigError as error:
        raise BrokerUnavailable(str(error)) from error
