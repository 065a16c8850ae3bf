"""Where devices are enrolled: tokens and keys are checked, decisions written down and carried out.

    <pki>/enrolments/NAME.json    what was decided about one name

Beside the certificates and not in the database: whoever restores, copies or moves the authority
takes along whom it let in, and an old copy of the database brings no revoked device back. One file
a device, replaced as a whole: a decision is one small write, whatever the size of the fleet.

The order of effects is the safe one for a process that is killed in between: a certificate is in
the authority's ledger before it is in the file, and in the file before the device gets it; a
revocation is in the ledger first. Methods block for milliseconds and may be called from any thread.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from pathlib import Path

import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import TypeAdapter, ValidationError

from broker_server.enrollment import (
    Claim,
    Entry,
    Member,
    Status,
    accept,
    ask,
    reject,
    renewed,
    revoke,
)
from broker_server.pki import FleetPki
from broker_server.pki_folder import make_private_folder
from broker_server.pki_x509 import (
    CERTIFICATE_S,
    check_device_name,
    key_of_request,
    read_certificate,
)
from wire_protocol.durable import write_durably
from wire_protocol.errors import ConfigError, ProtocolError, Refused

log = structlog.get_logger()

RENEWABLE_S = CERTIFICATE_S / 2
"""A certificate with more than this left is not replaced: the device's clock must be wrong."""

_ENTRY = TypeAdapter(Entry)


@dataclass(frozen=True)
class Answer:
    """What a device is told; the certificate is there once it is accepted."""

    status: Status
    certificate_pem: str = ""


class EnrolmentDesk:
    """Decides with an operator's word and remembers.

    Args:
        pki: the fleet's certificates. What is revoked here takes effect where its list is followed:
            ``broker_server.pki_keeper`` ends sessions, ``broker_server.http_tls`` refuses.

    Raises:
        ConfigError: a remembered decision is unreadable.
    """

    def __init__(self, pki: FleetPki) -> None:
        self.pki = pki
        self._folder = pki.folder / "enrolments"
        make_private_folder(self._folder)
        self._lock = threading.Lock()
        self._entries = {path.stem: _load(path) for path in self._folder.glob("*.json")}

    def entries(self) -> dict[str, Entry]:
        """What is known of every name; certificates revoked elsewhere count as revoked."""
        with self._lock:
            return {name: self._current(name) for name in sorted(self._entries)}

    def ask(self, device_id: str, csr_pem: str, secret: str, now: float) -> Answer:
        """A device shows its token, for the first time or again.

        Args:
            device_id: the name that it wants.
            csr_pem: signed by its own key.
            secret: the first half of the token.
            now: seconds since 1970.

        Raises:
            Refused: the token is not good for this, or another key waits under this name.
            ProtocolError: no name or no signing request.
            ConfigError: the authority's key is not here.
        """
        check_device_name(device_id)
        claim = _claim(device_id, csr_pem)
        with self._lock:
            grant = self.pki.redeem_token(secret, device_id, now, claim=claim.key)
            asked = ask(
                self._current(device_id),
                claim,
                now,
                trusted=grant.pre_authorised,
                new_token=grant.first_use,
            )
            self._remember(device_id, asked.entry)
            if asked.accept_now:
                self._accept(device_id, now)
                return self._answer(device_id, claim.key)
            if asked.status is Status.PENDING and grant.first_use:
                log.warning("device_waits", device_id=device_id, key=claim.fingerprint)
            return self._answer(device_id, claim.key)

    def accept(self, device_id: str, now: float) -> None:
        """Let the device in that waits under this name; one that had the name before is revoked.

        Raises:
            Refused: nothing waits.
            ConfigError: the authority's key is not here.
        """
        with self._lock:
            self._accept(device_id, now)

    def reject(self, device_id: str, now: float) -> None:
        """Turn the device away that waits under this name.

        Raises:
            Refused: nothing waits.
        """
        with self._lock:
            self._remember(device_id, reject(self._current(device_id), now))
            log.info("device_rejected", device_id=device_id)

    def revoke(self, device_id: str, now: float) -> None:
        """Throw a device out, however it was enrolled.

        Raises:
            ConfigError: no certificate was ever issued for it, or the authority's key is not here.
        """
        check_device_name(device_id)
        with self._lock:
            self.pki.revoke(device_id, now)
            if device_id in self._entries:
                self._remember(device_id, revoke(self._entries[device_id], now))
            log.info("device_revoked", device_id=device_id)

    def renew(self, device_id: str, csr_pem: str, now: float) -> str:
        """The next certificate of a device that is inside, in PEM. Asked again, the same one.

        Args:
            device_id: who asks; its message was signed, or came over its own connection.
            csr_pem: for the key that it has.
            now: seconds since 1970.

        Raises:
            Refused: it is not inside, or this is another key.
            ProtocolError: not a signing request.
            ConfigError: the authority's key is not here.
        """
        claim = _claim(device_id, csr_pem)
        with self._lock:
            inside = self._current(device_id).inside
            if inside is not None:
                if inside.status is Status.REVOKED:
                    raise Refused(f"the certificate of {device_id} is revoked")
                if inside.claim.key != claim.key:
                    raise Refused("a certificate is renewed for the same key; enrol a new one")
                if _ends(inside) - now > RENEWABLE_S:
                    return inside.certificate_pem
            elif not self._was_issued(device_id, now):
                raise Refused(f"{device_id} has no certificate to renew; enrol it")
            issued = self.pki.issue_device(device_id, csr_pem, now)
            entry = self._entries.get(device_id, Entry())
            self._remember(device_id, renewed(entry, claim, issued.pem, now))
            log.info("certificate_renewed", device_id=device_id)
            return issued.pem

    def _accept(self, device_id: str, now: float) -> None:
        entry = self._current(device_id)
        waiting = entry.pending
        # Raises when nothing waits, before anything is issued.
        accept(entry, "", now)
        assert waiting is not None  # noqa: S101 - accept has just checked it
        before = entry.inside
        if before is not None and before.claim.key != waiting.claim.key:
            self.pki.revoke(device_id, now)
        issued = self.pki.issue_device(device_id, waiting.claim.csr_pem, now)
        self._remember(device_id, accept(entry, issued.pem, now))
        log.info("device_accepted", device_id=device_id, key=waiting.claim.fingerprint)

    def _answer(self, device_id: str, key: str) -> Answer:
        member = self._current(device_id).member(key)
        if member is None:
            return Answer(Status.REJECTED)
        return Answer(member.status, member.certificate_pem)

    def _current(self, device_id: str) -> Entry:
        entry = self._entries.get(device_id, Entry())
        accepted = entry.accepted
        if accepted is None or not self.pki.is_revoked(_serial(accepted)):
            return entry
        # By another process, such as broker-server pki revoke.
        return replace(entry, inside=replace(accepted, status=Status.REVOKED))

    def _was_issued(self, device_id: str, now: float) -> bool:
        return any(
            record.name == device_id
            and record.kind == "device"
            and record.revoked_at is None
            and record.not_after > now
            for record in self.pki.records()
        )

    def _remember(self, device_id: str, entry: Entry) -> None:
        if self._entries.get(device_id) == entry:
            return
        path = self._folder / f"{device_id}.json"
        try:
            write_durably(path, _ENTRY.dump_json(entry), site="server.enrolment")
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from error
        self._entries[device_id] = entry


def _claim(device_id: str, csr_pem: str) -> Claim:
    key = key_of_request(csr_pem)
    if not isinstance(key, Ed25519PublicKey):
        raise ProtocolError("a device's key must be Ed25519: it signs messages as well")
    return Claim(device_id, key.public_bytes_raw().hex(), csr_pem)


def _serial(member: Member) -> int:
    return read_certificate(member.certificate_pem).serial_number


def _ends(member: Member) -> float:
    return read_certificate(member.certificate_pem).not_valid_after_utc.timestamp()


def _load(path: Path) -> Entry:
    try:
        return _ENTRY.validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ConfigError(f"{path} is unreadable; restore it from backup") from error
