"""Certificates of a test fleet, and identities of devices in it."""

from __future__ import annotations

import secrets
import time
from pathlib import Path

from broker_server.pki import FleetPki
from broker_server.pki_x509 import CERTIFICATE_S
from edge_agent.identity import Identity, load_identity
from edge_agent.x509 import certificate_request, private_key_pem

FLEET = "lab"
DAY_S = 86400.0


def a_pki(folder: Path, *, now: float | None = None, fleet: str = FLEET) -> FleetPki:
    """A new authority whose server answers at localhost."""
    return FleetPki.create(folder, fleet, ["localhost"], time.time() if now is None else now)


def an_identity(
    pki: FleetPki,
    folder: Path,
    device_id: str = "pi",
    *,
    now: float | None = None,
    lifetime_s: float = CERTIFICATE_S,
) -> Path:
    """The identity folder of an enrolled device; returns it."""
    seed = secrets.token_bytes(32)
    request = certificate_request(seed, device_id)
    issued_at = time.time() if now is None else now
    issued = pki.issue_device(device_id, request, issued_at, lifetime_s=lifetime_s)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text, mode in (
        ("device.key", private_key_pem(seed), 0o600),
        ("device.pem", issued.pem, 0o644),
        ("ca.pem", pki.ca_pem, 0o644),
        ("operator.pub", f"{pki.operator_public_key}\n", 0o644),
    ):
        (folder / name).write_text(text)
        (folder / name).chmod(mode)
    return folder


def loaded(folder: Path, *, now: float | None = None) -> Identity:
    """As the agent of the device ``pi`` reads it."""
    return load_identity(folder, device_id="pi", now=time.time() if now is None else now)
