"""The server's connection to the MQTT broker.

Every message carries its own ``acknowledge``: the broker keeps it until the server has processed
it, so a server that dies in between gets it again. paho runs in a thread of its own and waits
while the queue to the event loop is full. Knows the fleet's topics, not what messages mean.
"""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
import threading
import time
from collections import deque
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

from broker_server.broker_address import BrokerAddress
from wire_protocol.errors import ProtocolError
from wire_protocol.messages import MAX_WIRE_BYTES, State, encode_message
from wire_protocol.topics import Broadcast, FleetTopic, server_filters

log = structlog.get_logger()

_SETTLED_AFTER_S = 5.0
_STOP_S = 3.0


@dataclass(frozen=True)
class BrokerConnected:
    """The broker confirmed the subscriptions: devices are heard again from here on.

    Commands in flight before may be lost.
    """

    session_present: bool


@dataclass(frozen=True)
class BrokerLost:
    """There is no connection, and why; the next attempt follows in ``retry_in_s``."""

    reason: str
    retry_in_s: float


@dataclass(frozen=True)
class Incoming:
    """A message of a device. Call ``acknowledge`` once it is processed."""

    topic: str
    payload: bytes
    retained: bool
    _acknowledge: Callable[[], None] = field(repr=False, compare=False)

    def acknowledge(self) -> None:
        """Let the broker forget the message; harmless after a lost connection."""
        self._acknowledge()


@dataclass
class _Delivery:
    """One message that the broker waits to hear about."""

    mid: int
    processed: bool = False


ServerEvent = BrokerConnected | BrokerLost | Incoming


class ServerLink:
    """A persistent MQTT session that always comes back.

        async with link:
            async for item in link.incoming():
                ...

    While connected, the fleet's retained server state says online; the Last Will says offline.

    Args:
        address: the broker.
        fleet: whose devices to hear.
        start_number: how often this server has started; devices see it as the state's ``sid``.
        tls: verifies the broker's certificate; see ``BrokerAddress.ssl_context``.
        longest_retry_s: upper bound of the delay between attempts.
        queue_size: messages that may wait for the event loop.
    """

    def __init__(
        self,
        address: BrokerAddress,
        *,
        fleet: str,
        start_number: int,
        tls: ssl.SSLContext | None = None,
        longest_retry_s: float = 30.0,
        queue_size: int = 1024,
    ) -> None:
        self._state_topic = str(FleetTopic(fleet, Broadcast.SERVER_STATE))
        self._filters = server_filters(fleet)
        self._start_number = start_number
        self._longest_retry_s = longest_retry_s
        self._queue_size = queue_size
        self._client = self._make_client(address, f"legend-server-{fleet}", tls)
        self._rng = random.Random()  # noqa: S311 - jitter, not a secret
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._inbox: _Inbox | None = None
        # Guards the two below: nothing may be written between a loss and the next CONNECT.
        self._lock = threading.Lock()
        self._online = False
        self._deliveries: deque[_Delivery] = deque()
        self._connected_at: float | None = None
        self._session_present = False
        self._refusal: ReasonCode | None = None

    @property
    def connected(self) -> bool:
        """Whether ``publish`` can succeed now."""
        return self._online

    @property
    def waiting(self) -> int:
        """Events that nobody has received yet; when it is full, the broker keeps the rest."""
        return self._inbox.waiting if self._inbox else 0

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

    async def incoming(self) -> AsyncIterator[ServerEvent]:
        """Everything that happens, in order, until the block is left."""
        while True:
            yield await self.receive()

    async def receive(self) -> ServerEvent:
        """Wait for the next message or change of the connection."""
        if self._inbox is None:
            raise RuntimeError("enter the link with 'async with' first")
        return await self._inbox.get()

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> bool:
        """Hand a message to the network thread; never blocks.

        Returns:
            False when there is no connection or too much is waiting already; the message is then
            not kept. True promises nothing either: only the device's ack does.

        Raises:
            ProtocolError: larger than a message may be.
        """
        if len(payload) > MAX_WIRE_BYTES:
            raise ProtocolError(f"message of {len(payload)} bytes exceeds {MAX_WIRE_BYTES}")
        with self._lock:
            if not self._online:
                return False
            info = self._client.publish(topic, payload, qos=qos, retain=retain)
        return info.rc == MQTTErrorCode.MQTT_ERR_SUCCESS

    def _make_client(
        self, address: BrokerAddress, client_id: str, tls: ssl.SSLContext | None
    ) -> Client:
        client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            clean_session=False,
            protocol=MQTTProtocolVersion.MQTTv311,
            reconnect_on_failure=False,
            manual_ack=True,
        )
        if address.server_credentials is not None:
            user = address.server_credentials
            client.username_pw_set(user.username, user.password)
        if tls is not None:
            client.tls_set_context(tls)
        client.max_queued_messages_set(10_000)
        client.max_inflight_messages_set(100)
        client.connect_timeout = 10.0
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_message = self._on_message
        client.on_socket_open = _send_at_once
        # Its presence makes paho leave every write to the network thread.
        client.on_socket_register_write = lambda _client, _data, _sock: None
        client.will_set(self._state_topic, self._state(online=False), qos=1, retain=True)
        client.connect_async(address.host, address.port, keepalive=60)
        return client

    def _run(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            reason = self._attempt()
            if self._stopping.is_set():
                return
            connected_at = self._connected_at
            settled = (
                connected_at is not None and time.monotonic() - connected_at >= _SETTLED_AFTER_S
            )
            failures = 0 if settled else failures + 1
            bound_s = min(self._longest_retry_s, 0.5 * 2.0 ** min(failures, 20))
            delay_s = self._rng.uniform(0.0, bound_s)
            self._put(BrokerLost(reason, delay_s))
            self._stopping.wait(delay_s)

    def _attempt(self) -> str:
        """Connect once and stay until it is over; returns why it is over."""
        self._refusal = None
        self._connected_at = None
        code = MQTTErrorCode.MQTT_ERR_SUCCESS
        try:
            self._client.reconnect()
            while code == MQTTErrorCode.MQTT_ERR_SUCCESS:
                code = self._client.loop(timeout=1.0)
        except OSError as error:
            return str(error) or type(error).__name__
        except Exception as error:
            log.exception("mqtt_loop_failed")
            return f"{type(error).__name__}: {error}"
        finally:
            with self._lock:
                self._online = False
        if self._refusal is not None:
            return f"the broker refused the connection: {self._refusal}"
        if self._connected_at is None:
            return "the broker closed the connection without an answer; wrong user or password?"
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
            self._session_present = flags.session_present
            with self._lock:
                self._online = True
                self._deliveries = deque()
            client.subscribe([(text, 1) for text in self._filters])
        except Exception:
            log.exception("mqtt_callback_failed", callback="on_connect")

    def _on_subscribe(
        self,
        client: Client,
        _data: object,
        _mid: int,
        reasons: list[ReasonCode],
        _properties: Properties | None,
    ) -> None:
        try:
            if any(reason.is_failure for reason in reasons):
                self._refusal = next(reason for reason in reasons if reason.is_failure)
                client.disconnect()
                return
            # Devices take "online" as "speak": only once this server can hear them.
            client.publish(self._state_topic, self._state(online=True), qos=1, retain=True)
            self._put(BrokerConnected(self._session_present))
        except Exception:
            log.exception("mqtt_callback_failed", callback="on_subscribe")

    def _on_message(self, _client: Client, _data: object, message: MQTTMessage) -> None:
        acknowledge = self._acknowledger(message.mid, message.qos)
        try:
            topic = message.topic
        except UnicodeDecodeError:
            log.warning("message_dropped", error="the topic is not UTF-8")
            acknowledge()
            return
        try:
            self._put(Incoming(topic, bytes(message.payload), message.retain, acknowledge))
        except Exception:
            log.exception("mqtt_callback_failed", callback="on_message")

    def _acknowledger(self, mid: int, qos: int) -> Callable[[], None]:
        if qos == 0:
            return lambda: None
        delivery = _Delivery(mid)
        with self._lock:
            deliveries = self._deliveries
            deliveries.append(delivery)

        def acknowledge() -> None:
            with self._lock:
                delivery.processed = True
                # The broker counts message numbers afresh on every connection, so a late
                # acknowledgement could name another message.
                if not self._online or deliveries is not self._deliveries:
                    return
                # It wants them in the order of its messages; the embedded one closes otherwise.
                while deliveries and deliveries[0].processed:
                    self._client.ack(deliveries.popleft().mid, qos)

        return acknowledge

    def _put(self, event: ServerEvent) -> None:
        if self._inbox is not None:
            self._inbox.put(event)

    def _state(self, *, online: bool) -> bytes:
        word = "online" if online else "offline"
        return encode_message(
            State(online=online),
            message_id=f"server-{self._start_number}-{word}",
            sid=self._start_number,
        )

    def _say_goodbye(self) -> None:
        with self._lock:
            online, self._online = self._online, False
        if online:
            farewell = self._client.publish(
                self._state_topic, self._state(online=False), qos=1, retain=True
            )
            with suppress(RuntimeError, ValueError):
                farewell.wait_for_publish(_STOP_S)
        self._client.disconnect()
        if self._thread is not None:
            self._thread.join(_STOP_S)


def _send_at_once(_client: Client, _data: object, sock: Any) -> None:
    # Without it a small request and its answer take 44 ms more.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class _Inbox:
    """A bounded queue from the network thread to the event loop it was made in."""

    def __init__(self, size: int, stopping: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._sender, self._receiver = anyio.create_memory_object_stream[ServerEvent](size)
        self._room = threading.Semaphore(size)
        self._stopping = stopping

    def put(self, event: ServerEvent) -> None:
        """Called by the network thread; waits for room, but not once the link is stopping."""
        while not (self._stopping.is_set() or self._room.acquire(timeout=0.1)):
            pass
        if self._stopping.is_set():
            return
        with suppress(RuntimeError):  # the event loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._sender.send_nowait, event)

    @property
    def waiting(self) -> int:
        return self._receiver.statistics().current_buffer_used

    async def get(self) -> ServerEvent:
        event = await self._receiver.receive()
        self._room.release()
        return event
