"""One-time tokens that let a device ask for its first certificate.

A token is ``<secret>.<start of the authority's digest>``: the device checks with the second half
that it talks to the right server, and shows only the first. Kept as digests.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from pathlib import Path

from broker_server.pki_folder import Journal, locked
from broker_server.pki_x509 import check_device_name
from wire_protocol.errors import Refused


@dataclass(frozen=True)
class TokenGrant:
    """What a shown token allows.

    Attributes:
        device_id: who showed it.
        pre_authorised: it was made for this device, so nobody needs to accept it again.
        first_use: false when the same device shows it again, with the same claim.
    """

    device_id: str
    pre_authorised: bool
    first_use: bool


class EnrolmentTokens:
    """The tokens of one certificate folder.

    Args:
        folder: where ``tokens.jsonl`` lies.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._journal = Journal(folder / "tokens.jsonl", site="server.pki_tokens")

    def create(self, now: float, *, device_id: str | None, ttl_s: float) -> str:
        """Make a secret.

        Args:
            now: seconds since 1970.
            device_id: the only device that may use it; None: any, which must then be accepted.
            ttl_s: seconds until it must have been used.

        Raises:
            ProtocolError: no device may have this name.
        """
        if device_id is not None:
            check_device_name(device_id)
        secret = secrets.token_urlsafe(24)
        entry = {
            "digest": _digest(secret),
            "device_id": device_id,
            "created_at": now,
            "expires_at": now + ttl_s,
        }
        with locked(self._folder):
            self._journal.append(entry)
        return secret

    def redeem(self, secret: str, device_id: str, now: float, *, claim: str) -> TokenGrant:
        """Use a token up.

        Its user may show it again, even after its end, to hear how the request went.

        Args:
            secret: the first half of the token.
            device_id: who shows it.
            now: seconds since 1970.
            claim: what the token is used for, such as the digest of the device's key; a used
                token is good for nothing else.

        Raises:
            Refused: unknown, expired, used by another device or for another claim.
            ProtocolError: no device may have this name.
        """
        check_device_name(device_id)
        digest = _digest(secret)
        with locked(self._folder):
            made, used = None, None
            for entry in self._journal.read():
                if entry.get("digest") == digest:
                    made, used = (made, entry) if "used_at" in entry else (entry, used)
            if made is None:
                raise Refused("the enrolment token is unknown; make one: broker-server pki token")
            bound = made.get("device_id")
            if bound is not None and bound != device_id:
                raise Refused(f"the enrolment token is not for device {device_id}")
            if used is None:
                if now >= float(made["expires_at"]):
                    raise Refused("the enrolment token has expired; make another")
                self._journal.append(
                    {"digest": digest, "used_by": device_id, "used_at": now, "claim": claim}
                )
            elif (used["used_by"], used["claim"]) != (device_id, claim):
                raise Refused("the enrolment token has been used; make another")
        return TokenGrant(device_id, pre_authorised=bound is not None, first_use=used is None)


def _digest(secret: str) -> str:
    # The secrets are 24 random bytes: a slow hash would protect nothing more.
    return hashlib.sha256(secret.encode(errors="surrogatepass")).hexdigest()
