"""The little of X.509 that a device needs: its own key, its own certificate, a request for one.

Written out because the usual library takes 8 MB of a small board's memory for it. It reads what
this fleet's authority issues and writes one kind of request; the bytes are checked against that
library in the tests. Trust is never decided here: chains and signatures are OpenSSL's business.

Knows bytes; no files, no clock.
"""

from __future__ import annotations

import base64
import re
from calendar import timegm
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime

from nacl.signing import SigningKey

_INTEGER, _BIT_STRING, _OID, _UTF8 = 0x02, 0x03, 0x06, 0x0C
_SEQUENCE, _SET, _CONTEXT_0 = 0x30, 0x31, 0xA0
_UTC_TIME, _GENERALIZED_TIME = 0x17, 0x18
_COMMON_NAME = bytes.fromhex("550403")
_ED25519 = bytes.fromhex("300506032b6570")
_PUBLIC_KEY = bytes.fromhex("302a300506032b6570032100")
_PRIVATE_KEY = bytes.fromhex("302e020100300506032b657004220420")
"""Everything before the 32 bytes of the seed; there is one way to write it."""

_TEXT_KINDS = {_UTF8: "utf-8", 0x13: "ascii", 0x16: "ascii"}
_LONGEST_PEM = 16 * 1024


@dataclass(frozen=True)
class Certificate:
    """What one certificate says.

    Attributes:
        common_name: whom it is for.
        serial: its number at the authority.
        not_before: seconds since 1970, UTC.
        not_after: the same.
        public_key: the 32 bytes of an Ed25519 key; None for another kind of key.
        der: the certificate itself.
    """

    common_name: str
    serial: int
    not_before: int
    not_after: int
    public_key: bytes | None
    der: bytes = field(repr=False)


def read_certificate(pem: str) -> Certificate:
    """Read a PEM file with one certificate.

    Raises:
        ValueError: it is none, or more than one.
    """
    return read_certificate_der(_pem_block(pem, "CERTIFICATE"))


def read_certificate_der(der: bytes) -> Certificate:
    """Read a certificate as TLS carries it.

    Raises:
        ValueError: it is none.
    """
    outer = _only(der, _SEQUENCE)
    parts = list(_elements(next(_elements(outer))[1]))
    if parts and parts[0][0] == _CONTEXT_0:  # the version; absent in version 1
        del parts[0]
    if len(parts) < 6:
        raise ValueError("the certificate is incomplete")
    serial, _algorithm, _issuer, validity, subject, key = parts[:6]
    not_before, not_after = (_time(kind, text) for kind, text in _elements(validity[1]))
    return Certificate(
        common_name=_common_name(subject[1]),
        serial=int.from_bytes(serial[1], "big"),
        not_before=not_before,
        not_after=not_after,
        public_key=_ed25519_key(_tlv(key[0], key[1])),
        der=der,
    )


def read_private_key(pem: str) -> bytes:
    """The 32 secret bytes of an Ed25519 key in PKCS #8.

    Raises:
        ValueError: another kind of key, an encrypted one, or no key.

    Source: RFC 8410, section 7.
    """
    der = _pem_block(pem, "PRIVATE KEY")
    if not der.startswith(_PRIVATE_KEY) or len(der) != len(_PRIVATE_KEY) + 32:
        raise ValueError("it is not an unencrypted Ed25519 key in PKCS #8")
    return der[len(_PRIVATE_KEY) :]


def private_key_pem(seed: bytes) -> str:
    """Write the file that ``read_private_key`` reads."""
    if len(seed) != 32:
        raise ValueError("an Ed25519 key has 32 bytes")
    return _pem("PRIVATE KEY", _PRIVATE_KEY + seed)


def public_key_of(seed: bytes) -> bytes:
    """The 32 public bytes that belong to a key."""
    return bytes(SigningKey(seed).verify_key)


def certificate_request(seed: bytes, common_name: str) -> str:
    """Ask an authority to certify this key under this name; PEM.

    The signature proves possession of the key. The same key and name always give the same bytes.

    Source: RFC 2986 (PKCS #10), RFC 8410 (Ed25519).
    """
    name = _tlv(_SEQUENCE, _tlv(_OID, _COMMON_NAME) + _tlv(_UTF8, common_name.encode()))
    asked = _tlv(
        _SEQUENCE,
        _tlv(_INTEGER, b"\0")
        + _tlv(_SEQUENCE, _tlv(_SET, name))
        + _PUBLIC_KEY
        + public_key_of(seed)
        + _tlv(_CONTEXT_0, b""),
    )
    signature = SigningKey(seed).sign(asked).signature
    signed = asked + _ED25519 + _tlv(_BIT_STRING, b"\0" + signature)
    return _pem("CERTIFICATE REQUEST", _tlv(_SEQUENCE, signed))


def _pem_block(text: str, label: str) -> bytes:
    if len(text) > _LONGEST_PEM:
        raise ValueError("the file is too long")
    blocks = re.findall(
        rf"-----BEGIN {label}-----\s+([A-Za-z0-9+/=\s]+?)\s*-----END {label}-----", text
    )
    if len(blocks) != 1:
        raise ValueError(f"it does not hold one {label.lower()} in PEM")
    return base64.b64decode("".join(blocks[0].split()), validate=True)


def _pem(label: str, der: bytes) -> str:
    text = base64.b64encode(der).decode()
    lines = [text[start : start + 64] for start in range(0, len(text), 64)]
    return "\n".join([f"-----BEGIN {label}-----", *lines, f"-----END {label}-----", ""])


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The elements in a row, as (tag, content); their lengths must fit exactly."""
    place = 0
    while place < len(data):
        tag, content, place = _element(data, place)
        yield tag, content


def _element(data: bytes, place: int) -> tuple[int, bytes, int]:
    head = data[place : place + 2]
    if len(head) < 2 or head[0] & 0x1F == 0x1F:
        raise ValueError("it is cut off, or no DER")
    place += 2
    size = head[1]
    if size >= 0x80:
        count = size & 0x7F
        octets = data[place : place + count]
        if not 1 <= count <= 3 or len(octets) != count:
            raise ValueError("it is cut off, or no DER")
        size = int.from_bytes(octets, "big")
        place += count
    if place + size > len(data):
        raise ValueError("it is cut off")
    return head[0], data[place : place + size], place + size


def _only(data: bytes, tag: int) -> bytes:
    found, content, end = _element(data, 0)
    if found != tag or end != len(data):
        raise ValueError("it is not what its heading says")
    return content


def _tlv(tag: int, content: bytes) -> bytes:
    size = len(content)
    if size < 0x80:
        return bytes((tag, size)) + content
    octets = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(octets))) + octets + content


def _time(kind: int, text: bytes) -> int:
    pattern = {_UTC_TIME: "%y%m%d%H%M%SZ", _GENERALIZED_TIME: "%Y%m%d%H%M%SZ"}.get(kind)
    if pattern is None:
        raise ValueError("its dates are written in an unknown way")
    return timegm(datetime.strptime(text.decode("ascii"), pattern).timetuple())  # noqa: DTZ007 - UTC


def _common_name(subject: bytes) -> str:
    names: list[str] = []
    for _, group in _elements(subject):
        for _, pair in _elements(group):
            (_, kind), (tag, value) = _elements(pair)
            if kind == _COMMON_NAME and tag in _TEXT_KINDS:
                names.append(value.decode(_TEXT_KINDS[tag]))
    if len(names) != 1:
        raise ValueError("it does not name one owner")
    return names[0]


def _ed25519_key(key_info: bytes) -> bytes | None:
    if key_info.startswith(_PUBLIC_KEY) and len(key_info) == len(_PUBLIC_KEY) + 32:
        return key_info[len(_PUBLIC_KEY) :]
    return None
