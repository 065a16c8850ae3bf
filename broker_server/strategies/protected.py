"""A strategy behind a defence, or with privacy: the same configuration, a guarded round.

Every strategy can have either, so that comparisons stay fair; ``legend`` has the
defence unless it is told otherwise. Knows which combinations cannot be sound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker_server.strategies.aggregate import HolderMean
from broker_server.strategies.defence import Defence, DefenceRule, Finding
from broker_server.strategies.learning import (
    RoundOutcome,
    State,
    learn_from_round,
    restore_state,
    saved_state,
    with_learned_ranks,
)
from broker_server.strategies.named import STRATEGY_NAMES, strategy_named
from broker_server.strategies.options import (
    Reader,
    choice,
    integer,
    number,
    optional,
    read_options,
)
from broker_server.strategies.private_sum import Assigned, PrivacyRule, PrivateSum
from broker_server.strategies.review import Review
from broker_server.strategies.robust_mean import RobustMean
from broker_server.strategies.strategy import (
    Adapter,
    Aggregation,
    Configuration,
    DeviceCapacity,
    RunShape,
    Strategy,
    narrow_ranks,
    tail_rule,
)
from wire_protocol.errors import ConfigError
from wire_protocol.lora import TailRule

DEFENCE_OPTIONS: Mapping[str, Reader] = {
    "defence": choice("none", "clip", "trimmed_mean", "median"),
    "clip_limit": number(1),
    "refuse_limit": optional(number(1)),
    "weight_limit": optional(number(1)),
    "few_holders": integer(1),
    "trim": number(0, 0.5, low_included=False),
}
"""What every strategy takes beside its own options."""

DEFENDED = frozenset({"legend"})
"""Strategies with a defence by default; the others are papers, as published."""

NO_MEAN = {
    "hetlora": "it weights updates by their norm",
    "flexlora": "it averages products, not factors",
}
"""Strategies whose aggregation is no mean of factors, and what it is."""


NoiseSource = Callable[[int], np.random.Generator]
"""A fresh generator of noise, by the number of rounds that are over."""


def os_noise(_rounds_done: int) -> np.random.Generator:
    """Noise that nobody can repeat: seeded by the operating system."""
    return np.random.default_rng()


@dataclass(frozen=True)
class Received:
    """One update of a round.

    Attributes:
        weight: number of examples behind it, as the device says.
        steps: local steps that were really done.
        read: its tensors; called once or twice, so that no update need be kept.
        layer_gradients: see ``LearnsRanks.with_learned_ranks``.
    """

    device_id: str
    weight: float
    steps: int
    read: Callable[[], Adapter]
    layer_gradients: tuple[float, ...] = ()


@dataclass(frozen=True)
class Aggregated:
    """The new global adapter, and what was done about whose update."""

    adapter: Mapping[str, NDArray[np.float32]]
    findings: tuple[Finding, ...] = ()


class Protected:
    """A strategy with a defence or with privacy, or with neither; see ``Strategy``.

    Args:
        strategy: configures, learns, aggregates.
        defence: what judges updates before they are aggregated.
        privacy: clips and hides them instead.
        noise: generator of a round's noise, by the rounds before it.
    """

    def __init__(
        self,
        strategy: Strategy,
        *,
        defence: Defence | None = None,
        privacy: PrivacyRule | None = None,
        noise: NoiseSource = os_noise,
    ) -> None:
        self.strategy = strategy
        self.defence = defence
        self.privacy = privacy
        self._noise = noise
        self._rounds_done = 0

    @property
    def rho(self) -> float:
        """See ``Strategy.rho``."""
        return self.strategy.rho

    @property
    def narrow_ranks(self) -> tuple[int, ...]:
        """See ``GivesNarrowRanks.narrow_ranks``."""
        return narrow_ranks(self.strategy)

    @property
    def tail(self) -> TailRule | None:
        """See ``ShrinksTails.tail``."""
        return tail_rule(self.strategy)

    def global_ranks(self, shape: RunShape) -> tuple[int, ...]:
        """See ``Strategy.global_ranks``."""
        return self.strategy.global_ranks(shape)

    def configure(
        self, shape: RunShape, devices: Sequence[DeviceCapacity], round_number: int
    ) -> Configuration:
        """See ``Strategy.configure``."""
        return self.strategy.configure(shape, devices, round_number)

    def begin(self, global_adapter: Adapter) -> Aggregation:
        """The strategy's aggregation, unprotected: protection needs the whole round.

        ``aggregate_round`` is what callers want.
        """
        return self.strategy.begin(global_adapter)

    def observe_round(self, outcome: RoundOutcome) -> None:
        """See ``LearnsFromRounds.observe_round``."""
        self._rounds_done = outcome.round_number
        learn_from_round(self.strategy, outcome)

    def state(self) -> dict[str, NDArray[np.float32]]:
        """The strategy's own state and the defence's history."""
        return {**saved_state(self.strategy), **(self.defence.state() if self.defence else {})}

    def restore(self, state: State) -> None:
        """See ``KeepsState.restore``."""
        restore_state(self.strategy, state)
        if self.defence:
            self.defence.restore(state)

    def aggregate(
        self, base: Adapter, received: Sequence[Received], assigned: Sequence[Assigned]
    ) -> Aggregated:
        """One round, protected; see ``aggregate_round``."""
        if self.privacy is not None:
            return self._privately(base, received, assigned)
        if self.defence is not None:
            return self._defended(base, received)
        return _plainly(self.strategy, base, received)

    def _defended(self, base: Adapter, received: Sequence[Received]) -> Aggregated:
        assert self.defence is not None  # noqa: S101 - ``aggregate`` has looked
        review = Review(self.defence, base)
        for one in received:
            review.look(one.device_id, one.read(), weight=one.weight, steps=one.steps)
        aggregation = self._estimator(base)
        findings: list[Finding] = []
        for one in received:
            verdict = review.judge(one.device_id)
            findings += verdict.findings
            if not verdict.refused:
                update = verdict.applied(one.read())
                aggregation.add(one.device_id, update, weight=verdict.weight, steps=one.steps)
                review.count(update)
        return Aggregated(review.settled(aggregation.result()), tuple(findings))

    def _estimator(self, base: Adapter) -> Aggregation:
        assert self.defence is not None  # noqa: S101 - ``aggregate`` has looked
        plain, rule = self.strategy.begin(base), self.defence.rule
        if rule.estimator == "mean" or not isinstance(plain, HolderMean):
            return plain
        return RobustMean(base, plain, kind=rule.estimator, trim=rule.trim)

    def _privately(
        self, base: Adapter, received: Sequence[Received], assigned: Sequence[Assigned]
    ) -> Aggregated:
        plain = self.strategy.begin(base)
        assert isinstance(plain, HolderMean)  # noqa: S101 - others were refused by name
        assert self.privacy is not None  # noqa: S101 - ``aggregate`` has looked
        private = PrivateSum(
            base, plain, self.privacy, assigned=assigned, generator=self._noise(self._rounds_done)
        )
        for one in received:
            private.add(one.device_id, one.read(), weight=1.0, steps=one.steps)
        return Aggregated(private.result(), tuple(private.findings))


def aggregate_round(
    strategy: Strategy,
    base: Adapter,
    received: Sequence[Received],
    assigned: Sequence[Assigned],
) -> Aggregated:
    """The next global adapter, through whatever protects the strategy.

    Args:
        strategy: of the run.
        base: the global adapter that the updates are deltas against.
        received: in the order of their devices, so that equal updates give equal bytes.
        assigned: every assignment of the round, answered or not.

    Raises:
        ProtocolError: an update does not fit the adapter, and nothing judges updates.
    """
    if isinstance(strategy, Protected):
        new, inner = strategy.aggregate(base, received, assigned), strategy.strategy
    else:
        new, inner = _plainly(strategy, base, received), strategy
    gradients = [one.layer_gradients for one in received]
    return replace(new, adapter=with_learned_ranks(inner, new.adapter, gradients))


def protected_strategy(
    name: str,
    options: Mapping[str, object],
    *,
    privacy: PrivacyRule | None = None,
    noise: NoiseSource = os_noise,
    secure: bool = False,
) -> Strategy:
    """The strategy of a run specification, with what protects it.

    Args:
        name: one of ``STRATEGY_NAMES``.
        options: the strategy's own and ``DEFENCE_OPTIONS``, plain values.
        privacy: clip norm and noise of the run, if it has privacy.
        noise: generator of a round's noise, by the rounds before it.
        secure: True if the server sees only the sum of the updates.

    Raises:
        ConfigError: unknown name or option, a wrong value, or a combination
            that cannot be sound, with the reason.
    """
    own = {key: value for key, value in options.items() if key not in DEFENCE_OPTIONS}
    theirs = {key: value for key, value in options.items() if key in DEFENCE_OPTIONS}
    read = read_options(name, DEFENCE_OPTIONS, theirs)
    defence = read.pop("defence", None)
    refuse_unsound(name, options, defence, privacy=privacy is not None, secure=secure)
    strategy = _named(name, own)
    if privacy is not None:
        _rule(name, "none", read)
        return Protected(strategy, privacy=privacy, noise=noise)
    rule = _rule(name, defence or _default(name, secure=secure), read)
    return strategy if rule is None else Protected(strategy, defence=Defence(rule))


def refuse_unsound(
    name: str,
    options: Mapping[str, object],
    defence: str | None,
    *,
    privacy: bool,
    secure: bool,
) -> None:
    """Refuse protections that exclude each other.

    Raises:
        ConfigError: why they do, in one line.
    """
    wanted = defence not in (None, "none")
    if options.get("aggregation") == "products" and (
        privacy or secure or defence in ("trimmed_mean", "median")
    ):
        other = "privacy" if privacy else "secure aggregation" if secure else f"defence {defence}"
        raise ConfigError(
            f"aggregation products of strategy {name} needs every update as it is, which {other}"
            " does not leave it; give aggregation factors"
        )
    if defence in ("trimmed_mean", "median") and name in NO_MEAN:
        raise ConfigError(
            f"strategy {name} has no defence {defence}: {NO_MEAN[name]}; use defence clip"
        )
    if secure and wanted:
        raise ConfigError(
            f"defence {defence} looks at single updates, which secure aggregation hides; give"
            " defence none or turn secure aggregation off"
        )
    if secure and name in NO_MEAN:
        raise ConfigError(
            f"strategy {name} needs single updates: {NO_MEAN[name]}; secure aggregation hides them"
        )
    if not privacy:
        return
    if wanted:
        raise ConfigError(
            f"defence {defence} depends on the other devices' updates, which breaks the bound on"
            " what one device can change; privacy clips every update itself: leave defence out"
        )
    if name in NO_MEAN:
        raise ConfigError(
            f"strategy {name} cannot have privacy: {NO_MEAN[name]}, which has no known bound on"
            " what one device can change; use legend, fedlora, ffa or rolora"
        )
    if options.get("weighting") == "examples":
        raise ConfigError(
            "privacy counts every device as one: a number of examples has no bound; leave"
            " weighting out or give weighting uniform"
        )
    if options.get("ranks") == "importance":
        raise ConfigError(
            "ranks importance follows gradients that are not hidden, and ranks are public; leave"
            " ranks out or give ranks arithmetic with privacy"
        )


def _default(name: str, *, secure: bool) -> str:
    return "clip" if name in DEFENDED and not secure else "none"


def _rule(name: str, defence: str, options: Mapping[str, Any]) -> DefenceRule | None:
    if defence == "none":
        if options:
            first = next(iter(options))
            raise ConfigError(
                f"option {first} of strategy {name} needs a defence; give defence clip,"
                " trimmed_mean or median"
            )
        return None
    if "trim" in options and defence != "trimmed_mean":
        raise ConfigError(f"option trim of strategy {name} belongs to defence trimmed_mean")
    estimators: Mapping[str, Any] = {"clip": "mean"}
    return DefenceRule(**options, estimator=estimators.get(defence, defence))


def _named(name: str, options: Mapping[str, object]) -> Strategy:
    try:
        return strategy_named(name, options)
    except ConfigError as error:
        if name in STRATEGY_NAMES and " has no option " in str(error):
            raise ConfigError(f"{error}, {', '.join(DEFENCE_OPTIONS)}") from error
        raise


def _plainly(strategy: Strategy, base: Adapter, received: Sequence[Received]) -> Aggregated:
    aggregation = strategy.begin(base)
    for one in received:
        aggregation.add(one.device_id, one.read(), weight=one.weight, steps=one.steps)
    return Aggregated(aggregation.result())
