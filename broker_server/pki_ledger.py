"""What a fleet's authority has issued and revoked: ``issued.jsonl`` and ``crl.pem``.

Reading follows changes that other processes make. The list may also come from elsewhere, where the
authority's key lives; a certificate counts as revoked when either file says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cryptography import x509

from broker_server.pki_folder import PUBLIC, Journal, replace_file, stamp
from broker_server.pki_x509 import Authority, make_crl, pem_of
from wire_protocol.errors import ConfigError


@dataclass(frozen=True)
class IssuedCertificate:
    """One certificate that this authority made. Times in seconds since 1970.

    Attributes:
        serial: unique.
        name: common name; for a device its id.
        kind: device, server, broker, or takeover (made to end a session at the broker).
        not_after: when it ends.
        revoked_at: None while it is not revoked.
        pem: the certificate, where it has just been made; empty in a list.
    """

    serial: int
    name: str
    kind: str
    not_after: float
    revoked_at: float | None = None
    pem: str = ""


@dataclass(frozen=True)
class _Seen:
    """The two files as they were read last."""

    stamps: tuple[object, object] | None
    records: dict[int, IssuedCertificate]
    listed: frozenset[int]
    revoked: frozenset[int]


class Ledger:
    """The two files of one folder. Hold the folder's lock to write.

    Args:
        folder: of the authority.
        authority: its certificate.
    """

    def __init__(self, folder: Path, authority: x509.Certificate) -> None:
        self.crl_file = folder / "crl.pem"
        self._journal = Journal(folder / "issued.jsonl", site="server.pki_issued")
        self._authority = authority
        # Replaced as a whole: threads may read.
        self._seen = _Seen(None, {}, frozenset(), frozenset())

    def records(self) -> list[IssuedCertificate]:
        """Every certificate that was issued here, oldest first."""
        return list(self._follow().records.values())

    def revoked(self) -> frozenset[int]:
        """Serials of all revoked certificates."""
        return self._follow().revoked

    def crl_is_complete(self) -> bool:
        """Whether the list names all that is revoked, as it does unless its writer was killed."""
        seen = self._follow()
        return self.crl_file.exists() and seen.revoked == seen.listed

    def find(self, name_or_serial: str) -> list[IssuedCertificate]:
        """The certificates of a name, or the one with a serial in hexadecimal digits.

        Raises:
            ConfigError: there is none.
        """
        records = self._follow().records
        found = [record for record in records.values() if record.name == name_or_serial]
        if not found:
            try:
                found = [records[int(name_or_serial, 16)]]
            except (ValueError, KeyError) as error:
                raise ConfigError(
                    f"no certificate was issued here for {name_or_serial!r}; "
                    "see: broker-server pki list"
                ) from error
        return found

    def add(self, issued: IssuedCertificate) -> None:
        """Record a new certificate. Do it before anybody gets it: then each can be revoked."""
        entry = {"name": issued.name, "kind": issued.kind, "not_after": issued.not_after}
        self._journal.append({"serial": f"{issued.serial:x}", **entry, "revoked_at": None})

    def revoke(self, serials: Iterable[int], authority: Authority, now: float) -> None:
        """Record that certificates are revoked, then write the list."""
        entries = [{"serial": f"{serial:x}", "revoked_at": now} for serial in serials]
        if entries:
            self._journal.append(*entries)
        self.write_crl(authority, now)

    def write_crl(self, authority: Authority, now: float) -> None:
        """Write the list of everything that is revoked."""
        previous = self._load_crl()
        times = {e.serial_number: e.revocation_date_utc.timestamp() for e in previous or ()}
        for record in self._follow().records.values():
            if record.revoked_at is not None:
                times[record.serial] = record.revoked_at
        entries = sorted(times.items())
        crl = make_crl(authority, entries, previous=previous, now=now)
        replace_file(self.crl_file, pem_of(crl), site="server.pki_crl", mode=PUBLIC)

    def _follow(self) -> _Seen:
        stamps = (stamp(self._journal.path), stamp(self.crl_file))
        if stamps != self._seen.stamps:
            records: dict[int, IssuedCertificate] = {}
            for entry in self._journal.read():
                self._apply(records, entry)
            crl = self._load_crl()
            listed = frozenset(entry.serial_number for entry in crl or ())
            own = {serial for serial, record in records.items() if record.revoked_at is not None}
            self._seen = _Seen(stamps, records, listed, listed | own)
        return self._seen

    def _apply(self, records: dict[int, IssuedCertificate], entry: dict[str, Any]) -> None:
        try:
            serial = int(entry["serial"], 16)
            if "name" not in entry:
                records[serial] = replace(records[serial], revoked_at=float(entry["revoked_at"]))
                return
            not_after = float(entry["not_after"])
            records[serial] = IssuedCertificate(
                serial, str(entry["name"]), str(entry["kind"]), not_after
            )
        except (KeyError, ValueError, TypeError) as error:
            raise ConfigError(
                f"{self._journal.path} holds {str(entry)[:100]}, which is no record; "
                "restore it from backup"
            ) from error

    def _load_crl(self) -> x509.CertificateRevocationList | None:
        try:
            crl = x509.load_pem_x509_crl(self.crl_file.read_bytes())
            # A list of another authority would revoke nothing here.
            genuine = crl.is_signature_valid(self._authority.public_key())  # type: ignore[arg-type]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"{self.crl_file} is no revocation list in PEM form") from error
        if not genuine:
            raise ConfigError(f"{self.crl_file} is not signed by this fleet's authority")
        return crl
