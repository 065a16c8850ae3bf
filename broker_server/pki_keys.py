"""Private keys in files that only their owner may read."""

from __future__ import annotations

from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from broker_server.pki_folder import PUBLIC, read_file, replace_file
from wire_protocol.errors import ConfigError

_SEED_BYTES = 32
_SITE = "server.pki_key"


def load_or_make_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The P-256 key of a file, made when it is missing.

    Raises:
        ConfigError: it is damaged, or the file cannot be written.
    """
    if not path.exists():
        replace_file(path, private_pem(ec.generate_private_key(ec.SECP256R1())), site=_SITE)
    return load_service_key(path, or_else="make it again")


def load_service_key(path: Path, *, or_else: str) -> ec.EllipticCurvePrivateKey:
    """The P-256 key of a file.

    Args:
        path: which.
        or_else: what to do when it is not there.

    Raises:
        ConfigError: it is missing or damaged.
    """
    key = _load(path, or_else=or_else)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path} holds no P-256 key")
    return key


def load_operator_seed(path: Path) -> bytes:
    """The operator's private key: 32 bytes.

    Raises:
        ConfigError: it is missing or damaged.
    """
    text = read_file(path, or_else="sign where the operator's key is kept")
    try:
        seed = bytes.fromhex(text.strip())
    except ValueError:
        seed = b""
    if len(seed) != _SEED_BYTES:
        raise ConfigError(f"{path} does not hold {2 * _SEED_BYTES} hexadecimal digits")
    return seed


def make_operator_key(private: Path, public: Path) -> None:
    """Make the operator's pair of keys in hexadecimal digits, unless there is a public one.

    Raises:
        ConfigError: the folder cannot be written.
    """
    if public.exists():
        return
    if not private.exists():
        seed = ed25519.Ed25519PrivateKey.generate().private_bytes_raw()
        replace_file(private, seed.hex() + "\n", site=_SITE)
    key = ed25519.Ed25519PrivateKey.from_private_bytes(load_operator_seed(private)).public_key()
    replace_file(public, key.public_bytes_raw().hex() + "\n", site=_SITE, mode=PUBLIC)


def check_pair(certificate: x509.Certificate, key_file: Path) -> None:
    """Check that a key belongs to a certificate.

    Raises:
        ConfigError: it does not, is missing or is damaged.
    """
    key = load_service_key(key_file, or_else="restore it, or issue the certificate again")
    if key.public_key() != certificate.public_key():
        raise ConfigError(f"{key_file} does not belong to its certificate; issue it again")


def private_pem(key: ec.EllipticCurvePrivateKey) -> str:
    """PKCS 8, without a password: the file's permissions protect it."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def _load(path: Path, *, or_else: str) -> object:
    text = read_file(path, or_else=or_else)
    try:
        return load_pem_private_key(text.encode(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path} holds no private key in PEM form") from error
