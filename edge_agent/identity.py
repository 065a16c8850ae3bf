"""Who this device is to its fleet: a key that never left it, and what was certified about it.

    <folder>/device.key     Ed25519, made here, readable by its owner only
    <folder>/device.pem     the certificate; its common name is the device id
    <folder>/ca.pem         the fleet's authority: servers that it certified are believed
    <folder>/operator.pub   64 hexadecimal digits: whose word makes a server's commands count

Knows files; asks nobody. ``edge_agent.enroll`` makes such a folder.
"""

from __future__ import annotations

import ssl
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from edge_agent.fleet_tls import FleetContext, check_chain, fleet_context
from edge_agent.settings import AgentSettings
from edge_agent.state_dir import write_durably
from edge_agent.x509 import Certificate, read_certificate, read_private_key
from wire_protocol.errors import ConfigError, ProtocolError
from wire_protocol.signed import Signer

KEY, CERTIFICATE, AUTHORITY, OPERATOR = "device.key", "device.pem", "ca.pem", "operator.pub"
_ENROL_AGAIN = "edge-agent enroll --again --url URL --token TOKEN"


@dataclass
class Identity:
    """A checked identity folder.

    Attributes:
        folder: where it lies.
        certificate: changes when it is renewed.
        seed: the secret 32 bytes of the Ed25519 key.
        operator_key: the operator's public Ed25519 key, 32 bytes.
        context: for HTTPS and for MQTT; presents the certificate, checks the server and its name.
    """

    folder: Path
    certificate: Certificate
    seed: bytes = field(repr=False)
    operator_key: bytes
    context: FleetContext = field(repr=False)

    @property
    def device_id(self) -> str:
        """The common name of the certificate."""
        return self.certificate.common_name

    def sign(self, data: bytes) -> bytes:
        """Sign a message as this device; its certificate goes with it.

        Raises:
            ProtocolError: it becomes too large.
        """
        return Signer(self.seed, ssl.DER_cert_to_PEM_cert(self.certificate.der)).sign(data)

    def install(self, pem: str) -> None:
        """Take in a renewed certificate for the same key; connections from now on present it.

        A crash leaves the old one or the new one. The same certificate again changes nothing.

        Raises:
            ProtocolError: it is not this device's, not of this key, not of this fleet's
                authority, or not newer.
            DeviceError: the disk is full or failed.
        """
        fresh = _checked_renewal(pem, self.certificate)
        if fresh.der == self.certificate.der:
            return
        trial = self.folder / f".{CERTIFICATE}.trial"
        try:
            write_durably(trial, pem.encode(), site="agent.certificate_trial")
            check_chain(trial, self.folder / KEY, self.folder / AUTHORITY)
        except ssl.SSLError as error:
            raise ProtocolError("the new certificate is not of this fleet's authority") from error
        finally:
            trial.unlink(missing_ok=True)
        write_durably(self.folder / CERTIFICATE, pem.encode(), site="agent.certificate")
        self.certificate = fresh
        self.context.certain_s = float(fresh.not_before)
        self.context.load_cert_chain(self.folder / CERTIFICATE, self.folder / KEY)


def identity_folder(settings: AgentSettings) -> Path:
    """Where the identity lies, or would lie."""
    return settings.identity or settings.state_dir / "identity"


def identity_of(settings: AgentSettings) -> Identity | None:
    """The identity that this agent must use; None for a server without TLS.

    Raises:
        ConfigError: there is one, and it cannot be used; says which file and what to do.
    """
    folder = identity_folder(settings)
    try:
        if settings.identity is None and not (folder / CERTIFICATE).exists():
            return None
    except OSError as error:
        raise _unreadable(folder / CERTIFICATE, error) from error
    if not settings.server.startswith("https://"):
        raise ConfigError(
            f"this device has an identity in {folder}, but 'server' is {settings.server}: set the "
            "https address of the server, or remove that folder for one without TLS"
        )
    return load_identity(folder, device_id=settings.device_id, now=time.time())


def load_identity(folder: Path, *, device_id: str, now: float) -> Identity:
    """Read and check an identity folder.

    Args:
        folder: as in the module's docstring.
        device_id: whose it must be.
        now: this device's clock, seconds since 1970. A clock that is earlier than the
            certificate is wrong; the certificate is kept.

    Raises:
        ConfigError: something is missing, damaged, of somebody else, expired, or readable by
            others; says which file and what to do.
    """
    seed = _key(folder / KEY)
    path = folder / CERTIFICATE
    try:
        certificate = read_certificate(_text(path))
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: {error}; enrol again: {_ENROL_AGAIN}") from error
    if certificate.common_name != device_id:
        raise ConfigError(
            f"{path} is the certificate of {certificate.common_name!r}, but this device is "
            f"{device_id!r}; correct 'device_id', or enrol again: {_ENROL_AGAIN}"
        )
    if certificate.not_after < now:
        raise ConfigError(
            f"{path} expired on {_day(certificate.not_after)} and this device's clock says "
            f"{_day(now)}; correct the clock if it is wrong, else enrol again: {_ENROL_AGAIN}"
        )
    return Identity(folder, certificate, seed, _operator_key(folder), _context(folder, certificate))


def tls_of(identity: Identity | None) -> FleetContext | None:
    """What https connections to the server use; None trusts the system's authorities."""
    return identity.context if identity else None


def remaining_s(certificate: Certificate, now: float) -> float:
    """Seconds until a certificate ends; all of them for a clock that is earlier than it."""
    return certificate.not_after - max(now, certificate.not_before)


def _context(folder: Path, certificate: Certificate) -> FleetContext:
    authority = folder / AUTHORITY
    _text(authority)
    try:
        context = fleet_context(authority, certain_s=float(certificate.not_before))
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(
            f"{authority} is no certificate of an authority; enrol again: {_ENROL_AGAIN}"
        ) from error
    try:
        context.load_cert_chain(folder / CERTIFICATE, folder / KEY)
    except ssl.SSLError as error:
        raise ConfigError(
            f"{folder / KEY} is not the key of {folder / CERTIFICATE}; put back the two that "
            f"belong together, or enrol again: {_ENROL_AGAIN}"
        ) from error
    try:
        check_chain(folder / CERTIFICATE, folder / KEY, authority)
    except ssl.SSLError as error:
        raise ConfigError(
            f"{folder / CERTIFICATE} was not issued by the authority in {authority}; put back the "
            f"two that belong together, or enrol again: {_ENROL_AGAIN}"
        ) from error
    return context


def _checked_renewal(pem: str, current: Certificate) -> Certificate:
    try:
        fresh = read_certificate(pem)
    except ValueError as error:
        raise ProtocolError(f"the new certificate is damaged: {error}") from error
    if (fresh.common_name, fresh.public_key) != (current.common_name, current.public_key):
        raise ProtocolError("the new certificate is not for this device and its key")
    if fresh.not_after < current.not_after:
        raise ProtocolError("the new certificate ends before the one that it replaces")
    return fresh


def _key(path: Path) -> bytes:
    text = _text(path)
    if path.stat().st_mode & 0o077:
        raise ConfigError(f"{path} can be read by others; run: chmod 600 {path}")
    try:
        return read_private_key(text)
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: {error}; enrol again: {_ENROL_AGAIN}") from error


def _operator_key(folder: Path) -> bytes:
    path = folder / OPERATOR
    text = _text(path).strip()
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != 32 or len(text) != 64:
        raise ConfigError(
            f"{path} does not hold the operator's key, 64 hexadecimal digits; put it back, or "
            f"enrol again: {_ENROL_AGAIN}"
        )
    return key


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is missing; put it back, or enrol: {_ENROL_AGAIN}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is damaged; enrol again: {_ENROL_AGAIN}") from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"{path} cannot be read: {error.strerror}; it must belong to the user that runs the agent"
    )


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, tz=timezone.utc).date().isoformat()
