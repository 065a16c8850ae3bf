"""LEGEND: depth by capacity, rank by layer, mean over holders.

A preset of parts: arithmetic rank distribution, greedy LoRA configuration,
adaptive per-layer aggregation; and, if switched on, a deadline in place of the
slowest device's pace, products in place of factors, one factor at a time, a
server optimizer. Knows the choice of parts and their parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from broker_server.strategies.aggregate import HolderMean
from broker_server.strategies.capacity import DEFAULT_RHO
from broker_server.strategies.configure import (
    WaitingLimit,
    lora_configuration,
    rank_distribution,
)
from broker_server.strategies.deadline import DeadlineRule
from broker_server.strategies.deadline_configure import (
    DeadlineChoice,
    Decided,
    deadline_configuration,
)
from broker_server.strategies.factors import ALLOWED, FactorSchedule, factors_in
from broker_server.strategies.importance import LearnedRanks
from broker_server.strategies.options import choice, integer, number, optional, share, switch
from broker_server.strategies.product_mean import ProductMean
from broker_server.strategies.server_optimizer import (
    OptimizerName,
    ServerOptimizer,
    server_optimizer,
)
from broker_server.strategies.strategy import (
    Adapter,
    Aggregation,
    Configuration,
    DeviceCapacity,
    RunShape,
)
from wire_protocol.errors import ConfigError
from wire_protocol.lora import MAX_RANK

PAPER_OPTIONS = {
    "rank_min": integer(1, MAX_RANK),
    "rank_step": number(0, MAX_RANK),
    "rank_budget": optional(integer(1)),
    "depth_min": optional(integer(1)),
    "waiting_max_s": optional(number(0)),
    "waiting_max_share": optional(number(0, 1)),
    "rho": number(0, 1),
    "weighting": choice("examples", "uniform"),
}

LEGEND_OPTIONS = {
    **PAPER_OPTIONS,
    "server_learning_rate": number(0, low_included=False),
    "aggregation": choice("factors", "products"),
    "factors": choice("both", "B", "alternating"),
    "server_optimizer": choice("none", "momentum", "adam", "yogi"),
    "server_momentum": number(0, 1),
    "ranks": choice("arithmetic", "importance"),
    "ranks_every": integer(1),
    "quantise_activations": switch(),
    "pace": choice("slowest", "deadline"),
    "coverage_target": share(),
    "participation_min": share(),
    "left_out_max": integer(0),
    "overhead_s": number(0),
    "hysteresis": number(0, 1),
    "objective": choice("time", "energy", "traffic"),
}


@dataclass(frozen=True)
class Legend:
    """LEGEND with its parameters.

    Attributes:
        rank_min: r_0, rank of the layer nearest the input.
        rank_step: lambda, ranks added per layer toward the output.
        rank_budget: most units of rank over all layers; None for no limit.
        depth_min: k_min, smallest depth of a device; None for a quarter of
            the layers: the slowest device sets the pace at this depth, so it
            is what a uniform fleet trains.
        waiting_max_s: W_max in seconds; None for no limit.
        waiting_max_share: W_max as a share of the round; None for no limit.
        rho: weight of the past in capacity estimates.
        weighting: ``examples`` or ``uniform``, p_i of the aggregation.
        server_learning_rate: eta; 1 is the paper's plain mean.
        aggregation: the mean of ``factors``, the paper's, or of their ``products``.
        factors: schedule of the LoRA factors.
        server_optimizer: how the server follows the mean of the updates.
        server_momentum: b1 of the server optimizer.
        ranks: ``arithmetic``, or decided anew by the gradients that devices report,
            with the same sum.
        ranks_every: rounds between two such decisions.
        quantise_activations: a device whose memory is too small for a depth
            keeps the activations of some of its layers in eight bits.
        pace: ``slowest``, the paper's, or ``deadline``, see ``rule``.
        rule: how a deadline is judged; not used by ``slowest``.

    Raises:
        ConfigError: two waiting limits at once, one beside a deadline, an objective other
            than time without one, products with one factor at a time or with a server
            optimizer, or a learning rate that an adaptive server optimizer cannot have.

    Source: arXiv:2412.20004; the switches after ``server_learning_rate`` are ours.
    """

    rank_min: int = 4
    rank_step: float = 1.0
    rank_budget: int | None = None
    depth_min: int | None = None
    waiting_max_s: float | None = None
    waiting_max_share: float | None = None
    rho: float = DEFAULT_RHO
    weighting: str = "examples"
    server_learning_rate: float = 1.0
    aggregation: Literal["factors", "products"] = "factors"
    factors: FactorSchedule = "both"
    server_optimizer: OptimizerName = "none"
    server_momentum: float = 0.9
    ranks: Literal["arithmetic", "importance"] = "arithmetic"
    ranks_every: int = 10
    quantise_activations: bool = False
    pace: Literal["slowest", "deadline"] = "slowest"
    rule: DeadlineRule = field(default_factory=DeadlineRule)
    _optimizer: ServerOptimizer | None = field(default=None, init=False, compare=False, repr=False)
    _learned: LearnedRanks | None = field(default=None, init=False, compare=False, repr=False)
    _decided: dict[int, Decided] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        limited = self.waiting_max_s is not None, self.waiting_max_share is not None
        if all(limited):
            raise ConfigError(
                "give waiting_max_s or waiting_max_share of strategy legend, not both"
            )
        if any(limited) and self.pace == "deadline":
            raise ConfigError("strategy legend has a waiting limit or pace deadline, not both")
        if self.rule.objective != "time" and self.pace != "deadline":
            raise ConfigError(
                f"objective {self.rule.objective} of strategy legend needs pace deadline"
            )
        if self.aggregation == "products" and (self.factors, self.server_optimizer) != (
            "both",
            "none",
        ):
            raise ConfigError(
                "aggregation products of strategy legend needs factors both and server_optimizer"
                " none; leave aggregation out or give aggregation factors"
            )
        optimizer = server_optimizer(
            self.server_optimizer,
            learning_rate=self.server_learning_rate,
            momentum=self.server_momentum,
        )
        object.__setattr__(self, "_optimizer", optimizer)
        if self.ranks == "importance":
            object.__setattr__(self, "_learned", LearnedRanks(self.ranks_every, self.rho))

    def global_ranks(self, shape: RunShape) -> tuple[int, ...]:
        """Arithmetic ranks, highest at the output, or those that were learned since.

        Raises:
            ConfigError: the budget, a rank or ``depth_min`` does not fit the base model.
        """
        self._smallest_depth(shape.layer_count)
        if self._learned and self._learned.ranks:
            return self._learned.ranks
        return rank_distribution(
            shape.layer_count,
            rank_min=self.rank_min,
            rank_step=self.rank_step,
            rank_budget=self.rank_budget,
        )

    def configure(
        self, shape: RunShape, devices: Sequence[DeviceCapacity], round_number: int
    ) -> Configuration:
        """Greedy LoRA configuration at the pace of the slowest device, or by deadline.

        Raises:
            ConfigError: ``depth_min`` or a rank does not fit the base model.
        """
        if self.pace == "deadline":
            return self._by_deadline(shape, devices, round_number)
        return lora_configuration(
            shape,
            devices,
            ranks=self.global_ranks(shape),
            depth_min=self._smallest_depth(shape.layer_count),
            limit=WaitingLimit(self.waiting_max_s, self.waiting_max_share),
            factors=factors_in(self.factors, round_number),
            quantise=self.quantise_activations,
        )

    def begin(self, global_adapter: Adapter) -> Aggregation:
        """Mean over the holders of each rank row or product; by steps where steps may differ."""
        uniform, by_steps = self.weighting == "uniform", self.pace == "deadline"
        if self.aggregation == "products":
            return ProductMean(
                global_adapter,
                uniform=uniform,
                learning_rate=self.server_learning_rate,
                by_steps=by_steps,
                keep_ranks=True,
            )
        return HolderMean(
            global_adapter,
            uniform=uniform,
            learning_rate=self.server_learning_rate,
            step=self._optimizer,
            by_steps=by_steps,
            allowed=ALLOWED[self.factors],
        )

    def with_learned_ranks(self, adapter: Adapter, gradients: Sequence[Sequence[float]]) -> Adapter:
        """See ``LearnsRanks``; a server optimizer begins anew with other ranks."""
        if self._learned is None:
            return adapter
        new = self._learned.after_round(adapter, gradients)
        if self._optimizer and new is not adapter:
            self._optimizer.restore({})
        return new

    def state(self) -> dict[str, NDArray[np.float32]]:
        """Moments of the server optimizer, what was learned of ranks, the last deadlines."""
        kept = self._optimizer.state() if self._optimizer else {}
        kept |= self._learned.state() if self._learned else {}
        for round_number, decided in self._decided.items():
            tensors = decided.tensors().items()
            kept |= {f"decided/{round_number}/{name}": values for name, values in tensors}
        return kept

    def restore(self, state: Mapping[str, NDArray[np.float32]]) -> None:
        """See ``KeepsState.restore``."""
        rounds: dict[int, dict[str, NDArray[np.float32]]] = {}
        for name, values in state.items():
            if name.startswith("decided/"):
                _, number, rest = name.split("/", 2)
                rounds.setdefault(int(number), {})[rest] = values
        self._decided.clear()
        self._decided.update({n: Decided.from_tensors(held) for n, held in rounds.items()})
        if self._optimizer:
            self._optimizer.restore(state)
        if self._learned:
            self._learned.restore(state)

    def _by_deadline(
        self, shape: RunShape, devices: Sequence[DeviceCapacity], round_number: int
    ) -> Configuration:
        # A round that is configured again must not see its own first answer.
        earlier = max((number for number in self._decided if number < round_number), default=None)
        for_all = self.rule.is_for_all(round_number)
        configuration, decided = deadline_configuration(
            shape,
            devices,
            DeadlineChoice(
                ranks=self.global_ranks(shape),
                depth_min=self._smallest_depth(shape.layer_count),
                rule=self.rule,
                factors=factors_in(self.factors, round_number),
                previous=None if earlier is None else self._decided[earlier],
                for_all=for_all,
                quantise=self.quantise_activations,
            ),
        )
        kept = {} if earlier is None else {earlier: self._decided[earlier]}
        # A round for all is an exception: the next one must not take after it.
        if decided is not None and not for_all:
            kept[round_number] = decided
        self._decided.clear()
        self._decided.update(kept)
        return configuration

    def _smallest_depth(self, layer_count: int) -> int:
        if self.depth_min is None:
            return -(-layer_count // 4)
        if self.depth_min > layer_count:
            raise ConfigError(
                f"depth_min {self.depth_min} exceeds the {layer_count} layers of the base model"
            )
        return self.depth_min


def legend(**options: Any) -> Legend:
    """LEGEND with what is ours: a deadline sets the pace, unless waiting is limited instead.

    Args:
        options: flat: those of ``DeadlineRule`` beside those of ``Legend``.

    Raises:
        ConfigError: see ``Legend``.
    """
    if options.get("waiting_max_s") is None and options.get("waiting_max_share") is None:
        options.setdefault("pace", "deadline")
    names = {one.name for one in fields(DeadlineRule)}
    rule = {name: options.pop(name) for name in names & options.keys()}
    return Legend(**options, rule=DeadlineRule(**rule))


def legend_paper(**options: Any) -> Legend:
    """LEGEND as published: every switch of ours is off, whatever ``Legend``'s defaults become.

    Raises:
        ConfigError: see ``Legend``.
    """
    return Legend(
        **options,
        server_learning_rate=1.0,
        aggregation="factors",
        factors="both",
        server_optimizer="none",
        ranks="arithmetic",
        pace="slowest",
    )
