"""What a run consists of: its plan, its checkpoint, its devices and its results.

Values and small records; the rules are in ``coordinator``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from pydantic import BaseModel, ConfigDict

from broker_server.prefix_book import PrefixCheckpoint
from broker_server.strategies import DeviceCapacity, RunShape
from broker_server.strategies.prefix import SYNCED, PrefixRule
from broker_server.strategies.strategy import Factors
from wire_protocol.messages import Prefix, TrainingRecipe, UpdateManifest
from wire_protocol.parts import BlobRef


class RunStatus(str, Enum):
    """Where a run stands, as the operator sees it."""

    QUEUED = "queued"
    RUNNING = "running"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(frozen=True)
class RunPlan:
    """What never changes during a run.

    Attributes:
        quorum: share of the cohort whose updates end a round early.
        deadline_s: longest round; None derives it from the predicted times.
        prepare_s: how long to wait for a device that can take part.
        lost_grace_s: how long a lost device may take to come back in a round.
        resend_s: an unanswered assignment is sent again after this.
        attempts: rounds without any update in a row before the run fails.
        prefix: what devices apply below the layers that they train.
        life: tells assignments of a restored server from those of the one that was lost.
        narrow_ranks: below the global ones that a device may be asked for.
    """

    run_id: str
    rounds: int
    shape: RunShape
    recipe: TrainingRecipe
    model_digest: str
    seed: int = 0
    devices_per_round: int | None = None
    quorum: float = 1.0
    deadline_s: float | None = None
    target_accuracy: float | None = None
    prepare_s: float = 180.0
    lost_grace_s: float = 45.0
    resend_s: float = 10.0
    attempts: int = 3
    prefix: PrefixRule = SYNCED
    life: str = ""
    narrow_ranks: tuple[int, ...] = ()

    def assignment_id(self, round_number: int, attempt: int, device_id: str) -> str:
        """The name of one device's part in a round; never used twice."""
        return f"{self.run_id}.{round_number}-{attempt}{self.life}.{device_id}"


class MemberCheckpoint(BaseModel):
    """One device's part in a round, as it survives a restart.

    Attributes:
        base: the adapter that it loads; None for the whole global adapter.
        prefix: see ``RoundStart``.
    """

    model_config = ConfigDict(frozen=True)

    assignment_id: str
    ranks: tuple[int, ...]
    steps: int
    predicted_s: float
    factors: Factors = "both"
    quantised_layers: int = 0
    base: BlobRef | None = None
    prefix: Prefix | None = None


class RunCheckpoint(BaseModel):
    """Everything a killed server needs to go on with a run.

    ``members`` is empty between rounds. The updates of an open round are
    stored one by one as they are acknowledged. ``finished`` says why nothing
    is left to do. ``strategy_state`` holds tensors that a strategy keeps from
    round to round, such as a server optimizer's moments; the shell adds it.
    """

    model_config = ConfigDict(frozen=True)

    round_number: int
    attempt: int
    adapter: BlobRef
    baseline_done: bool
    tokens_per_step: float
    members: dict[str, MemberCheckpoint] = {}
    finished: str | None = None
    strategy_state: BlobRef | None = None
    prefix: PrefixCheckpoint = PrefixCheckpoint()


class MemberResult(BaseModel):
    """How one device's part in a finished round went."""

    model_config = ConfigDict(frozen=True)

    device_id: str
    depth: int
    ranks: tuple[int, ...]
    steps: int
    predicted_s: float
    completion_s: float | None
    waiting_s: float | None
    loss: float | None
    bytes_up: int
    bytes_down: int
    status: str
    detail: str
    emulated: str | None = None
    energy_j: float | None = None


class RoundResult(BaseModel):
    """One committed round.

    ``duration_s`` runs from the first assignment to the new global adapter;
    evaluation is a measurement and not part of it. ``waiting_s`` is the mean
    over the devices that sent an update. ``clipped`` and ``refused`` count the
    devices whose updates the defence scaled down or left out; the reasons stand
    with the devices. ``epsilon`` is what the run has spent up to this round;
    None without privacy. ``energy_j`` is what training drew in all; None
    unless every device tells.

    Source: arXiv:2412.20004, round time and average waiting time.
    """

    model_config = ConfigDict(frozen=True)

    round: int
    accuracy: float
    loss: float
    duration_s: float
    waiting_s: float
    bytes_up: int
    bytes_down: int
    devices: tuple[MemberResult, ...]
    clipped: int = 0
    refused: int = 0
    epsilon: float | None = None
    energy_j: float | None = None


@dataclass
class KnownDevice:
    """What the run knows about one device of the fleet."""

    capacity: DeviceCapacity | None
    online: bool = True
    note: str = ""
    lost_at: float = 0.0


class MemberStatus(str, Enum):
    """How far one device is in the open round."""

    ASSIGNED = "assigned"
    ACCEPTED = "accepted"
    CHECKING = "checking"
    UPDATED = "updated"
    FAILED = "failed"
    STRAGGLER = "straggler"


@dataclass
class Member:
    """One device's part in the open round.

    Attributes:
        given_up: lost for longer than its grace; the round does not wait for
            it, but takes its update as long as the round is open.
    """

    checkpoint: MemberCheckpoint
    assigned_at: float
    sent_at: float
    status: MemberStatus = MemberStatus.ASSIGNED
    manifest: UpdateManifest | None = None
    completion_s: float | None = None
    detail: str = ""
    given_up: bool = False

    @property
    def pending(self) -> bool:
        """True while an update may still come."""
        return self.status in (
            MemberStatus.ASSIGNED,
            MemberStatus.ACCEPTED,
            MemberStatus.CHECKING,
        )
