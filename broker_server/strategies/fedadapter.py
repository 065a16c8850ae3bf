"""FedAdapter: one depth and rank for all, grown by trials.

From a small (depth, rank) three candidates are tried: as it is (shallow), one
layer deeper (deep), one step of rank more (wide). The best one is the start of
the next trial.

By us: the paper gives each candidate a third of the devices and its own copy of
the model. A run here has one global adapter, so the candidates take turns with
the whole cohort, each for the same number of rounds, and the winner is the one
with the most accuracy gained per second. Nothing that a loser learned is thrown
away, which is kinder to FedAdapter than its paper. The order of turns rotates
from trial to trial, because gains shrink with time. Left out: the cache of
activations, which is the device's work. The head alone (depth 0) is not a LoRA
config here, so growth begins at depth 1; as in the paper, 2 is next.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from broker_server.strategies.aggregate import HolderMean
from broker_server.strategies.capacity import DEFAULT_RHO
from broker_server.strategies.configure import same_configuration
from broker_server.strategies.learning import RoundOutcome
from broker_server.strategies.options import integer
from broker_server.strategies.strategy import Adapter, Configuration, DeviceCapacity, RunShape
from wire_protocol.errors import ConfigError
from wire_protocol.lora import MAX_RANK, LoraConfig

FEDADAPTER_OPTIONS = {
    "depth_start": integer(1),
    "rank_start": integer(1, MAX_RANK),
    "rank_step": integer(1, MAX_RANK),
    "rank_max": integer(1, MAX_RANK),
    "trial_rounds": integer(1),
}


@dataclass(frozen=True)
class Size:
    """A candidate: trained layers from the output, and their rank."""

    depth: int
    rank: int


@dataclass(frozen=True)
class Trial:
    """Where a run stands.

    Attributes:
        candidates: shallow, deep, wide: the paper's order, which decides ties.
        number: trials before this one.
        gains: accuracy gained per second, by turn, of the turns that are over.
        rounds: of the current turn that are over.
        before: accuracy when the current turn began; None before the first round.
        seconds: that the current turn took so far.
    """

    candidates: tuple[Size, ...]
    number: int = 0
    gains: tuple[float, ...] = ()
    rounds: int = 0
    before: float | None = None
    seconds: float = 0.0

    @property
    def turns(self) -> tuple[Size, ...]:
        """The candidates in the order in which they are tried."""
        first = self.number % len(self.candidates)
        return self.candidates[first:] + self.candidates[:first]

    @property
    def current(self) -> Size:
        """What the next round trains."""
        return self.turns[len(self.gains)]


@dataclass(frozen=True)
class FedAdapter:
    """FedAdapter with its parameters, LoRA rank in place of adapter width.

    Attributes:
        depth_start: trained layers of the first trial.
        rank_start: rank of the first trial.
        rank_step: what wide adds.
        rank_max: largest rank, that of the global adapter.
        trial_rounds: rounds of every candidate.
        rho: weight of the past in the capacity estimates behind ``predicted_s``.

    Raises:
        ConfigError: ``rank_start`` exceeds ``rank_max``.

    Source: arXiv:2205.10162; a baseline of arXiv:2412.20004.
    """

    depth_start: int = 1
    rank_start: int = 4
    rank_step: int = 4
    rank_max: int = 16
    trial_rounds: int = 2
    rho: float = DEFAULT_RHO
    _outcomes: list[RoundOutcome] = field(
        default_factory=list, init=False, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        if self.rank_start > self.rank_max:
            raise ConfigError(
                f"rank_start {self.rank_start} exceeds rank_max {self.rank_max}; raise rank_max"
            )

    def global_ranks(self, shape: RunShape) -> tuple[int, ...]:
        """The largest rank at every layer.

        Raises:
            ConfigError: ``depth_start`` exceeds the layers of the base model.
        """
        if self.depth_start > shape.layer_count:
            raise ConfigError(
                f"depth_start {self.depth_start} exceeds the {shape.layer_count} layers of the"
                " base model"
            )
        return (self.rank_max,) * shape.layer_count

    @property
    def narrow_ranks(self) -> tuple[int, ...]:
        """All below the largest."""
        return tuple(range(self.rank_start, self.rank_max, self.rank_step))

    def configure(
        self,
        shape: RunShape,
        devices: Sequence[DeviceCapacity],
        round_number: int,
    ) -> Configuration:
        """The candidate whose turn it is, for every device that can hold it.

        Raises:
            ConfigError: ``depth_start`` exceeds the layers of the base model.
        """
        before = (outcome for outcome in self._outcomes if outcome.round_number < round_number)
        size = self.trial(shape.layer_count, before).current
        return same_configuration(
            shape,
            devices,
            lora=LoraConfig.top(size.depth, (size.rank,) * shape.layer_count),
            global_ranks=self.global_ranks(shape),
        )

    def begin(self, global_adapter: Adapter) -> HolderMean:
        """FedAvg of the rows that were trained."""
        return HolderMean(global_adapter)

    def observe_round(self, outcome: RoundOutcome) -> None:
        """See ``LearnsFromRounds.observe_round``."""
        if not self._outcomes or outcome.round_number > self._outcomes[-1].round_number:
            self._outcomes.append(outcome)

    def trial(self, layer_count: int, outcomes: Iterable[RoundOutcome]) -> Trial:
        """Where a run stands after these rounds, in order."""
        start = Size(self.depth_start, self.rank_start)
        trial = Trial(self._candidates(start, layer_count))
        for outcome in outcomes:
            trial = self._after(trial, outcome, layer_count)
        return trial

    def _candidates(self, start: Size, layer_count: int) -> tuple[Size, ...]:
        """Shallow, deep and wide, as far as there is room."""
        deep = Size(start.depth + 1, start.rank)
        wide = Size(start.depth, min(start.rank + self.rank_step, self.rank_max))
        grown = (size for size in (deep, wide) if size != start and size.depth <= layer_count)
        return (start, *grown)

    def _after(self, trial: Trial, outcome: RoundOutcome, layer_count: int) -> Trial:
        if outcome.round_number == 0:
            return replace(trial, before=outcome.accuracy)
        # Without a measurement before the first round its gain cannot be known: none.
        before = outcome.accuracy if trial.before is None else trial.before
        seconds, rounds = trial.seconds + outcome.duration_s, trial.rounds + 1
        if rounds < self.trial_rounds:
            return replace(trial, before=before, seconds=seconds, rounds=rounds)
        gains = (*trial.gains, (outcome.accuracy - before) / max(seconds, 1e-9))
        if len(gains) < len(trial.candidates):
            return replace(trial, gains=gains, rounds=0, before=outcome.accuracy, seconds=0.0)
        gain_of = dict(zip(trial.turns, gains, strict=True))
        # max() takes the first of equals: shallow before deep before wide.
        winner = max(trial.candidates, key=lambda size: gain_of[size])
        candidates = self._candidates(winner, layer_count)
        return Trial(candidates, number=trial.number + 1, before=outcome.accuracy)
