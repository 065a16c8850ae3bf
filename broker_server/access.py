"""Who may do what over HTTP: one table and the function that reads it.

Pure: identities, methods and paths come in, a refusal or nothing comes out. A route without a rule
is closed to everybody, so that one that is added later is never open by accident.

                    nobody   device            viewer   operator
    enrolment         x        x                 x         x
    join                       itself
    blobs, probe               what was assigned           x
    reading                    base models       x         x
    changing                                               x

Without a PKI devices cannot be told from operators: an operator is any device then.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol
from urllib.parse import parse_qsl

IDENTITY = "legend.identity"
"""Where the scope of a request says who asks: an ``Identity``."""

LARGEST_JSON_BYTES = 1024 * 1024
LARGEST_STRANGERS_BYTES = 16 * 1024


class Role(str, Enum):
    """What a person's token allows."""

    VIEWER = "viewer"
    OPERATOR = "operator"


class Who(str, Enum):
    """Whom a rule lets in."""

    ANYBODY = "anybody"
    DEVICE = "device"
    VIEWER = "viewer"
    OPERATOR = "operator"


class Condition(str, Enum):
    """What must hold besides for a device."""

    NONE = "none"
    ITSELF = "itself"
    GRANTED_BLOB = "granted blob"
    GRANTED_MODEL = "granted model"


@dataclass(frozen=True)
class Identity:
    """Who asks; everything absent: nobody.

    Attributes:
        device: name in the certificate that the TLS peer showed.
        role: of the token that came with the request.
        name: of that token, for the log.
        undivided: there is no PKI, so an operator is every device as well.
    """

    device: str | None = None
    role: Role | None = None
    name: str = ""
    undivided: bool = False

    @property
    def owner(self) -> str | None:
        """The device whose own uploads these are; None for operators."""
        return None if self.role is Role.OPERATOR else self.device

    def __str__(self) -> str:
        parts = [f"device {self.device}"] if self.device else []
        if self.role:
            parts.append(f"{self.role.value} {self.name}".rstrip())
        return " as ".join(parts) or "nobody"


NOBODY = Identity()
TOKEN_WANTED = "a token; give the right one"  # noqa: S105 - words for people


@dataclass(frozen=True)
class Refusal:
    """A no: its HTTP status, a word to count it by, and a line for people."""

    status: int
    reason: str
    detail: str


@dataclass(frozen=True)
class Rule:
    """One route.

    Attributes:
        who: enough to be one of them.
        condition: what a device must fulfil besides.
        largest_body_bytes: None where the handler reads in pieces and bounds them itself.
    """

    method: str
    path: str
    who: frozenset[Who]
    condition: Condition = Condition.NONE
    largest_body_bytes: int | None = LARGEST_JSON_BYTES
    pattern: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pattern", _pattern(self.path))


@dataclass(frozen=True)
class Asked:
    """What is asked for: method, path, and the raw query string."""

    method: str
    path: str
    query: str = ""


class ReadRights(Protocol):
    """What devices may read; see ``broker_server.grants``."""

    def may_read(self, device_id: str, sha256: str) -> bool:
        """Whether the device was given this blob."""

    def may_describe(self, device_id: str, model_digest: str) -> bool:
        """Whether the device was given this base model."""


def _pattern(path: str) -> re.Pattern[str]:
    """Starlette's templates: ``{name}`` is one segment, ``{name:path}`` all the rest."""
    text = "".join(
        part
        if not part.startswith("{")
        else f"(?P<{part[1:-1].partition(':')[0]}>{'.*' if part.endswith(':path}') else '[^/]+'})"
        for part in re.split(
            r"(\{[^}]*\})", re.escape(path).replace(r"\{", "{").replace(r"\}", "}")
        )
    )
    return re.compile(text)


_ANYBODY = frozenset({Who.ANYBODY})
_DEVICE = frozenset({Who.DEVICE})
_PEOPLE = frozenset({Who.VIEWER, Who.OPERATOR})
_EVERYBODY = frozenset({Who.DEVICE, Who.VIEWER, Who.OPERATOR})
_WORKERS = frozenset({Who.DEVICE, Who.OPERATOR})
_OPERATOR = frozenset({Who.OPERATOR})

RULES: tuple[Rule, ...] = (
    Rule("GET", "/openapi.json", _PEOPLE),
    Rule("GET", "/docs", _PEOPLE),
    Rule("GET", "/docs/oauth2-redirect", _PEOPLE),
    Rule("GET", "/redoc", _PEOPLE),
    Rule("GET", "/metrics", _PEOPLE),
    Rule("GET", "/v1/doctor", _PEOPLE),
    # It holds private keys and every device's updates.
    Rule("POST", "/v1/backup", _OPERATOR),
    Rule("GET", "/v1/health", _PEOPLE),
    Rule("GET", "/v1/ca", _ANYBODY, largest_body_bytes=LARGEST_STRANGERS_BYTES),
    Rule("POST", "/v1/enroll", _ANYBODY, largest_body_bytes=LARGEST_STRANGERS_BYTES),
    Rule("GET", "/v1/enrolments", _PEOPLE),
    # It answers with tokens: whoever may accept devices may also let them in beforehand.
    Rule("PUT", "/v1/expected", _OPERATOR),
    Rule("POST", "/v1/devices/{device_id}/accept", _OPERATOR),
    Rule("POST", "/v1/devices/{device_id}/reject", _OPERATOR),
    Rule("POST", "/v1/devices/{device_id}/revoke", _OPERATOR),
    Rule("GET", "/v1/join", _DEVICE, Condition.ITSELF),
    Rule("GET", "/v1/devices", _PEOPLE),
    Rule("GET", "/v1/models", _EVERYBODY),
    Rule("POST", "/v1/models", _OPERATOR),
    Rule("GET", "/v1/models/{name_or_digest}", _EVERYBODY, Condition.GRANTED_MODEL),
    Rule("GET", "/v1/runs", _PEOPLE),
    Rule("POST", "/v1/runs", _OPERATOR),
    Rule("GET", "/v1/runs/{run_id}", _PEOPLE),
    Rule("POST", "/v1/runs/{run_id}/cancel", _OPERATOR),
    Rule("GET", "/v1/runs/{run_id}/files", _PEOPLE),
    Rule("GET", "/v1/runs/{run_id}/files/{name:path}", _PEOPLE),
    # Held-out examples and other devices' updates are blobs too: not for viewers.
    Rule("POST", "/v1/blobs", _WORKERS),
    Rule("PATCH", "/v1/blobs/{sha256}", _WORKERS, largest_body_bytes=None),
    Rule("GET", "/v1/blobs/{sha256}", _WORKERS, Condition.GRANTED_BLOB),
    Rule("GET", "/v1/probe", _WORKERS),
    Rule("POST", "/v1/probe", _WORKERS, largest_body_bytes=None),
)


def rule_for(method: str, path: str, rules: Iterable[Rule] = RULES) -> Rule | Refusal:
    """The rule of a route; HEAD follows GET."""
    wanted = "GET" if method == "HEAD" else method
    known = False
    for rule in rules:
        if rule.pattern.fullmatch(path):
            if rule.method == wanted:
                return rule
            known = True
    if known:
        return Refusal(405, "method", f"{method[:20]} is not possible here")
    return Refusal(404, "unknown_route", f"there is no {path[:100]!r}; see /openapi.json")


def refusal_of(
    identity: Identity, asked: Asked, rule: Rule | Refusal, rights: ReadRights
) -> Refusal | None:
    """Decide one request.

    Args:
        identity: who asks.
        asked: what for.
        rule: what ``rule_for`` says about it.
        rights: what devices were given; asked only where the rule says so.

    Returns:
        None when it is allowed.
    """
    if isinstance(rule, Rule) and Who.ANYBODY in rule.who:
        return None
    if identity.device is None and identity.role is None:
        # Strangers do not learn which routes there are.
        return Refusal(401, "no_credentials", _who_is_wanted(rule))
    if isinstance(rule, Refusal):
        return rule
    if identity.role is not None and _role_suffices(identity, rule):
        return None
    if identity.device is None or Who.DEVICE not in rule.who:
        names = " or ".join(sorted(who.value for who in rule.who))
        return Refusal(403, "role", f"{identity} may not do this; it takes: {names}")
    return _unmet(identity.device, asked, rule, rights)


def _role_suffices(identity: Identity, rule: Rule) -> bool:
    if identity.role is Role.OPERATOR and identity.undivided and Who.DEVICE in rule.who:
        return True
    return identity.role is not None and Who(identity.role.value) in rule.who


def _unmet(device: str, asked: Asked, rule: Rule, rights: ReadRights) -> Refusal | None:
    match = rule.pattern.fullmatch(asked.path)
    named = match.groupdict() if match else {}
    if rule.condition is Condition.ITSELF:
        query = parse_qsl(asked.query, keep_blank_values=True)
        if any(key == "device_id" and value != device for key, value in query):
            return Refusal(403, "other_device", f"the certificate is that of {device}")
    if rule.condition is Condition.GRANTED_BLOB and not rights.may_read(device, named["sha256"]):
        return Refusal(403, "not_assigned", "this device was not given this blob")
    if rule.condition is Condition.GRANTED_MODEL and not rights.may_describe(
        device, named["name_or_digest"]
    ):
        return Refusal(403, "not_assigned", "this device was not given this base model")
    return None


def _who_is_wanted(rule: Rule | Refusal) -> str:
    wants_certificate = isinstance(rule, Rule) and rule.who == _DEVICE
    return f"this server wants {'a certificate' if wants_certificate else TOKEN_WANTED}"
