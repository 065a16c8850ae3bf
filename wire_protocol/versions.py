"""What a server says to a device that speaks another protocol, in one place for both sides."""

from __future__ import annotations

from collections.abc import Collection

from wire_protocol.messages import PROTOCOL_VERSION

WRONG_PROTOCOL = "protocol"
"""Code of the ack that a birth gets when there is no protocol that both sides speak.

Every later protocol keeps this answer readable: it is how an older agent learns that it is old.
"""


def protocol_problem(spoken: Collection[int]) -> str:
    """Say why this server cannot work with a device.

    Args:
        spoken: the protocols in the device's birth.

    Returns:
        One clause; empty when there is a protocol that both speak.
    """
    if PROTOCOL_VERSION in spoken:
        return ""
    versions = ", ".join(str(version) for version in spoken) or "none"
    return f"speaks protocol {versions}, this server {PROTOCOL_VERSION}; update the older one"
