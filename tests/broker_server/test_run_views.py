"""How the operator's API shows devices."""

from __future__ import annotations

from broker_server.fleet import Fleet
from broker_server.pki_ledger import IssuedCertificate
from broker_server.run_views import device_list
from tests.support.messages import a_birth


def certificate(serial: int, *, kind: str = "device", revoked: bool = False) -> IssuedCertificate:
    return IssuedCertificate(serial, "pi-1", kind, 9e9, 1.0 if revoked else None)


def state(*certificates: IssuedCertificate) -> object:
    fleet = Fleet()
    fleet.born("pi-1", 1, a_birth(), 0.0)
    return device_list(fleet, 1.0, certificates)[0]["state"]


def test_a_device_without_a_valid_certificate_is_shown_as_revoked() -> None:
    # The certificate that ended its session at the broker bears its name, too.
    assert state(certificate(1, revoked=True), certificate(2, kind="takeover")) == "revoked"


def test_a_device_that_enrolled_again_is_not() -> None:
    assert state(certificate(1, revoked=True), certificate(2)) == "online"
    assert state() == "online"
