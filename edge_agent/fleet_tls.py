"""TLS with the fleet's own authority: what is presented, who is believed, what errors mean.

Chain and host name are always checked. So is time, except where it is this device's clock that must
be wrong: nobody issues a certificate for the future, so "not yet valid" means that the clock is
behind. Boards without a battery boot like that, and must be able to reach the server that they get
the time from. From then on dates are compared with the latest moment known to have passed.
"""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import structlog

from edge_agent.x509 import read_certificate_der

log = structlog.get_logger()

NO_CHECK_TIME = 0x200000
"""X509_V_FLAG_NO_CHECK_TIME of OpenSSL; the ssl module has no name for it."""

_NOT_YET_VALID, _HAS_EXPIRED, _WRONG_NAME, _WRONG_ADDRESS = 9, 10, 62, 64

_ALERTS = {
    "CERTIFICATE_EXPIRED": "this device's certificate has expired",
    "CERTIFICATE_REVOKED": "this device's certificate was revoked",
    "UNKNOWN_CA": "this device's certificate is of another fleet's authority",
    "CERTIFICATE_REQUIRED": "the server wants a certificate of this device, and it has none",
    "BAD_CERTIFICATE": "this device's certificate is not accepted",
    "CERTIFICATE_UNKNOWN": "this device's certificate is not accepted",
}
_ENROL = "enrol this device: edge-agent enroll --again --url URL --token TOKEN"


class FleetContext(ssl.SSLContext):
    """A client's side of TLS, shared by HTTP and MQTT.

    A new certificate may be loaded at any time: open connections keep the old one, the next ones
    present the new one.
    """

    clock_is_behind: bool
    certain_s: float
    """Seconds since 1970 that have certainly passed."""

    _lock: threading.Lock

    def load_cert_chain(self, *args: Any, **kwargs: Any) -> None:
        """As the parent; not while another thread begins a connection."""
        with self._lock:
            super().load_cert_chain(*args, **kwargs)

    def wrap_socket(self, *args: Any, **kwargs: Any) -> ssl.SSLSocket:
        """As the parent; not while another thread loads a certificate."""
        with self._lock:
            return super().wrap_socket(*args, **kwargs)

    def wrap_bio(self, *args: Any, **kwargs: Any) -> ssl.SSLObject:
        """As the parent; not while another thread loads a certificate."""
        with self._lock:
            return super().wrap_bio(*args, **kwargs)

    def forgive_clock(self, error: ssl.SSLCertVerificationError) -> None:
        """Stop trusting the clock when ``error`` proves it wrong; the next attempt may succeed."""
        if error.verify_code == _NOT_YET_VALID and not self.clock_is_behind:
            log.warning("clock_is_behind", remedy="set this device's clock, e.g. with NTP")
            self.distrust_clock()

    def distrust_clock(self) -> None:
        """Compare dates with what certainly passed, and not with the clock alone."""
        self.clock_is_behind = True
        self.verify_flags |= NO_CHECK_TIME

    def check_age(self, der: bytes | None) -> None:
        """Refuse a peer whose certificate certainly ended; for when OpenSSL does not look."""
        if not self.clock_is_behind or der is None:
            return
        if read_certificate_der(der).not_after < max(self.certain_s, time.time()):
            raise ssl.SSLCertVerificationError("certificate verify failed: certificate has expired")


class _FleetSocket(ssl.SSLSocket):
    def do_handshake(self, block: bool = False) -> None:
        _handshake(self, lambda: super(_FleetSocket, self).do_handshake(block))


class _FleetObject(ssl.SSLObject):
    def do_handshake(self) -> None:
        _handshake(self, super().do_handshake)


def _handshake(connection: ssl.SSLSocket | ssl.SSLObject, shake: Any) -> None:
    context = connection.context
    assert isinstance(context, FleetContext)  # noqa: S101 - these classes are used by it alone
    try:
        shake()
    except ssl.SSLCertVerificationError as error:
        context.forgive_clock(error)
        raise
    context.check_age(connection.getpeercert(binary_form=True))


FleetContext.sslsocket_class = _FleetSocket
FleetContext.sslobject_class = _FleetObject


def fleet_context(ca_file: Path, *, certain_s: float) -> FleetContext:
    """Believe servers that this authority certified, and nobody else.

    Args:
        ca_file: PEM.
        certain_s: seconds since 1970 that have certainly passed, such as the beginning of a
            certificate that we hold.

    Raises:
        OSError: the file cannot be read, or holds no certificate.
    """
    context = FleetContext(ssl.PROTOCOL_TLS_CLIENT)
    context._lock = threading.Lock()  # noqa: SLF001 - SSLContext is made in __new__, without us
    context.clock_is_behind = False
    context.certain_s = certain_s
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(cafile=ca_file)
    if time.time() < certain_s:
        context.distrust_clock()
    return context


def check_chain(certificate_file: Path, key_file: Path, ca_file: Path) -> None:
    """Check that key and certificate belong together, and that the authority issued it.

    Time and revocation are left out: the server judges those. The check is a handshake in memory.

    Raises:
        ssl.SSLError: they do not, or it did not.
    """
    server, client = (
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER),
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
    )
    client.check_hostname = False
    client.verify_mode = ssl.CERT_NONE  # it is the client's certificate that is looked at
    server.verify_mode = ssl.CERT_REQUIRED
    server.verify_flags |= NO_CHECK_TIME
    server.load_verify_locations(cafile=ca_file)
    for side in (server, client):
        side.load_cert_chain(certificate_file, key_file)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(10):
        for end in list(ends):
            try:
                end.do_handshake()
                ends.remove(end)
            except ssl.SSLWantReadError:
                continue
        if not ends:
            return
    raise ssl.SSLError("the handshake does not end")


def tls_advice(error: BaseException) -> str | None:
    """What a failed connection says about certificates, and what to do.

    Args:
        error: as a client library raised it; TLS may be the cause of its cause.

    Returns:
        None when TLS has nothing to do with it.
    """
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return _server_not_believed(cause)
        if isinstance(cause, ssl.SSLError):
            return _not_believed_by_server(cause)
    return None


def refused_by_server(error: BaseException) -> bool:
    """Whether the server did not like this device's certificate; trying again is of no use."""
    return any(
        isinstance(cause, ssl.SSLError) and _alert(cause) is not None for cause in _causes(error)
    )


def _server_not_believed(error: ssl.SSLCertVerificationError) -> str:
    code = getattr(error, "verify_code", _HAS_EXPIRED)
    if code in (_WRONG_NAME, _WRONG_ADDRESS):
        return (
            "the server's certificate is for another name; use a name that it was made for, or add "
            "this one: broker-server pki"
        )
    if code == _HAS_EXPIRED:
        return (
            "the server's certificate has expired; renew it there, or correct this device's clock"
        )
    if code == _NOT_YET_VALID:
        return "this device's clock is behind; set it, e.g. with NTP"
    return (
        f"the server's certificate is of an authority that is not believed; check it, or {_ENROL}"
    )


def _not_believed_by_server(error: ssl.SSLError) -> str:
    said = _alert(error)
    if said is not None:
        return f"{said}; {_ENROL}"
    reason = (error.reason or str(error)).lower().replace("_", " ")
    return f"no TLS connection: {reason}; does 'server' lead to the server's https port?"


def _alert(error: ssl.SSLError) -> str | None:
    reason = error.reason or ""
    if "ALERT" not in reason:
        return None
    return next((text for alert, text in _ALERTS.items() if reason.endswith(alert)), None)


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in seen:
        yield following
        seen.append(following)
        following = following.__cause__ or following.__context__
