"""Free ports for a broker of ours."""

from __future__ import annotations

import errno
import ipaddress
import secrets
import socket
import time

from wire_protocol.errors import ConfigError


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def some_free_port(host: str) -> int:
    """A port that nothing listens on now.

    Raises:
        ConfigError: none found, or the address is not one of this machine.
    """
    # Below the ports of outgoing connections (32768 and up): a device on this machine that retries
    # a closed port among those can be given the same one, connect to itself, and so hold it.
    for _ in range(200):
        port = 20_000 + secrets.randbelow(10_000)
        if is_free(host, port):
            return port
    raise ConfigError(f"found no free port on {host} between 20000 and 29999; choose a broker port")


def becomes_free(host: str, port: int, patience_s: float) -> bool:
    """Wait until nothing listens on a port any more; false when something still does."""
    deadline = time.monotonic() + patience_s
    while not is_free(host, port):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.05)
    return True


def is_free(host: str, port: int) -> bool:
    """Whether nothing listens on a port now.

    Raises:
        ConfigError: the address is not one of this machine.
    """
    try:
        socket.create_server((host, port), family=_family(host)).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return False
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another address"
        ) from error
    return True


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
