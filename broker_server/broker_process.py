"""Starts and ends a broker's child process, and asks a broker whether it answers.

Knows processes, pid files and CONNECT; not which broker it is.
"""

from __future__ import annotations

import math
import os
import secrets
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.reasoncodes import ReasonCode

from broker_server.broker_address import BrokerAddress
from wire_protocol.errors import BrokerUnavailable, ConfigError

_CHILD = Path(__file__).with_name("broker_child.py")
_POLL_S = 0.02
_STOP_S = 8.0
_RELOAD_S = 10.0
_ASK_AGAIN_S = 2.0
_LARGEST_LOG_BYTES = 8 * 1024 * 1024


class BrokerProcess:
    """A broker that ends with this process.

    Args:
        folder: private to the broker; gets ``pid`` and ``broker.log``.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._log = folder / "broker.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """The child's process id while it runs."""
        return self._process.pid if self._process is not None and self.running else None

    def start(self, arguments: list[str]) -> None:
        """Start the child with arguments for ``broker_child.py``; does not wait for it."""
        # Appending: whoever shortens the file while the broker writes leaves no hole in it.
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
        with os.fdopen(os.open(self._log, flags, 0o600), "wb") as output:
            self._process = subprocess.Popen(
                # Isolated: a folder named iotcore in the working directory must not be imported.
                [sys.executable, "-I", str(_CHILD), *arguments],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Ctrl-C is for the server, which then stops the broker in its own time.
                start_new_session=True,
            )
        (self._folder / "pid").write_text(f"{self._process.pid}\n", encoding="ascii")

    def stop(self) -> None:
        """End the child and wait for it; harmless when it has ended."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        (self._folder / "pid").unlink(missing_ok=True)

    def reload(self, confirmation: str) -> bool:
        """Ask a broker program to read its files again, and wait until it says that it does.

        Args:
            confirmation: what it writes then. A broker with one thread has read the files
                before it answers anybody who connects after that.

        Returns:
            False when it does not run or said nothing in time.
        """
        self._shorten_log()
        before = self._said(confirmation)
        deadline = time.monotonic() + _RELOAD_S
        asked_at = -math.inf
        while (pid := self.pid) is not None and time.monotonic() < deadline:
            if self._said(confirmation) > before:
                return True
            # More than once: the first may come before the child listens.
            if time.monotonic() - asked_at >= _ASK_AGAIN_S:
                os.kill(pid, signal.SIGHUP)
                asked_at = time.monotonic()
            time.sleep(_POLL_S)
        return False

    def _said(self, text: str) -> int:
        return self._log.read_bytes().count(text.encode()) if self._log.exists() else 0

    def _shorten_log(self) -> None:
        with suppress(OSError):
            if self._log.stat().st_size > _LARGEST_LOG_BYTES:
                os.truncate(self._log, 0)

    def last_words(self) -> str:
        """The last line that the broker wrote, for an error message."""
        try:
            text = self._log.read_text(errors="replace")
        except OSError:
            return "it wrote nothing"
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return lines[-1][:300] if lines else "it wrote nothing"

    def end_orphan(self) -> bool:
        """End a broker that a killed server left behind in the same folder.

        Returns:
            Whether there was one. A process that merely has its number is left alone.
        """
        try:
            pid = int((self._folder / "pid").read_text(encoding="ascii"))
        except (OSError, ValueError):
            return False
        if not self._is_ours(pid):
            return False
        # It is about to end by itself, as its standard input is closed; this is for a stuck one.
        deadline = time.monotonic() + _STOP_S
        for sign in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.kill(pid, sign)
            except ProcessLookupError:
                return True
            while self._is_ours(pid) and time.monotonic() < deadline:
                time.sleep(_POLL_S)
            deadline = time.monotonic() + _STOP_S
        return True

    def _is_ours(self, pid: int) -> bool:
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return False
        ours = os.fsencode(str(self._folder)) + b"/"
        return os.fsencode(str(_CHILD)) in command and any(
            part.startswith(ours) for part in command
        )


def wait_until_it_answers(
    address: BrokerAddress, *, still_running: Callable[[], bool], timeout_s: float = 15.0
) -> bool:
    """Wait until a broker that is just starting accepts the server.

    Returns:
        False when it ended or did not answer in time.

    Raises:
        ConfigError: it does not accept the server's user and password.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and still_running():
        if _answers(address):
            return True
        time.sleep(_POLL_S)
    return False


def _answers(address: BrokerAddress) -> bool:
    try:
        check_that_it_answers(address, timeout_s=2.0)
    except BrokerUnavailable:
        return False
    return True


def check_that_it_answers(
    address: BrokerAddress,
    *,
    tls: ssl.SSLContext | None = None,
    session: str | None = None,
    timeout_s: float = 10.0,
) -> None:
    """Connect as the server and leave again.

    Args:
        address: where, and with what to get in.
        tls: None takes the address's own.
        session: client id of a session to leave as it is; None: one that ends with this.
        timeout_s: how long to wait for each step.

    Raises:
        BrokerUnavailable: nothing answers there, or it closes the connection.
        ConfigError: it refuses user and password.
    """
    answers: list[ReasonCode] = []
    client = Client(
        CallbackAPIVersion.VERSION2,
        client_id=session or f"legend-check-{secrets.token_hex(6)}",
        clean_session=session is None,
        reconnect_on_failure=False,
        # What the session holds is for whoever it belongs to.
        manual_ack=True,
    )
    client.connect_timeout = timeout_s
    client.on_connect = lambda _client, _data, _flags, reason, _properties: answers.append(reason)
    if address.server_credentials is not None:
        user = address.server_credentials
        client.username_pw_set(user.username, user.password)
    tls = tls or address.ssl_context()
    if tls is not None:
        client.tls_set_context(tls)
    try:
        client.connect(address.host, address.port)
    except (OSError, ValueError) as error:
        raise BrokerUnavailable(f"no broker answers at {address.url}: {error}") from error
    deadline = time.monotonic() + timeout_s
    while not answers and time.monotonic() < deadline:
        if client.loop(timeout=0.1) != MQTTErrorCode.MQTT_ERR_SUCCESS:
            break
    client.disconnect()
    credentials = "this server's certificate" if address.tls_files else "its user and password"
    if not answers:
        raise BrokerUnavailable(
            f"{address.url} closed the connection without an answer; "
            f"check that it is an MQTT broker, and {credentials}"
        )
    if answers[0].is_failure:
        raise ConfigError(
            f"the broker at {address.url} refuses this server: {answers[0]}; check {credentials}"
        )
