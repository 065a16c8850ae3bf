"""Certificates as values: made, read and checked. Knows no files and no clock."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from wire_protocol.errors import ConfigError, ProtocolError, Refused
from wire_protocol.topics import check_name

DAY_S = 86_400.0
CERTIFICATE_S = 90 * DAY_S
AUTHORITY_S = 3650 * DAY_S
LARGEST_PEM_BYTES = 16_384
# Names that mean rights at the broker: a device must never hold one.
RESERVED_PREFIX = "legend-"
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
_AUTHORITY_PREFIX = "legend-ca-"
# A device's clock may be a little behind ours.
_BACKDATED_S = 3600.0

AuthorityKey = ec.EllipticCurvePrivateKey
LeafKey = ed25519.Ed25519PublicKey | ec.EllipticCurvePublicKey
Usage = Literal["device", "server", "broker"]
"""A device is a TLS client. Server and broker serve and connect, the broker to itself: whether it
answers is asked with its own certificate, which has no rights there."""

_SERVICE_USAGES = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
_USAGES = {
    "device": [ExtendedKeyUsageOID.CLIENT_AUTH],
    "server": _SERVICE_USAGES,
    "broker": _SERVICE_USAGES,
}


@dataclass(frozen=True)
class Authority:
    """A fleet's certificate authority together with its key."""

    certificate: x509.Certificate
    key: AuthorityKey


@dataclass(frozen=True)
class DeviceIdentity:
    """Who showed a certificate.

    Attributes:
        name: the device id.
        public_key: Ed25519, 64 hexadecimal digits; the key of the device's signatures.
        serial: of the certificate.
        not_after: when it ends, seconds since 1970.
    """

    name: str
    public_key: str
    serial: int
    not_after: float


def check_device_name(name: str) -> str:
    """Return ``name`` when a device may have it.

    Raises:
        ProtocolError: it cannot stand in a topic, or it is reserved for servers.
    """
    check_name("device id", name)
    if name.startswith(RESERVED_PREFIX):
        raise ProtocolError(
            f"device id {name!r} begins with {RESERVED_PREFIX!r}, which is reserved for servers; "
            "choose another"
        )
    return name


def server_name(fleet: str) -> str:
    """The server's name at the broker: common name, user and client id."""
    return f"legend-server-{fleet}"


def make_authority(fleet: str, key: AuthorityKey, now: float) -> x509.Certificate:
    """A self-signed authority for one fleet, valid for ten years."""
    name = _subject(_AUTHORITY_PREFIX + fleet)
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    usage = _key_usage(digital_signature=False, authority=True)
    return (
        _started(name, name, now, now + AUTHORITY_S)
        .public_key(key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, SHA256())
    )


def fleet_of(authority: x509.Certificate) -> str:
    """The fleet that an authority is for.

    Raises:
        ProtocolError: the certificate is not one of ``make_authority``.
    """
    name = common_name(authority)
    if not name.startswith(_AUTHORITY_PREFIX):
        raise ProtocolError(f"the certificate of {name!r} is no authority of a fleet")
    return check_name("fleet", name.removeprefix(_AUTHORITY_PREFIX))


def sign_leaf(
    authority: Authority,
    name: str,
    key: LeafKey,
    usage: Usage,
    *,
    hosts: Sequence[str] = (),
    now: float,
    lifetime_s: float = CERTIFICATE_S,
) -> x509.Certificate:
    """Make a certificate.

    Args:
        authority: who signs.
        name: common name; what the broker takes as user and client id.
        key: the holder's public key.
        usage: what it may be used for.
        hosts: names and addresses where the holder serves.
        now: seconds since 1970.
        lifetime_s: shortened where the authority ends first.

    Raises:
        ConfigError: a host is neither name nor address.
    """
    issuer = authority.certificate
    not_after = min(now + lifetime_s, issuer.not_valid_after_utc.timestamp())
    builder = (
        _started(_subject(name), issuer.subject, now, not_after)
        .public_key(key)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(digital_signature=True, authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(_USAGES[usage]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(_issuer_identifier(issuer), critical=False)
    )
    if hosts:
        names = x509.SubjectAlternativeName([_host(host) for host in hosts])
        builder = builder.add_extension(names, critical=False)
    return builder.sign(authority.key, SHA256())


def make_crl(
    authority: Authority,
    revoked: Iterable[tuple[int, float]],
    *,
    previous: x509.CertificateRevocationList | None,
    now: float,
) -> x509.CertificateRevocationList:
    """List revoked certificates: pairs of serial and time.

    It holds until the authority ends: it is read from a local file that every revocation writes,
    and a list that ran out would lock the whole fleet out.
    """
    issuer = authority.certificate
    updated = now - _BACKDATED_S
    if previous is not None:
        # OpenSSL takes the later of two lists that it holds; of the same second, the first.
        updated = max(updated, previous.last_update_utc.timestamp() + 1)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.subject)
        .last_update(_time(updated))
        .next_update(issuer.not_valid_after_utc)
        .add_extension(_issuer_identifier(issuer), critical=False)
        .add_extension(x509.CRLNumber(_number_of(previous) + 1), critical=False)
    )
    for serial, at in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(_time(at))
        builder = builder.add_revoked_certificate(entry.build())
    return builder.sign(authority.key, SHA256())


def key_of_request(csr_pem: str) -> LeafKey:
    """Check a signing request and return its key; everything else in it is ignored.

    Raises:
        ProtocolError: not a request, too large, another kind of key, or whoever made it does not
            hold the private key.
    """
    if len(csr_pem) > LARGEST_PEM_BYTES:
        raise ProtocolError(
            f"the signing request has {len(csr_pem)} characters, more than {LARGEST_PEM_BYTES}"
        )
    try:
        request = x509.load_pem_x509_csr(csr_pem.encode())
        signed = request.is_signature_valid
        key = request.public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature) as error:
        raise ProtocolError("this is not a certificate signing request in PEM form") from error
    if not isinstance(key, ed25519.Ed25519PublicKey) and not (
        isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)
    ):
        raise ProtocolError("the key of the signing request must be Ed25519 or P-256")
    if not signed:
        raise ProtocolError("the signing request is not signed by its own key; make it again")
    return key


def read_device_certificate(pem: str, authority: x509.Certificate) -> DeviceIdentity:
    """Read a device's certificate and check everything but time and revocation.

    Raises:
        ProtocolError: not a certificate.
        Refused: of another authority, for another use, or its key cannot sign messages.
    """
    certificate = read_certificate(pem)
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise Refused("the certificate was not issued by this fleet's authority") from error
    if _is_authority(certificate) or _usages(certificate) != _USAGES["device"]:
        raise Refused("the certificate is not one of a device")
    key = certificate.public_key()
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise Refused("the certificate's key is not Ed25519, so it cannot sign messages")
    return DeviceIdentity(
        check_device_name(common_name(certificate)),
        key.public_bytes(Encoding.Raw, PublicFormat.Raw).hex(),
        certificate.serial_number,
        certificate.not_valid_after_utc.timestamp(),
    )


def read_certificate(pem: str) -> x509.Certificate:
    """Read one certificate.

    Raises:
        ProtocolError: it is none, or it is too large.
    """
    if len(pem) > LARGEST_PEM_BYTES:
        raise ProtocolError(f"a certificate of {len(pem)} characters is too large")
    try:
        return x509.load_pem_x509_certificate(pem.encode())
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ProtocolError("this is not a certificate in PEM form") from error


def common_name(certificate: x509.Certificate) -> str:
    """The one common name.

    Raises:
        ProtocolError: there is none, or there are several.
    """
    try:
        found = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    except ValueError as error:
        raise ProtocolError("the certificate's subject is unreadable") from error
    if len(found) != 1:
        raise ProtocolError(f"the certificate has {len(found)} common names instead of one")
    return str(found[0].value)


def hosts_of(certificate: x509.Certificate) -> tuple[str, ...]:
    """Names and addresses that a certificate is valid for."""
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except (x509.ExtensionNotFound, ValueError):
        return ()
    return tuple(str(name.value) for name in extension.value)


def pem_of(value: x509.Certificate | x509.CertificateRevocationList) -> str:
    """PEM text."""
    return value.public_bytes(Encoding.PEM).decode()


def _started(
    subject: x509.Name, issuer: x509.Name, now: float, not_after: float
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_time(now - _BACKDATED_S))
        .not_valid_after(_time(not_after))
    )


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _key_usage(*, digital_signature: bool, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def _issuer_identifier(issuer: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    own = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own)


def _usages(certificate: x509.Certificate) -> list[x509.ObjectIdentifier]:
    try:
        return list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except (x509.ExtensionNotFound, ValueError):
        return []


def _number_of(crl: x509.CertificateRevocationList | None) -> int:
    if crl is None:
        return 0
    try:
        return crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
    except x509.ExtensionNotFound:
        return 0


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, ValueError):
        return False


def _host(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        if not _HOST.fullmatch(text):
            raise ConfigError(f"{text[:80]!r} is no host name or address") from None
        return x509.DNSName(text)


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(int(seconds), tz=timezone.utc)
