"""Devices that belong to the fleet before anybody has seen them: those of an inventory.

An expected device may be given a token made for its name, with which it is let in at once; without
one it asks like any other. A device that was born is no longer waited for, and its address is kept.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from broker_server.fleet import Fleet
from broker_server.store import Store
from wire_protocol.errors import Refused

if TYPE_CHECKING:
    from broker_server.pki import FleetPki

log = structlog.get_logger()

EXPECTED = "expected"
"""The state of a device that is expected and was never seen."""
_NEVER_SEEN: dict[str, object] = {
    "device_id": "",
    "board": "",
    "emulated": None,
    "agent_version": "",
    "state": EXPECTED,
    "busy_with": None,
    "last_seen_s": None,
    "capability": None,
    "datasets": {},
    "not_training": "",
    "note": "",
}


@dataclass(frozen=True)
class Comparison:
    """An inventory beside what the server knows; every name is in exactly one of the first four.

    Attributes:
        waiting: listed and never seen.
        seen: listed, and seen before.
        revoked: listed, and thrown out once; nothing is waited for.
        unlisted: known to the server and not in the inventory.
        forgotten: not listed any more and never seen: not waited for from now on.
    """

    waiting: tuple[str, ...]
    seen: tuple[str, ...]
    revoked: tuple[str, ...]
    unlisted: tuple[str, ...]
    forgotten: tuple[str, ...]


class ExpectedDevices:
    """Remembers them, and compares with the registry and the certificates.

    Args:
        store: the server's database.
        fleet: the registry.
        pki: the fleet's certificates, if it has any.
    """

    def __init__(self, store: Store, fleet: Fleet, pki: FleetPki | None) -> None:
        self._store = store
        self._fleet = fleet
        self._pki = pki

    def take(self, addresses: Mapping[str, str]) -> Comparison:
        """Expect these devices and no others.

        Args:
            addresses: device id -> address, which may be empty.
        """
        before = self._store.expected()
        self._store.save_expected(addresses)
        born, revoked = set(self._fleet.devices), self._revoked()
        listed = set(addresses)
        known = born | self._enrolled()
        found = Comparison(
            waiting=_sorted(listed - born - revoked),
            seen=_sorted((listed & born) - revoked),
            revoked=_sorted(listed & revoked),
            unlisted=_sorted(known - listed - revoked),
            forgotten=_sorted(set(before) - listed - known),
        )
        log.info("inventory_taken", listed=len(listed), waiting=len(found.waiting))
        return found

    def listed(self, devices: list[dict[str, object]]) -> list[dict[str, object]]:
        """The list of devices with addresses, and with those that were never seen."""
        addresses, revoked = self._store.expected(), self._revoked()
        there = {str(one["device_id"]): one for one in devices}
        for device_id in addresses.keys() - there.keys():
            state = "revoked" if device_id in revoked else EXPECTED
            there[device_id] = {**_NEVER_SEEN, "device_id": device_id, "state": state}
        return [
            {**one, "address": addresses.get(device_id, "")}
            for device_id, one in sorted(there.items())
        ]

    def check_enrolling(self) -> None:
        """Make sure that tokens would be good for something.

        Raises:
            Refused: this server lets nobody in.
        """
        if self._pki is None or not self._pki.can_issue:
            raise Refused(
                "this server enrols no devices: it has no certificates, or their authority's key "
                "is elsewhere; import without tokens"
            )

    def make_tokens(self, *, ttl_s: float) -> dict[str, str]:
        """A token for each expected device that has no certificate, good for that device only.

        Blocks for some milliseconds a device.

        Args:
            ttl_s: seconds until they must have been used.
        """
        if self._pki is None:
            return {}
        known, now = self._enrolled() | self._revoked(), time.time()
        tokens = {
            device_id: self._pki.create_token(now, device_id=device_id, ttl_s=ttl_s)
            for device_id in self._store.expected()
            if device_id not in known
        }
        log.info("enrolment_tokens_made", devices=sorted(tokens))
        return tokens

    def _enrolled(self) -> set[str]:
        """Who has a certificate that is good now."""
        if self._pki is None:
            return set()
        now = time.time()
        return {
            one.name
            for one in self._pki.records()
            if one.kind == "device" and one.revoked_at is None and one.not_after > now
        }

    def _revoked(self) -> set[str]:
        """Who had certificates, every one of which is revoked."""
        if self._pki is None:
            return set()
        devices = [one for one in self._pki.records() if one.kind == "device"]
        good = {one.name for one in devices if one.revoked_at is None}
        return {one.name for one in devices} - good


def _sorted(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(names))
