"""A device's identity: read strictly, refused with a sentence."""

from __future__ import annotations

import datetime as dt
import ssl
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from hypothesis import given
from hypothesis import strategies as st

from broker_server.pki import FleetPki
from edge_agent.identity import identity_of
from edge_agent.join import login_from_url
from edge_agent.settings import AgentSettings
from edge_agent.x509 import (
    certificate_request,
    private_key_pem,
    public_key_of,
    read_certificate,
    read_private_key,
)
from tests.support.identities import DAY_S, a_pki, an_identity, loaded
from wire_protocol.errors import ConfigError

SEED = bytes(range(32))


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> FleetPki:
    # As if the fleet had been set up half a year ago: certificates of any age can be made.
    return a_pki(tmp_path_factory.mktemp("trust") / "pki", now=time.time() - 180 * DAY_S)


@pytest.fixture
def folder(pki: FleetPki, tmp_path: Path) -> Path:
    return an_identity(pki, tmp_path / "identity")


# The bytes, against the usual library


def test_the_signing_request_is_byte_for_byte_that_of_the_usual_library() -> None:
    key = Ed25519PrivateKey.from_private_bytes(SEED)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "pi-4b")])
    usual = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, None)
    assert certificate_request(SEED, "pi-4b") == usual.public_bytes(Encoding.PEM).decode()
    assert usual.is_signature_valid


def test_the_key_file_is_that_of_the_usual_library() -> None:
    usual = Ed25519PrivateKey.from_private_bytes(SEED)
    pem = usual.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    assert private_key_pem(SEED) == pem
    assert read_private_key(pem) == SEED
    assert public_key_of(SEED) == usual.public_key().public_bytes_raw()
    assert load_pem_private_key(private_key_pem(SEED).encode(), None) is not None


@pytest.mark.parametrize(
    "key",
    [
        generate_private_key(SECP256R1()).private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
        ),
        Ed25519PrivateKey.generate().private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"word")
        ),
        b"no key",
        private_key_pem(SEED).encode() * 2,
    ],
    ids=["another kind", "encrypted", "nothing", "two"],
)
def test_any_other_key_is_refused(key: bytes) -> None:
    with pytest.raises(ValueError):
        read_private_key(key.decode())


def test_a_certificate_says_what_the_usual_library_reads_in_it(folder: Path) -> None:
    pem = (folder / "device.pem").read_text()
    usual, ours = x509.load_pem_x509_certificate(pem.encode()), read_certificate(pem)
    seed = read_private_key((folder / "device.key").read_text())
    assert ours.common_name == "pi"
    assert ours.serial == usual.serial_number
    assert ours.not_before == usual.not_valid_before_utc.timestamp()
    assert ours.not_after == usual.not_valid_after_utc.timestamp()
    assert ours.public_key == public_key_of(seed)


def test_dates_after_2049_are_read_in_their_other_notation() -> None:
    key = Ed25519PrivateKey.generate()
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "ca")])
    far = dt.datetime(2061, 2, 3, 4, 5, 6, tzinfo=dt.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(far - dt.timedelta(days=40 * 365))
        .not_valid_after(far)
        .sign(key, None)
    )
    ours = read_certificate(certificate.public_bytes(Encoding.PEM).decode())
    assert (ours.not_after, ours.serial) == (far.timestamp(), 7)


@given(place=st.integers(0, 10**6), value=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_certificate_is_read_or_refused_but_never_crashes(
    pki: FleetPki, place: int, value: int, cut: bool
) -> None:
    der = bytearray(read_certificate(pki.ca_pem).der)
    if cut:
        del der[place % len(der) :]
    else:
        der[place % len(der)] = value
    try:
        read_certificate(ssl.DER_cert_to_PEM_cert(bytes(der)))
    except ValueError:
        return


# Loading


def test_an_identity_knows_its_name_its_key_and_the_operator(folder: Path, pki: FleetPki) -> None:
    identity = loaded(folder)
    assert identity.device_id == "pi"
    assert public_key_of(identity.seed) == identity.certificate.public_key
    assert identity.operator_key.hex() == pki.operator_public_key


def _another_key(folder: Path, _pki: FleetPki) -> None:
    (folder / "device.key").write_text(private_key_pem(SEED))


def _another_authority(folder: Path, _pki: FleetPki) -> None:
    other = a_pki(folder.parent / "other")
    (folder / "ca.pem").write_text(other.ca_pem)


def _readable_by_others(folder: Path, _pki: FleetPki) -> None:
    (folder / "device.key").chmod(0o644)


def _expired(folder: Path, pki: FleetPki) -> None:
    an_identity(pki, folder, now=time.time() - 91 * DAY_S)


def _of_another_device(folder: Path, pki: FleetPki) -> None:
    an_identity(pki, folder, "jetson")


def _without(name: str) -> Callable[[Path, FleetPki], None]:
    return lambda folder, _pki: (folder / name).unlink()


def _damaged(name: str) -> Callable[[Path, FleetPki], None]:
    return lambda folder, _pki: _shorten(folder / name)


def _shorten(path: Path) -> None:
    path.write_text(path.read_text()[:50])


@pytest.mark.parametrize(
    ("break_it", "file", "words"),
    [
        (_another_key, "device.key", "is not the key of"),
        (_another_authority, "ca.pem", "was not issued by the authority"),
        (_readable_by_others, "device.key", "chmod 600"),
        (_expired, "device.pem", "expired on"),
        (_of_another_device, "device.pem", "'jetson'"),
        (_without("device.key"), "device.key", "is missing"),
        (_without("device.pem"), "device.pem", "is missing"),
        (_without("ca.pem"), "ca.pem", "is missing"),
        (_without("operator.pub"), "operator.pub", "is missing"),
        (_damaged("device.key"), "device.key", "is damaged"),
        (_damaged("device.pem"), "device.pem", "is damaged"),
        (_damaged("ca.pem"), "ca.pem", "is no certificate of an authority"),
        (_damaged("operator.pub"), "operator.pub", "64 hexadecimal digits"),
    ],
)
def test_what_is_wrong_with_an_identity_is_one_line_with_the_file_and_a_remedy(
    folder: Path, pki: FleetPki, break_it: Callable[[Path, FleetPki], None], file: str, words: str
) -> None:
    break_it(folder, pki)
    with pytest.raises(ConfigError) as caught:
        loaded(folder)
    line = str(caught.value)
    assert file in line
    assert words in line
    assert "\n" not in line
    assert any(remedy in line for remedy in ("edge-agent enroll", "chmod"))


def test_a_clock_that_says_1970_costs_no_identity(folder: Path) -> None:
    identity = loaded(folder, now=0.0)
    assert identity.device_id == "pi"


def test_without_an_identity_there_is_none_and_with_one_the_server_must_be_https(
    folder: Path, tmp_path: Path
) -> None:
    assert identity_of(AgentSettings(device_id="pi", state_dir=tmp_path / "empty")) is None
    with pytest.raises(ConfigError, match="https address"):
        identity_of(AgentSettings(device_id="pi", state_dir=folder.parent))
    settings = AgentSettings(device_id="pi", state_dir=folder.parent, server="https://localhost")
    found = identity_of(settings)
    assert found is not None
    assert found.folder == folder


def test_a_folder_that_the_settings_name_must_hold_an_identity(tmp_path: Path) -> None:
    settings = AgentSettings(device_id="pi", identity=tmp_path, server="https://localhost")
    with pytest.raises(ConfigError, match=r"device\.key is missing"):
        identity_of(settings)


def test_an_enrolled_device_takes_no_broker_without_tls_and_shows_the_other_its_certificate(
    folder: Path,
) -> None:
    identity = loaded(folder)
    with pytest.raises(ConfigError, match="reached without TLS"):
        login_from_url("mqtt://user:word@broker:1883", identity)
    assert login_from_url("mqtts://broker", identity).tls is identity.context
