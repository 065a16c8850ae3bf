"""The device's connection to the MQTT broker.

paho runs in a thread of its own and hands what happens to the event loop through a bounded queue;
while the queue is full the thread waits, so a flood becomes back-pressure and not memory.
Knows topics and the Last Will; not what other messages mean. Delivery is not promised here: what
must arrive stays in the outbox and is published again until the server acknowledges it.
"""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import anyio
import structlog
from anyio import to_thread
from paho.mqtt.client import Client, ConnectFlags, MQTTMessage, error_string
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from typing_extensions import Self

from edge_agent.reconnect import Attempt, LinkTiming, ReconnectPolicy
from wire_protocol.errors import LegendError, ProtocolError
from wire_protocol.messages import MAX_WIRE_BYTES, State, encode_message
from wire_protocol.topics import Channel, DeviceTopic, device_filters

log = structlog.get_logger()


@dataclass(frozen=True)
class BrokerLogin:
    """Where the broker is and how to get in."""

    host: str
    port: int
    username: str = ""
    password: str = field(default="", repr=False)
    tls: ssl.SSLContext | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Connected:
    """The broker accepted this device; subscriptions are on their way."""

    sid: int
    session_present: bool


@dataclass(frozen=True)
class Disconnected:
    """There is no connection, and why; the next attempt follows in ``retry_in_s``."""

    reason: str
    retry_in_s: float


@dataclass(frozen=True)
class CredentialsRefused:
    """The broker does not accept user or password, ``times`` in a row."""

    times: int
    reason: str
    retry_in_s: float


@dataclass(frozen=True)
class Received:
    """A message for this device or for the fleet."""

    topic: str
    payload: bytes


LinkEvent = Connected | Disconnected | CredentialsRefused | Received


class DeviceLink:
    """A persistent MQTT session that always comes back.

        async with link:
            async for event in link.incoming():
                ...

    Leaving the block says goodbye: the retained state becomes offline and no Last Will is sent.

    Args:
        login: the broker.
        topic: any topic of this device; names the fleet and the device.
        next_sid: hands out a number larger than any before, persisted. Called once per attempt
            to connect, so that the server can tell a late Last Will from a current one.
        timing: how patient to be.
        rng: the source of the jitter.
        queue_size: events that may wait for the event loop.
    """

    def __init__(
        self,
        login: BrokerLogin,
        topic: DeviceTopic,
        *,
        next_sid: Callable[[], int],
        timing: LinkTiming | None = None,
        rng: random.Random | None = None,
        queue_size: int = 256,
    ) -> None:
        self._state_topic = str(DeviceTopic(topic.fleet, topic.device_id, Channel.STATE))
        self._filters = device_filters(topic.fleet, topic.device_id)
        self._next_sid = next_sid
        self._timing = timing or LinkTiming()
        self._rng = rng or random.Random()  # noqa: S311 - jitter, not a secret
        self._queue_size = queue_size
        self._client = self._make_client(login, topic.device_id)
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._inbox: _Inbox | None = None
        # Guards ``_online``: nothing may be published between a loss and the next CONNECT.
        self._lock = threading.Lock()
        self._online = False
        self._sid = 0
        self._connected_at: float | None = None
        self._refusal: ReasonCode | None = None

    @property
    def sid(self) -> int:
        """The number of the current or last connection attempt; 0 before the first."""
        return self._sid

    @property
    def connected(self) -> bool:
        """Whether ``publish`` can succeed now."""
        return self._online

    @property
    def alive(self) -> bool:
        """Whether the network thread runs; false before the start and after the stop."""
        return self._thread is not None and self._thread.is_alive()

    async def __aenter__(self) -> Self:
        self._inbox = _Inbox(self._queue_size, self._stopping)
        self._thread = threading.Thread(target=self._run, name="mqtt", daemon=True)
        self._thread.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopping.set()
        with anyio.CancelScope(shield=True):
            await to_thread.run_sync(self._say_goodbye)

    async def incoming(self) -> AsyncIterator[LinkEvent]:
        """Everything that happens, in order, until the block is left."""
        while True:
            yield await self.receive()

    async def receive(self) -> LinkEvent:
        """Wait for the next event."""
        if self._inbox is None:
            raise RuntimeError("enter the link with 'async with' first")
        return await self._inbox.get()

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> bool:
        """Hand a message to the network thread; never blocks.

        Returns:
            False when there is no connection or too much is waiting already; the message is then
            not kept. True promises nothing either: only an ack of the server does.

        Raises:
            ProtocolError: larger than a message may be. A broker that refuses it closes the
                connection, and the resend would close every one after.
        """
        if len(payload) > MAX_WIRE_BYTES:
            raise ProtocolError(f"message of {len(payload)} bytes exceeds {MAX_WIRE_BYTES}")
        with self._lock:
            if not self._online:
                return False
            info = self._client.publish(topic, payload, qos=qos, retain=retain)
        return info.rc == MQTTErrorCode.MQTT_ERR_SUCCESS

    def _make_client(self, login: BrokerLogin, device_id: str) -> Client:
        client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=device_id,
            clean_session=False,
            protocol=MQTTProtocolVersion.MQTTv311,
            reconnect_on_failure=False,
        )
        client.username_pw_set(login.username or None, login.password or None)
        if login.tls is not None:
            client.tls_set_context(login.tls)
        client.max_queued_messages_set(100)
        client.connect_timeout = 10.0
        client.on_connect = self._on_connect
        client.on_message = self._on_message
        client.on_socket_open = _send_at_once
        # Its presence makes paho leave every write to the network thread.
        client.on_socket_register_write = lambda _client, _data, _sock: None
        client.connect_async(login.host, login.port, keepalive=self._timing.keepalive_s)
        return client

    def _run(self) -> None:
        policy = ReconnectPolicy(self._timing, self._rng)
        while not self._stopping.is_set():
            attempt = self._attempt()
            rest = policy.after(attempt)
            if self._stopping.is_set():
                return
            if rest.drop_unsent and (dropped := self._client.drop_out_messages()):
                log.warning("unsent_messages_dropped", count=len(dropped))
            if rest.refused_times:
                self._put(CredentialsRefused(rest.refused_times, attempt.reason, rest.delay_s))
            else:
                self._put(Disconnected(attempt.reason, rest.delay_s))
            self._stopping.wait(rest.delay_s)

    def _attempt(self) -> Attempt:
        """Connect once and stay until it is over."""
        self._refusal = None
        self._connected_at = None
        try:
            self._sid = self._next_sid()
            self._client.will_set(self._state_topic, self._state(online=False), qos=1, retain=True)
            self._client.reconnect()
        except (OSError, ValueError, LegendError) as error:
            return Attempt(str(error) or type(error).__name__, socket_opened=False)
        except Exception as error:
            log.exception("mqtt_connect_failed")
            return Attempt(f"{type(error).__name__}: {error}", socket_opened=False)
        code = self._stay()
        connected_at = self._connected_at
        return Attempt(
            self._why(code),
            socket_opened=True,
            refusal=None if self._refusal is None else self._refusal.value,
            lived_s=None if connected_at is None else time.monotonic() - connected_at,
        )

    def _stay(self) -> MQTTErrorCode:
        code = MQTTErrorCode.MQTT_ERR_SUCCESS
        try:
            while code == MQTTErrorCode.MQTT_ERR_SUCCESS:
                code = self._client.loop(timeout=1.0)
        except Exception:
            log.exception("mqtt_loop_failed")
            code = MQTTErrorCode.MQTT_ERR_UNKNOWN
        with self._lock:
            self._online = False
        return code

    def _why(self, code: MQTTErrorCode) -> str:
        if self._refusal is not None:
            return f"the broker refused the connection: {self._refusal}"
        if self._connected_at is None:
            return (
                "the broker closed the connection without an answer; it may not accept the user, "
                "the password or the certificate"
            )
        return error_string(code)

    def _on_connect(
        self,
        client: Client,
        _data: object,
        flags: ConnectFlags,
        reason: ReasonCode,
        _properties: Properties | None,
    ) -> None:
        if reason.is_failure:
            self._refusal = reason
            return
        try:
            self._connected_at = time.monotonic()
            client.subscribe([(text, 1) for text in self._filters])
            client.publish(self._state_topic, self._state(online=True), qos=1, retain=True)
            with self._lock:
                self._online = True
            self._put(Connected(self._sid, flags.session_present))
        except Exception:
            log.exception("mqtt_callback_failed", callback="on_connect")

    def _on_message(self, _client: Client, _data: object, message: MQTTMessage) -> None:
        try:
            self._put(Received(message.topic, bytes(message.payload)))
        except Exception:  # a topic that is not UTF-8 must not end the thread
            log.exception("mqtt_callback_failed", callback="on_message")

    def _put(self, event: LinkEvent) -> None:
        if self._inbox is not None:
            self._inbox.put(event)

    def _state(self, *, online: bool) -> bytes:
        word = "online" if online else "offline"
        return encode_message(
            State(online=online), message_id=f"state-{self._sid}-{word}", sid=self._sid
        )

    def _say_goodbye(self) -> None:
        with self._lock:
            online, self._online = self._online, False
        if online:
            farewell = self._client.publish(
                self._state_topic, self._state(online=False), qos=1, retain=True
            )
            with suppress(RuntimeError, ValueError):
                farewell.wait_for_publish(self._timing.stop_s)
        self._client.disconnect()
        if self._thread is not None:
            self._thread.join(self._timing.stop_s)


def _send_at_once(_client: Client, _data: object, sock: Any) -> None:
    # Without it a small request and its answer take 44 ms more.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class _Inbox:
    """A bounded queue from the network thread to the event loop it was made in."""

    def __init__(self, size: int, stopping: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._sender, self._receiver = anyio.create_memory_object_stream[LinkEvent](size)
        self._room = threading.Semaphore(size)
        self._stopping = stopping

    def put(self, event: LinkEvent) -> None:
        """Called by the network thread; waits for room, but not once the link is stopping."""
        while not (self._stopping.is_set() or self._room.acquire(timeout=0.1)):
            pass
        if self._stopping.is_set():
            return
        with suppress(RuntimeError):  # the event loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._sender.send_nowait, event)

    async def get(self) -> LinkEvent:
        event = await self._receiver.receive()
        self._room.release()
        return event
