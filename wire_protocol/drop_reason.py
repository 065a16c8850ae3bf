"""A word for every reason to drop a message, so that they can be counted.

The words are few and fixed: whatever a stranger sends, no new one appears.
"""

from __future__ import annotations

from wire_protocol.errors import ProtocolError

OTHER = "other"

_WORDS = (
    ("is not signed", "not_signed"),
    ("the signature is wrong", "bad_signature"),
    ("the operator's statement", "unknown_key"),
    ("server's key", "unknown_key"),
    ("the key is for the server", "unknown_key"),
    ("certificate", "bad_certificate"),
    ("signed by", "wrong_signer"),
    ("is for session", "other_session"),
    ("the message is for", "other_receiver"),
    ("for whom", "other_receiver"),
    ("was used before", "repeated"),
    ("earlier start", "outdated"),
    ("the message is older", "outdated"),
    ("exceeds", "too_large"),
    ("instead of", "unknown_schema"),
    ("topic", "wrong_topic"),
    ("not for the server", "wrong_topic"),
    ("not meant for devices", "wrong_topic"),
    ("lower-case letters", "wrong_topic"),
)


def drop_reason(error: ProtocolError) -> str:
    """The word for an error; see ``docs/operations.md`` for what each one means."""
    text = str(error)
    for sign, word in _WORDS:
        if sign in text:
            return word
    return OTHER if error.__cause__ is None else "bad_field"
