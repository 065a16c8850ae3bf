"""Free ports, and waiting for what happens in another process."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nothing listens on now.

    Below the ports of outgoing connections: a test that retries a closed port among those can
    connect to itself.
    """
    for _ in range(200):
        port = random.randint(10_000, 19_999)
        try:
            socket.create_server((host, port)).close()
        except OSError:
            continue
        return port
    raise RuntimeError("no free port")


def answers(port: int, host: str = "127.0.0.1") -> bool:
    """Whether something accepts connections there."""
    try:
        socket.create_connection((host, port), timeout=0.2).close()
    except OSError:
        return False
    return True


def wait_until(condition: Callable[[], bool], *, seconds: float = 20.0) -> None:
    """Poll another process; fails the test after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)
