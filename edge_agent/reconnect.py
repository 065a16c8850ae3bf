"""When a device that lost its broker tries again, and what it makes of the loss.

Pure: told how each attempt ended, it says how long to rest. Knows neither sockets nor paho.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from edge_agent.backoff import full_jitter

_WRONG_CREDENTIALS = frozenset({134, 135})  # MQTT: bad user name or password, not authorised
# The embedded broker closes the socket without an answer when the password is wrong, but so does
# any broker that is just stopping: only a repetition means something.
_SILENT_CLOSES_THAT_MEAN_REFUSED = 3
_BRIEF_CONNECTIONS_THAT_MEAN_POISON = 3
_BRIEF_CONNECTIONS_THAT_COUNT = 4  # up to 8 s of rest with a first retry within 1 s


@dataclass(frozen=True)
class LinkTiming:
    """How patient a link is.

    Attributes:
        keepalive_s: the broker declares the device dead after one and a half times this.
        first_retry_s: upper bound of the first delay; doubles with every failure.
        longest_retry_s: the upper bound never exceeds this.
        refused_retry_s: upper bound while the broker says that it refuses the password.
        settled_after_s: only a connection that lives so long is no failure; two agents with
            one device id, which throw each other out, must not do so at full speed.
        stop_s: how long a clean stop may take.
    """

    keepalive_s: int = 30
    first_retry_s: float = 1.0
    longest_retry_s: float = 120.0
    refused_retry_s: float = 300.0
    settled_after_s: float = 5.0
    stop_s: float = 3.0


@dataclass(frozen=True)
class Attempt:
    """How one attempt to connect ended.

    Attributes:
        reason: one line for a person.
        socket_opened: something answered at the broker's address.
        refusal: the reason code with which the broker said no, if it did.
        lived_s: how long the accepted connection lasted; None if it was never accepted.
    """

    reason: str
    socket_opened: bool
    refusal: int | None = None
    lived_s: float | None = None


@dataclass(frozen=True)
class Rest:
    """What to do now.

    Attributes:
        delay_s: seconds until the next attempt.
        refused_times: how often in a row user or password were refused; 0 if they were not.
        drop_unsent: the last connections died young; what is queued may be what kills them.
    """

    delay_s: float
    refused_times: int = 0
    drop_unsent: bool = False


class ReconnectPolicy:
    """Counts how attempts end.

    Args:
        timing: how patient to be.
        rng: the source of the jitter.
    """

    def __init__(self, timing: LinkTiming, rng: random.Random) -> None:
        self._timing = timing
        self._rng = rng
        self._failures = 0
        self._silent_closes = 0
        self._refusals = 0
        self._brief = 0

    def after(self, attempt: Attempt) -> Rest:
        """Say how long to rest after an attempt ended."""
        self._count(attempt)
        refused = self._is_refused(attempt)
        self._refusals = self._refusals + 1 if refused else 0
        if refused and attempt.refusal is not None:
            # Never soon: every wrong password costs the broker a hash and the operator a log line.
            delay_s = self._rng.uniform(0.5, 1.0) * self._timing.refused_retry_s
            return Rest(delay_s, refused_times=self._refusals)
        # A close without an answer is only a guess: whatever forwards the broker's port does the
        # same for as long as the broker is away, and then a device must be back soon.
        delay_s = full_jitter(
            max(0, self._failures - 1),
            base_s=self._timing.first_retry_s,
            cap_s=self._timing.longest_retry_s,
            rng=self._rng,
        )
        return Rest(
            delay_s,
            refused_times=self._refusals,
            drop_unsent=self._brief >= _BRIEF_CONNECTIONS_THAT_MEAN_POISON,
        )

    def _count(self, attempt: Attempt) -> None:
        accepted = attempt.lived_s is not None
        settled = attempt.lived_s is not None and attempt.lived_s >= self._timing.settled_after_s
        silent = attempt.socket_opened and not accepted and attempt.refusal is None
        self._silent_closes = self._silent_closes + 1 if silent else 0
        if settled:
            self._brief = 0
        elif accepted:
            self._brief += 1
        # Who was let in is not kept out for long, however often that ended soon and whatever
        # came before it: the broker is there.
        self._failures = (
            min(self._brief, _BRIEF_CONNECTIONS_THAT_COUNT) if accepted else self._failures + 1
        )

    def _is_refused(self, attempt: Attempt) -> bool:
        if attempt.refusal is not None:
            return attempt.refusal in _WRONG_CREDENTIALS
        return self._silent_closes >= _SILENT_CLOSES_THAT_MEAN_REFUSED
