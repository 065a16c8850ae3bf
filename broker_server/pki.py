"""A fleet's own certificate authority, kept in one folder.

    ca.pem  ca.key           the authority; its key may live elsewhere
    crl.pem                  revoked certificates, for the broker
    server.pem  server.key   the HTTP server, and this server as client of the broker
    broker.pem  broker.key   the broker
    operator.key  operator.pub   Ed25519 in hex; whose word devices take about the server's key
    issued.jsonl             every certificate that was issued or revoked, in order
    tokens.jsonl             enrolment tokens, as digests

Everything that a method returned is on disk. Methods block for milliseconds and may be called from
any thread; other processes may work in the same folder, such as ``broker-server pki revoke``.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from broker_server.pki_folder import PUBLIC, locked, make_private_folder, read_file, replace_file
from broker_server.pki_keys import (
    check_pair,
    load_operator_seed,
    load_or_make_key,
    load_service_key,
    make_operator_key,
    private_pem,
)
from broker_server.pki_ledger import IssuedCertificate, Ledger
from broker_server.pki_tokens import EnrolmentTokens, TokenGrant
from broker_server.pki_x509 import (
    CERTIFICATE_S,
    DAY_S,
    Authority,
    DeviceIdentity,
    LeafKey,
    Usage,
    check_device_name,
    fleet_of,
    hosts_of,
    key_of_request,
    make_authority,
    pem_of,
    read_certificate,
    read_device_certificate,
    server_name,
    sign_leaf,
)
from wire_protocol.errors import ConfigError, ProtocolError, Refused
from wire_protocol.topics import check_name

Service = Literal["server", "broker"]
SERVICES: tuple[Service, ...] = ("server", "broker")

_CACHED_IDENTITIES = 2048
_TAKEOVER_S = 600.0
_MAKE_ONE = "make one: broker-server pki init"


@dataclass(frozen=True)
class Pair:
    """Certificate and private key of a service, as files."""

    certificate: Path
    key: Path


class FleetPki:
    """The certificates of one fleet.

    Args:
        folder: as ``create`` made it.

    Raises:
        ConfigError: there is no authority in it, or it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        text = read_file(self.ca_file, or_else=_MAKE_ONE)
        try:
            self._authority = read_certificate(text)
            self.fleet = fleet_of(self._authority)
        except ProtocolError as error:
            raise ConfigError(f"{self.ca_file}: {error}") from error
        self._ledger = Ledger(folder, self._authority)
        self._tokens = EnrolmentTokens(folder)
        self._identities: OrderedDict[bytes, DeviceIdentity] = OrderedDict()

    @classmethod
    def create(cls, folder: Path, fleet: str, hosts: Sequence[str], now: float) -> FleetPki:
        """Make everything that is missing; an unfinished ``create`` is finished.

        Args:
            folder: made when missing.
            fleet: whose authority.
            hosts: names and addresses of the server and the broker.
            now: seconds since 1970.

        Raises:
            ConfigError: the folder holds another fleet's authority, or cannot be written.
        """
        check_name("fleet", fleet)
        make_private_folder(folder)
        with locked(folder):
            if not (folder / "ca.pem").exists():
                authority = make_authority(fleet, load_or_make_key(folder / "ca.key"), now)
                _write_certificate(folder / "ca.pem", pem_of(authority))
            make_operator_key(folder / "operator.key", folder / "operator.pub")
        pki = cls(folder)
        if pki.fleet != fleet:
            raise ConfigError(
                f"{folder} holds the authority of fleet {pki.fleet!r}; "
                f"choose another folder for {fleet!r}"
            )
        if not pki.crl_file.exists():
            pki.write_crl(now)
        for kind in SERVICES:
            if not pki.pair(kind).certificate.exists():
                pki.issue_service(kind, hosts, now)
        return pki

    @property
    def ca_file(self) -> Path:
        """The authority's certificate."""
        return self.folder / "ca.pem"

    @property
    def crl_file(self) -> Path:
        """What is revoked, for the broker."""
        return self.folder / "crl.pem"

    def pair(self, kind: Service) -> Pair:
        """Of the broker, or of this server as HTTP server and as client of the broker."""
        return Pair(self.folder / f"{kind}.pem", self.folder / f"{kind}.key")

    @property
    def ca_pem(self) -> str:
        """The authority's certificate as text."""
        return pem_of(self._authority)

    @property
    def ca_fingerprint(self) -> str:
        """What a device knows the authority by before it trusts it: 32 hexadecimal digits."""
        return hashlib.sha256(self._authority.public_bytes(Encoding.DER)).hexdigest()[:32]

    @property
    def can_issue(self) -> bool:
        """Whether the authority's key is here."""
        return (self.folder / "ca.key").exists()

    @property
    def operator_public_key(self) -> str:
        """Ed25519, 64 hexadecimal digits.

        Raises:
            ConfigError: missing.
        """
        return read_file(self.folder / "operator.pub", or_else=_MAKE_ONE).strip()

    def operator_seed(self) -> bytes:
        """The operator's private key, Ed25519: 32 bytes.

        Raises:
            ConfigError: it is kept elsewhere, or damaged.
        """
        return load_operator_seed(self.folder / "operator.key")

    def issue_device(
        self, device_id: str, csr_pem: str, now: float, *, lifetime_s: float = CERTIFICATE_S
    ) -> IssuedCertificate:
        """Sign a device's request. Its certificates of before stay valid until they end.

        Args:
            device_id: becomes the common name, whatever the request says.
            csr_pem: signed by the device's own key, Ed25519 or P-256.
            now: seconds since 1970.
            lifetime_s: how long it is valid.

        Raises:
            ProtocolError: a name that no device may have, or a bad request.
            ConfigError: the authority's key is not here.
        """
        name = check_device_name(device_id)
        key = key_of_request(csr_pem)
        return self._issue(name, key, "device", now, lifetime_s=lifetime_s)

    def issue_service(self, kind: Service, hosts: Sequence[str], now: float) -> IssuedCertificate:
        """Make the certificate of the server or the broker, valid at these hosts and on loopback.

        The private key is kept when there is one, so that certificate and key always match, even
        after a crash in between; for a new key, delete the old one's file first.

        Raises:
            ConfigError: the authority's key is not here, a host is no name or address, or the
                folder cannot be written.
        """
        self._with_key()
        pair = self.pair(kind)
        with locked(self.folder):
            key = load_or_make_key(pair.key).public_key()
        name = server_name(self.fleet) if kind == "server" else f"legend-broker-{self.fleet}"
        all_hosts = tuple(dict.fromkeys([*hosts, "localhost", "127.0.0.1", "::1"]))
        issued = self._issue(name, key, kind, now, hosts=all_hosts)
        _write_certificate(pair.certificate, issued.pem)
        return issued

    def renew_service(self, kind: Service, now: float) -> IssuedCertificate:
        """Make the same certificate again, with a new end.

        Raises:
            ConfigError: there is none yet, or the authority's key is not here.
        """
        return self.issue_service(kind, self.hosts(kind), now)

    def hosts(self, kind: Service) -> tuple[str, ...]:
        """Names and addresses that a service's certificate is valid for."""
        return hosts_of(self._service_certificate(kind))

    def due(self, now: float) -> list[Service]:
        """Services whose certificate has lived two thirds of its life."""

        def is_due(kind: Service) -> bool:
            certificate = self._service_certificate(kind)
            start = certificate.not_valid_before_utc.timestamp()
            return now >= start + (certificate.not_valid_after_utc.timestamp() - start) * 2 / 3

        return [kind for kind in SERVICES if is_due(kind)]

    def takeover(self, name: str, now: float) -> tuple[str, str]:
        """A certificate of a few minutes and its key, PEM, to end a client's broker session with.

        Raises:
            ConfigError: the authority's key is not here.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        issued = self._issue(name, key.public_key(), "takeover", now, lifetime_s=_TAKEOVER_S)
        return issued.pem, private_pem(key)

    def records(self) -> list[IssuedCertificate]:
        """Every certificate that was issued here, oldest first."""
        return self._ledger.records()

    def revoke(self, name_or_serial: str, now: float) -> list[IssuedCertificate]:
        """Revoke every certificate of a name, or the one with a serial (hexadecimal).

        Returns:
            What is revoked by this call; empty when all of it was before.

        Raises:
            ConfigError: unknown, or in use by this server, or the authority's key is not here.
        """
        authority = self._with_key()
        with locked(self.folder):
            chosen = [r for r in self._ledger.find(name_or_serial) if r.revoked_at is None]
            self._check_not_in_use(chosen)
            self._ledger.revoke([record.serial for record in chosen], authority, now)
        return [replace(record, revoked_at=now) for record in chosen]

    def write_crl(self, now: float) -> None:
        """Write the revocation list again.

        Raises:
            ConfigError: the authority's key is not here, or the folder cannot be written.
        """
        authority = self._with_key()
        with locked(self.folder):
            self._ledger.write_crl(authority, now)

    def complete_crl(self, now: float) -> None:
        """Write the list again if a killed process or a full disk left something out of it."""
        if self.can_issue and not self.crl_is_complete():
            self.write_crl(now)

    def crl_is_complete(self) -> bool:
        """Whether the list, which is all that a broker knows, names all that is revoked."""
        return self._ledger.crl_is_complete()

    def is_revoked(self, serial: int) -> bool:
        """Whether a certificate must not be accepted any more."""
        return serial in self._ledger.revoked()

    def revoked(self) -> frozenset[int]:
        """The serials of all revoked certificates."""
        return self._ledger.revoked()

    def verify_device(self, certificate_pem: str, now: float) -> DeviceIdentity:
        """Read a device's certificate and check that it is valid now.

        Raises:
            ProtocolError: not a certificate.
            Refused: of another authority, expired, revoked, or not one of a device.
        """
        digest = hashlib.sha256(certificate_pem.encode(errors="surrogatepass")).digest()
        if (identity := self._identities.get(digest)) is None:
            identity = read_device_certificate(certificate_pem, self._authority)
            self._identities[digest] = identity
            if len(self._identities) > _CACHED_IDENTITIES:
                self._identities.popitem(last=False)
        if now >= identity.not_after:
            raise Refused(f"the certificate of {identity.name} has expired; renew it")
        if self.is_revoked(identity.serial):
            raise Refused(f"the certificate of {identity.name} is revoked")
        return identity

    def create_token(
        self, now: float, *, device_id: str | None = None, ttl_s: float = DAY_S
    ) -> str:
        """Make a one-time enrolment token; see ``EnrolmentTokens.create``.

        Returns:
            ``<secret>.<ca_fingerprint>``; only the secret is shown to ``redeem_token``.
        """
        secret = self._tokens.create(now, device_id=device_id, ttl_s=ttl_s)
        return f"{secret}.{self.ca_fingerprint}"

    def redeem_token(
        self, secret: str, device_id: str, now: float, *, claim: str = ""
    ) -> TokenGrant:
        """Use an enrolment token up; see ``EnrolmentTokens.redeem``."""
        return self._tokens.redeem(secret, device_id, now, claim=claim)

    def prepare_to_serve(self, now: float) -> None:
        """Check what a server needs; renew what is due, mend what a killed process left undone.

        Raises:
            ConfigError: a file is missing, damaged, expired or revoked.
        """
        if self.can_issue:
            for kind in self.due(now):
                self.renew_service(kind, now)
        self.complete_crl(now)
        # The broker lets nobody in without it.
        read_file(self.crl_file, or_else="copy it from where the authority's key is kept")
        for kind in SERVICES:
            certificate = self._service_certificate(kind)
            check_pair(certificate, self.pair(kind).key)
            if now >= certificate.not_valid_after_utc.timestamp():
                raise ConfigError(f"{self.pair(kind).certificate} has expired; issue another")
            if self.is_revoked(certificate.serial_number):
                raise ConfigError(f"{self.pair(kind).certificate} is revoked; issue another")

    def _issue(
        self,
        name: str,
        key: LeafKey,
        kind: Literal["device", "server", "broker", "takeover"],
        now: float,
        *,
        hosts: Sequence[str] = (),
        lifetime_s: float = CERTIFICATE_S,
    ) -> IssuedCertificate:
        usage: Usage = "device" if kind == "takeover" else kind
        certificate = sign_leaf(
            self._with_key(), name, key, usage, hosts=hosts, now=now, lifetime_s=lifetime_s
        )
        not_after = certificate.not_valid_after_utc.timestamp()
        issued = IssuedCertificate(certificate.serial_number, name, kind, not_after)
        with locked(self.folder):
            self._ledger.add(issued)
        return replace(issued, pem=pem_of(certificate))

    def _with_key(self) -> Authority:
        key = load_service_key(
            self.folder / "ca.key",
            or_else="issue and revoke where the authority's key is kept, then copy the result here",
        )
        if key.public_key() != self._authority.public_key():
            raise ConfigError(f"{self.folder / 'ca.key'} does not belong to {self.ca_file}")
        return Authority(self._authority, key)

    def _service_certificate(self, kind: Service) -> x509.Certificate:
        path = self.pair(kind).certificate
        text = read_file(path, or_else=f"make it: broker-server pki issue --{kind} --host NAME")
        try:
            return read_certificate(text)
        except ProtocolError as error:
            raise ConfigError(f"{path}: {error}") from error

    def _check_not_in_use(self, chosen: Sequence[IssuedCertificate]) -> None:
        for kind in SERVICES:
            in_place = self.pair(kind).certificate.exists()
            serial = self._service_certificate(kind).serial_number if in_place else None
            if serial in {record.serial for record in chosen}:
                raise ConfigError(
                    f"{serial:x} is in use by this {kind}; issue another first "
                    f"(delete {self.pair(kind).key} for a new key), then revoke by serial"
                )


def _write_certificate(path: Path, pem: str) -> None:
    replace_file(path, pem, site="server.pki_certificate", mode=PUBLIC)
