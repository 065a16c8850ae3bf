"""Keeps the certificates of a running server current.

What another process changes in the folder (``broker-server pki revoke``, a list copied from where
the authority's key is kept) takes effect as what this server does itself: TLS contexts load the
new certificate, the broker reads its files again, and sessions of revoked devices end.
"""

from __future__ import annotations

import ssl
import threading

import structlog

from broker_server.broker import BrokerLauncher
from broker_server.pki import FleetPki
from broker_server.pki_folder import stamp
from wire_protocol.errors import BrokerUnavailable, ConfigError

log = structlog.get_logger()


class PkiKeeper:
    """Call ``check`` every few seconds, and after revoking something.

    Make it before the broker is started: what is revoked later ends sessions.

    Args:
        pki: the fleet's certificates.
        launcher: the broker that uses them.
    """

    def __init__(self, pki: FleetPki, launcher: BrokerLauncher) -> None:
        self._pki = pki
        self._launcher = launcher
        self._contexts: list[ssl.SSLContext] = []
        self._lock = threading.Lock()
        self._loaded = stamp(pki.pair("server").certificate)
        self._broker_has = stamp(pki.pair("broker").certificate)
        self._applied = pki.revoked()

    def follow(self, context: ssl.SSLContext | None) -> None:
        """Load the server's certificate into this context whenever it is renewed."""
        if context is not None:
            self._contexts.append(context)

    def check(self, now: float) -> None:
        """Renew what is due and take changes into use; blocks, so call it in a thread.

        What cannot be done now is logged and tried again by the next call.

        Args:
            now: seconds since 1970.
        """
        with self._lock:
            for step in (self._renew, self._load, self._apply):
                try:
                    step(now)
                except (ConfigError, BrokerUnavailable, OSError) as error:
                    log.error("certificates_not_applied", step=step.__name__, error=str(error))

    def _renew(self, now: float) -> None:
        if self._pki.can_issue:
            for kind in self._pki.due(now):
                issued = self._pki.renew_service(kind, now)
                log.info("certificate_renewed", name=issued.name, serial=f"{issued.serial:x}")

    def _load(self, _now: float) -> None:
        pair = self._pki.pair("server")
        found = stamp(pair.certificate)
        if found != self._loaded:
            # Connections from now on present it; open ones go on as they are.
            for context in self._contexts:
                context.load_cert_chain(pair.certificate, pair.key)
            self._loaded = found

    def _apply(self, now: float) -> None:
        # The broker knows the list alone: a session ended before it is whole would come back.
        self._pki.complete_crl(now)
        found = stamp(self._pki.pair("broker").certificate)
        # Where the authority's key is elsewhere, its list may still be on the way here.
        revoked = self._pki.revoked() if self._pki.crl_is_complete() else self._applied
        fresh = revoked - self._applied
        if not fresh and found == self._broker_has:
            return
        names = self._names_of(fresh)
        self._launcher.apply_certificates(names)
        self._broker_has, self._applied = found, revoked
        log.info("broker_certificates_applied", ended=[name for name in names if name])

    def _names_of(self, serials: frozenset[int]) -> list[str | None]:
        """Devices whose sessions must end; None for one that was issued elsewhere."""
        kinds = {record.serial: record for record in self._pki.records()}
        found = [kinds.get(serial) for serial in sorted(serials)]
        # This server's own session would lose what waits in it.
        names = {r.name if r else None for r in found if r is None or r.kind == "device"}
        return sorted(names, key=str)
