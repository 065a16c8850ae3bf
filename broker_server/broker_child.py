"""Runs a broker as a child that never outlives the server, however the server ends.

The server holds the other end of our standard input; when that closes, by a clean stop or by
``kill -9``, the broker ends. A pipe and not the parent-death signal alone: that signal fires when
the *thread* that started us ends, and the server starts us from a short-lived one.

Run by file name, so it knows the standard library and iotcore only.

    broker_child.py embedded CONFIG.toml
    broker_child.py program EXECUTABLE [ARGUMENT ...]
"""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1
_STOP_S = 5.0


def main(arguments: list[str]) -> int:
    """Run until the broker ends or standard input closes.

    Args:
        arguments: the command line without the program's own name.

    Returns:
        The broker's exit code.
    """
    # A connection is an open file; most systems allow 1024 until a program asks for more.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if arguments[0] == "embedded":
        return _run_embedded(arguments[1])
    return _run_program(arguments[1:])


def _run_embedded(config: str) -> int:
    from iotcore import IotCoreBroker  # noqa: PLC0415 - not needed for the other kind

    # It reports every packet at level ERROR; the log file would grow without end.
    logging.getLogger("rumqttd").setLevel(logging.CRITICAL)
    # This broker has no shutdown of its own and keeps nothing on disk.
    _when_the_server_is_gone(lambda: os._exit(0))
    IotCoreBroker(config_path=config).run_forever()
    return 1


def _run_program(command: list[str]) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    # Until there is a broker to read its files again, the request to do so must not end us.
    signal.signal(signal.SIGHUP, lambda _number, _frame: None)
    # Should this process be killed as well, the kernel ends the broker.
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM),  # noqa: PLW1509 - no threads yet
    ) as broker:
        signal.signal(signal.SIGTERM, lambda _number, _frame: broker.terminate())
        signal.signal(signal.SIGHUP, lambda _number, _frame: broker.send_signal(signal.SIGHUP))
        _when_the_server_is_gone(lambda: _end(broker))
        return broker.wait()


def _end(broker: subprocess.Popen[bytes]) -> None:
    broker.terminate()
    try:
        broker.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        broker.kill()


def _when_the_server_is_gone(act: Callable[[], object]) -> None:
    def watch() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        act()

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
