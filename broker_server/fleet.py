"""Every device that the server knows: who is online, and what each one can do.

A plain data structure: messages and time come in, changes come out. Liveness is
a lease that every heartbeat renews; a closed connection or a Last Will ends it
at once. A death that is older than the last birth is ignored.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from broker_server.strategies import (
    CapacityEstimate,
    DeviceCapacity,
    RoundTimes,
    device_capacity,
    observe,
)
from wire_protocol.messages import Birth, Heartbeat, UpdateManifest
from wire_protocol.parts import CapabilityProfile
from wire_protocol.versions import protocol_problem

MISSED_HEARTBEATS = 3
"""A lease lasts this many heartbeat intervals."""
MOST_UNMEASURABLE = 100
"""Base models that a device may say it could not measure; nobody has more."""
USED_TWICE_S = 600.0
"""Two agents of one name are seen anew well within this: they retry every two minutes at most."""
USED_TWICE = "two agents use this device id; stop one, or give it another device_id"
REMEMBERED_BOOTS = 4


@dataclass(frozen=True)
class Joined:
    """A device is online, or said something new about itself."""

    device_id: str


@dataclass(frozen=True)
class Left:
    """A device is gone."""

    device_id: str
    reason: str


@dataclass(frozen=True)
class NeedsRebirth:
    """Somebody speaks whom we do not know, or not under this session number."""

    device_id: str


@dataclass(frozen=True)
class UsedTwice:
    """Two agents take turns under one name."""

    device_id: str


Change = Joined | Left | NeedsRebirth | UsedTwice


@dataclass
class DeviceRecord:
    """What the server knows about one device; times on its monotonic clock."""

    birth: Birth
    sid: int
    capability: CapabilityProfile
    last_seen: float
    online: bool = True
    busy_with: str | None = None
    note: str = ""
    not_training: str = ""
    estimate: CapacityEstimate | None = None
    unmeasurable: dict[str, str] = field(default_factory=dict)
    """Digest of a base model -> why it could not be measured with it."""
    boots: dict[str, int] = field(default_factory=dict)
    """The last boots that were born under this name -> the last session number of each."""
    used_twice_until: float | None = None

    @property
    def lease_s(self) -> float:
        """How long silence is believed."""
        return MISSED_HEARTBEATS * self.birth.heartbeat_s


class Fleet:
    """The registry of devices."""

    def __init__(self) -> None:
        self.devices: dict[str, DeviceRecord] = {}

    def restore(self, device_id: str, sid: int, birth: Birth, now: float) -> None:
        """Remember a device from before a restart: offline until it speaks."""
        self.devices[device_id] = DeviceRecord(
            birth, sid, birth.capability, last_seen=now, online=False
        )

    def born(self, device_id: str, sid: int, birth: Birth, now: float) -> list[Change]:
        """A device introduces itself."""
        known = self.devices.get(device_id)
        if known and sid < known.sid and birth.boot_id == known.birth.boot_id:
            return []  # overtaken on its way; another boot may have lost its counter
        record = DeviceRecord(birth, sid, birth.capability, last_seen=now)
        record.not_training = birth.not_training
        same_power = known and known.capability.fingerprint == birth.capability.fingerprint
        rebooted = known is not None and known.birth.boot_id != birth.boot_id
        twice = known is not None and _returned(known, sid, birth)
        if known:
            record.note = known.note
            record.used_twice_until = known.used_twice_until
            record.boots = dict(list(known.boots.items())[-REMEMBERED_BOOTS:])
        record.boots.pop(birth.boot_id, None)
        record.boots[birth.boot_id] = sid
        changes: list[Change] = []
        if twice:
            if record.used_twice_until is None:
                changes.append(UsedTwice(device_id))
            record.used_twice_until, record.note = now + USED_TWICE_S, USED_TWICE
        if known and same_power:
            record.estimate = known.estimate
        record.note = protocol_problem(birth.protocol) or record.note
        self.devices[device_id] = record
        if known and known.online and rebooted:
            # Nobody told us of its end; what it worked on is gone.
            changes.append(Left(device_id, "it started again"))
        return [*changes, Joined(device_id)]

    def heartbeat(self, device_id: str, sid: int, heartbeat: Heartbeat, now: float) -> list[Change]:
        """A device is still there."""
        known = self.devices.get(device_id)
        if known is None or sid != known.sid:
            return [NeedsRebirth(device_id)]
        known.last_seen = now
        known.busy_with = heartbeat.busy_with
        as_before = known.not_training == heartbeat.not_training
        known.not_training = heartbeat.not_training
        if known.online and as_before:
            return []
        known.online = True
        return [Joined(device_id)]

    def said_offline(self, device_id: str, sid: int) -> list[Change]:
        """A goodbye or a Last Will; one from before the last birth means nothing."""
        known = self.devices.get(device_id)
        if known is None or sid < known.sid or not known.online:
            return []
        known.online = False
        return [Left(device_id, "its connection closed")]

    def measured(self, device_id: str, capability: CapabilityProfile) -> list[Change]:
        """A benchmark ran; what was estimated before it no longer holds."""
        known = self.devices.get(device_id)
        if known is None:
            return [NeedsRebirth(device_id)]
        known.capability = capability
        known.estimate = None
        known.unmeasurable.clear()
        return [Joined(device_id)]

    def could_not_measure(self, device_id: str, model_digest: str, detail: str) -> list[Change]:
        """A benchmark failed; until the next birth the device stays out with that reason."""
        known = self.devices.get(device_id)
        if known is None:
            return [NeedsRebirth(device_id)]
        if len(known.unmeasurable) >= MOST_UNMEASURABLE:
            known.unmeasurable.clear()
        known.unmeasurable[model_digest] = detail
        return [Joined(device_id)]

    def expire(self, now: float) -> list[Change]:
        """End every lease that ran out."""
        changes: list[Change] = []
        for device_id, known in self.devices.items():
            if known.used_twice_until is not None and now >= known.used_twice_until:
                known.used_twice_until, known.note = None, ""
                changes += [Joined(device_id)] if known.online else []
            if known.online and now >= known.last_seen + known.lease_s:
                known.online = False
                silence_s = now - known.last_seen
                changes.append(Left(device_id, f"silent for {silence_s:.0f} s"))
        return changes

    def next_deadline(self) -> float | None:
        """When ``expire`` will next find something."""
        devices = self.devices.values()
        times = [known.last_seen + known.lease_s for known in devices if known.online]
        times += [known.used_twice_until for known in devices if known.used_twice_until is not None]
        return min(times, default=None)

    def learn(self, device_id: str, manifest: UpdateManifest, *, rho: float) -> None:
        """Move the capacity estimate toward what a round really cost.

        Source: arXiv:2412.20004, capacity estimation.
        """
        known = self.devices.get(device_id)
        if known is None:
            return
        report = manifest.report
        times = RoundTimes(
            tokens=report.tokens,
            layer_count=len(manifest.ranks),
            depth=sum(rank > 0 for rank in manifest.ranks),
            forward_s=report.forward_s,
            forward_token_layers=report.forward_token_layers,
            backward_s=report.backward_s,
            downloaded_bytes=report.download_bytes,
            download_s=report.download_s,
            uploaded_bytes=report.upload_bytes,
            upload_s=report.upload_s,
            energy_j=report.energy_j,
        )
        estimate = known.estimate or _estimate_from(known.capability)
        known.estimate = observe(estimate, times.measurement(), rho=rho).estimate

    def capacity(
        self, device_id: str, *, model_digest: str, dataset: str, labels: Collection[str]
    ) -> tuple[DeviceCapacity | None, str]:
        """What a device can do in a run.

        Returns:
            The capacity, or None; and why it cannot take part, empty when it
            only has to measure itself first.
        """
        known = self.devices[device_id]
        if problem := protocol_problem(known.birth.protocol):
            return None, problem
        if known.used_twice_until is not None:
            return None, USED_TWICE
        if known.not_training:
            return None, f"does not train now: {known.not_training}"
        report = known.birth.datasets.get(dataset)
        if report is None:
            has = ", ".join(sorted(known.birth.datasets)) or "none"
            return None, f"has no dataset {dataset!r} (it has: {has})"
        if report.examples == 0:
            problem = report.problem or "it is empty"
            return None, f"its dataset {dataset!r} cannot be used: {problem}"
        if labels and (unknown := sorted(set(report.labels) - set(labels))):
            names = ", ".join(unknown[:5])
            return None, f"its dataset {dataset!r} has labels that the run does not know: {names}"
        if reason := known.unmeasurable.get(model_digest):
            return None, f"could not measure itself: {reason}"
        compute = known.capability.compute
        if compute is None or compute.model_digest != model_digest or not known.capability.link:
            return None, ""
        capacity = device_capacity(
            known.estimate or _estimate_from(known.capability),
            device_id=device_id,
            memory_budget_bytes=known.capability.memory_budget_bytes,
            examples=report.examples,
        )
        return capacity, ""


def _returned(known: DeviceRecord, sid: int, birth: Birth) -> bool:
    """Whether a boot speaks anew after another one had taken its place; resends do not count."""
    before = known.boots.get(birth.boot_id)
    return birth.boot_id != known.birth.boot_id and before is not None and sid > before


def _estimate_from(capability: CapabilityProfile) -> CapacityEstimate:
    compute, link = capability.compute, capability.link
    return CapacityEstimate(
        forward_s_per_token_layer=compute.forward_seconds_per_token_layer if compute else None,
        backward_s_per_token_layer=compute.backward_seconds_per_token_layer if compute else None,
        up_bytes_per_s=link.up_bytes_per_s if link else None,
        down_bytes_per_s=link.down_bytes_per_s if link else None,
        round_trip_s=link.round_trip_s if link else None,
        memory_base_bytes=compute.memory_base_bytes if compute else None,
        memory_bytes_per_token=compute.memory_bytes_per_token if compute else None,
        memory_bytes_per_token_layer=compute.memory_bytes_per_token_layer if compute else None,
    )
