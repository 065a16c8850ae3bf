"""When a device asks for its next certificate. Pure: time is an argument.

It asks at two thirds of its certificate's life, with the same key, and presents the new certificate
from the next connection on; the old one stays good until it ends, so nothing has to happen at once.

Which date it is: the latest of all that is known. Boards without a battery start in the past, and a
device that believed its clock would let its certificate run out. The server says over HTTP how long
the certificate is still good (a duration, by its own clock); that and the certificate's own
beginning are moments that have certainly passed.
"""

from __future__ import annotations

import random

from edge_agent.identity import Identity
from edge_agent.x509 import certificate_request

RENEW_AT = 2 / 3
"""Share of its life after which a certificate is replaced; a month is left of ninety days."""

ASK_AGAIN_S = 3600.0


def renewal_due(not_before: float, not_after: float, now: float) -> bool:
    """Whether two thirds of a certificate's life are over. Times in seconds since 1970."""
    return now >= not_before + RENEW_AT * (not_after - not_before)


class Renewal:
    """Asks for the next certificate in time, and takes it in.

    Args:
        identity: whose.
        rng: spreads the requests of devices that were enrolled together.
    """

    def __init__(self, identity: Identity, rng: random.Random) -> None:
        self.identity = identity
        self._rng = rng
        self._server_s: float | None = None
        """The server's clock, minus our monotonic one."""
        self._ask_at = 0.0

    def heard(self, left_s: float, monotonic: float) -> None:
        """The server said for how many seconds more our certificate is good."""
        self._server_s = self.identity.certificate.not_after - left_s - monotonic

    def now(self, wall: float, monotonic: float) -> float:
        """The latest moment that has certainly passed, seconds since 1970.

        Args:
            wall: this device's clock, right or wrong.
            monotonic: seconds on a clock that only goes forward.
        """
        told = 0.0 if self._server_s is None else self._server_s + monotonic
        return max(wall, told, float(self.identity.certificate.not_before))

    def request(self, wall: float, monotonic: float) -> str | None:
        """A signing request to send now, in PEM; None when it is not the time.

        Until ``install`` it is due again about every hour. A device whose link is down may ask in
        vain: what is lost is one small message.
        """
        certificate = self.identity.certificate
        due = renewal_due(certificate.not_before, certificate.not_after, self.now(wall, monotonic))
        if not due or monotonic < self._ask_at:
            return None
        self._ask_at = monotonic + self._rng.uniform(0.5, 1.5) * ASK_AGAIN_S
        return certificate_request(self.identity.seed, certificate.common_name)

    def install(self, certificate_pem: str) -> None:
        """Take in what the server answered.

        Raises:
            ProtocolError: it is not a newer certificate of this device, this key and this fleet.
            DeviceError: the disk is full or failed.
        """
        self.identity.install(certificate_pem)
