"""Errors, grouped by what the program that catches them should do.

LegendError
├── ConfigError          a file, flag or variable is wrong: stop, exit 78, do not restart
├── Unavailable          a peer cannot be reached now: wait and try again, exit 69
│   ├── BrokerUnavailable
│   └── ServerUnavailable
├── Refused              a peer said no and why: stop, exit 77
├── AlreadyRunning       another process holds this state directory: stop, exit 75
├── ProtocolError        a peer broke the contract: drop the message and count it, exit 76
└── DeviceError          this board cannot do the work: report ``code``, stay in the fleet, exit 70

The exit codes are those of sysexits(3). systemd is told not to restart on 78.
Valid on Python 3.8: the trainer raises ``DeviceError``.
"""

from __future__ import annotations

from enum import Enum


class LegendError(Exception):
    """Raised on purpose; its text is one line that says what is wrong and what to do."""

    exit_code = 1


class ConfigError(LegendError):
    """A settings file, flag, profile or run specification is wrong."""

    exit_code = 78


class Unavailable(LegendError):
    """A peer cannot be reached now; trying again later may work."""

    exit_code = 69


class BrokerUnavailable(Unavailable):
    """The MQTT broker does not answer."""


class ServerUnavailable(Unavailable):
    """The server's HTTP API does not answer."""


class Refused(LegendError):
    """A peer understood the request and said no."""

    exit_code = 77


class AlreadyRunning(LegendError):
    """Another process already holds this state directory."""

    exit_code = 75


class ProtocolError(LegendError):
    """A peer sent something outside the wire protocol."""

    exit_code = 76


class FailureCode(str, Enum):
    """Why a device could not do a round; sent to the server as text."""

    OUT_OF_MEMORY = "out_of_memory"
    NON_FINITE_LOSS = "non_finite_loss"
    EMPTY_DATASET = "empty_dataset"
    UNKNOWN_DATASET = "unknown_dataset"
    UNKNOWN_LABEL = "unknown_label"
    MISSING_FILE = "missing_file"
    BAD_DATA = "bad_data"
    WRONG_DIGEST = "wrong_digest"
    DISK_FULL = "disk_full"
    DOES_NOT_FIT = "does_not_fit"
    UNSUPPORTED_MODEL = "unsupported_model"
    DOWNLOAD_FAILED = "download_failed"
    UPLOAD_FAILED = "upload_failed"
    TRAINER_DIED = "trainer_died"
    CANCELLED = "cancelled"
    NOT_ALLOWED = "not_allowed"
    INTERNAL = "internal"


class DeviceError(LegendError):
    """This board cannot do the work it was given.

    Args:
        code: what kind of failure, for the server's bookkeeping.
        detail: one line for a person.
    """

    exit_code = 70

    def __init__(self, code: FailureCode, detail: str) -> None:
        super().__init__(detail)
        self.code = code


def one_line(text: object, *, longest: int = 300) -> str:
    """Text that quotes a stranger, fit for an error: one line, printable, not endless.

    Args:
        text: anything; what cannot be shown becomes a question mark.
        longest: characters that are kept.
    """
    line = " ".join(str(text).split())
    shown = line if len(line) <= longest else line[:longest] + "..."
    return "".join(letter if letter.isprintable() else "?" for letter in shown)
