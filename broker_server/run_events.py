"""What goes into and comes out of a run's state machine.

Frozen values only. An event is something that happened, a failure like any
other; an action is something the shell must do, in the order given.
"""

from __future__ import annotations

from dataclasses import dataclass

from broker_server.prefix_book import AdapterCut
from broker_server.run_state import MemberCheckpoint, RoundResult, RunCheckpoint, RunStatus
from broker_server.strategies import DeviceCapacity
from broker_server.strategies.defence import Finding
from wire_protocol.messages import RoundStart, UpdateManifest
from wire_protocol.parts import BlobRef

# Events


@dataclass(frozen=True)
class RunStarted:
    """Begin, or go on after a restart."""


@dataclass(frozen=True)
class DeviceReported:
    """A device is online; ``capacity`` is None until it has measured itself."""

    device_id: str
    capacity: DeviceCapacity | None
    note: str = ""


@dataclass(frozen=True)
class DeviceLost:
    """A device is gone: its lease ran out or its connection closed."""

    device_id: str


@dataclass(frozen=True)
class AssignmentAccepted:
    """The device has the assignment and works on it."""

    device_id: str
    assignment_id: str


@dataclass(frozen=True)
class AssignmentFailed:
    """The device says that it cannot finish; ``message_id`` waits for an ack."""

    device_id: str
    assignment_id: str
    code: str
    detail: str
    message_id: str | None = None


@dataclass(frozen=True)
class UpdateArrived:
    """A manifest whose blob is in the store; nothing about it is checked yet."""

    device_id: str
    message_id: str
    manifest: UpdateManifest


@dataclass(frozen=True)
class UpdateChecked:
    """Names, shapes and values were compared with the assignment."""

    device_id: str
    message_id: str
    manifest: UpdateManifest
    problem: str | None


@dataclass(frozen=True)
class RoundAggregated:
    """The new global adapter is in the blob store.

    Attributes:
        findings: what was done about whose update.
        epsilon: spent by the run so far, this round included; None without privacy.
        cuts: the adapter parted at every depth; empty while the prefix is synced.
    """

    adapter: BlobRef
    findings: tuple[Finding, ...] = ()
    epsilon: float | None = None
    cuts: tuple[AdapterCut, ...] = ()


@dataclass(frozen=True)
class AdapterEvaluated:
    """Central evaluation of the adapter that was asked for."""

    accuracy: float
    loss: float


@dataclass(frozen=True)
class StepBroke:
    """Aggregation or evaluation failed on this server: the run cannot go on."""

    detail: str


@dataclass(frozen=True)
class CancelRequested:
    """The operator wants the run to stop."""

    reason: str


@dataclass(frozen=True)
class Tick:
    """Nothing happened, but time passed."""


Event = (
    RunStarted
    | DeviceReported
    | DeviceLost
    | AssignmentAccepted
    | AssignmentFailed
    | UpdateArrived
    | UpdateChecked
    | RoundAggregated
    | AdapterEvaluated
    | StepBroke
    | CancelRequested
    | Tick
)


# Actions


@dataclass(frozen=True)
class MeasureDevice:
    """Ask a device to benchmark itself with the base model of this run."""

    device_id: str


@dataclass(frozen=True)
class SendAssignment:
    """Send ``round.start``; sending it twice is harmless."""

    device_id: str
    start: RoundStart


@dataclass(frozen=True)
class CancelAssignment:
    """Tell a device that nothing of this assignment will be used."""

    device_id: str
    assignment_id: str
    reason: str


@dataclass(frozen=True)
class CheckUpdate:
    """Compare an update's bytes with its assignment; answer ``UpdateChecked``."""

    device_id: str
    message_id: str
    manifest: UpdateManifest
    assigned: MemberCheckpoint


@dataclass(frozen=True)
class RecordUpdate:
    """Commit an accepted update to the store, once per device and round."""

    device_id: str
    manifest: UpdateManifest


@dataclass(frozen=True)
class Acknowledge:
    """Answer a device's message; always after the commit it confirms."""

    device_id: str
    message_id: str
    status: str
    code: str = ""
    detail: str = ""


@dataclass(frozen=True)
class AcceptedUpdate:
    """One update that takes part in the aggregation."""

    device_id: str
    manifest: UpdateManifest


@dataclass(frozen=True)
class AggregateRound:
    """Build the new global adapter; answer ``RoundAggregated``."""

    round_number: int
    base: BlobRef
    updates: tuple[AcceptedUpdate, ...]


@dataclass(frozen=True)
class EvaluateAdapter:
    """Evaluate on the held-out file; answer ``AdapterEvaluated``."""

    round_number: int
    adapter: BlobRef


@dataclass(frozen=True)
class SaveCheckpoint:
    """Commit the run's state, with the result of a round when one just ended."""

    checkpoint: RunCheckpoint
    result: RoundResult | None = None
    baseline: AdapterEvaluated | None = None


@dataclass(frozen=True)
class FinishRun:
    """The run has ended; the last action of its life."""

    status: RunStatus
    reason: str


Action = (
    MeasureDevice
    | SendAssignment
    | CancelAssignment
    | CheckUpdate
    | RecordUpdate
    | Acknowledge
    | AggregateRound
    | EvaluateAdapter
    | SaveCheckpoint
    | FinishRun
)
