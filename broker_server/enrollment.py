"""Which keys are a fleet's devices: who asked, who was let in, who was thrown out.

A name has at most one key that is let in and at most one request that waits or was turned down:

                 ask            accept      reject      revoke
    (nothing)    pending*
    pending      pending        accepted    rejected    rejected
    rejected     rejected**
    accepted     accepted                               revoked
    revoked      revoked

    *  accepted at once when the token was made for this very device
    ** pending again with a new token; a revoked key is never let in again, with any token

A request for a name that has a key waits beside it: the key stays good until the other one is
accepted in its place. A second key does not push a waiting one aside, or whoever asks last would
be who gets accepted.

Pure: what happened comes in, what is to be remembered goes out. Times are seconds since 1970.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from enum import Enum

from wire_protocol.errors import Refused


class Status(str, Enum):
    """Where a key stands."""

    PENDING = "pending"
    ACCEPTED = "accepted"
    REJECTED = "rejected"
    REVOKED = "revoked"


@dataclass(frozen=True)
class Claim:
    """A device that asks to be let in, having proved that it holds the key.

    Attributes:
        device_id: the name that it wants.
        key: Ed25519 public key, 64 hexadecimal digits.
        csr_pem: its signing request.
    """

    device_id: str
    key: str
    csr_pem: str

    @property
    def fingerprint(self) -> str:
        """What a person compares with what the device shows."""
        return hashlib.sha256(bytes.fromhex(self.key)).hexdigest()[:16]


@dataclass(frozen=True)
class Member:
    """One key of a name, and where it stands.

    Attributes:
        claim: whose.
        status: where it stands.
        since: when it came to stand there.
        certificate_pem: once accepted; the newest.
    """

    claim: Claim
    status: Status
    since: float
    certificate_pem: str = ""


@dataclass(frozen=True)
class Entry:
    """Everything about one name.

    Attributes:
        inside: the key that is accepted, or was and is revoked.
        outside: a request that is pending or was rejected.
    """

    inside: Member | None = None
    outside: Member | None = None

    @property
    def pending(self) -> Member | None:
        """The request that waits for an operator."""
        found = self.outside
        return found if found and found.status is Status.PENDING else None

    @property
    def accepted(self) -> Member | None:
        """The key that is good now."""
        found = self.inside
        return found if found and found.status is Status.ACCEPTED else None

    def member(self, key: str) -> Member | None:
        """Where this key stands; a request that waits says more than a key of before."""
        for one in (self.outside, self.inside):
            if one is not None and one.claim.key == key:
                return one
        return None


@dataclass(frozen=True)
class Asked:
    """What came of asking.

    Attributes:
        entry: what is to be remembered from now on.
        status: what the device is told.
        accept_now: nobody has to be asked: accept the pending request.
    """

    entry: Entry
    status: Status
    accept_now: bool = False


def ask(entry: Entry, claim: Claim, now: float, *, trusted: bool, new_token: bool) -> Asked:
    """A device asks, for the first time or again to hear how it went.

    Args:
        entry: what is known of its name.
        claim: who asks.
        now: seconds since 1970.
        trusted: the token was made for this name.
        new_token: the token had not been used before.

    Raises:
        Refused: another key waits under this name.
    """
    known = entry.member(claim.key)
    if known is not None and (not new_token or known.status is Status.REVOKED):
        # Trusted and still pending: the server died between the request and the certificate.
        waits = known.status is Status.PENDING
        return Asked(entry, known.status, accept_now=trusted and waits)
    waiting = entry.pending
    if waiting is not None and waiting.claim.key != claim.key and not trusted:
        raise Refused(
            f"another device with key {waiting.claim.fingerprint} waits as {claim.device_id!r}; "
            f"decide about it first: legend devices accept|reject {claim.device_id}"
        )
    pending = replace(entry, outside=Member(claim, Status.PENDING, now))
    return Asked(pending, Status.PENDING, accept_now=trusted)


def accept(entry: Entry, certificate_pem: str, now: float) -> Entry:
    """Let the waiting key in; a key of before is no longer a member.

    Raises:
        Refused: nothing waits.
    """
    waiting = _waiting(entry)
    return Entry(inside=Member(waiting.claim, Status.ACCEPTED, now, certificate_pem))


def reject(entry: Entry, now: float) -> Entry:
    """Turn the waiting key away; a key that is inside stays.

    Raises:
        Refused: nothing waits.
    """
    turned_away = replace(_waiting(entry), status=Status.REJECTED, since=now)
    return replace(entry, outside=turned_away)


def revoke(entry: Entry, now: float) -> Entry:
    """Throw a name out: its key is no longer good, and what waits is turned away."""
    inside = entry.inside
    if entry.accepted is not None and inside is not None:
        inside = replace(inside, status=Status.REVOKED, since=now)
    changed = replace(entry, inside=inside)
    return reject(changed, now) if changed.pending else changed


def renewed(entry: Entry, claim: Claim, certificate_pem: str, now: float) -> Entry:
    """Remember the newest certificate of the key that is inside."""
    return replace(entry, inside=Member(claim, Status.ACCEPTED, now, certificate_pem))


def _waiting(entry: Entry) -> Member:
    if entry.pending is None:
        raise Refused("no request of this device is waiting; see: legend devices --pending")
    return entry.pending
