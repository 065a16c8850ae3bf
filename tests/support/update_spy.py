"""Counts the update manifests that devices publish, resends included."""

from __future__ import annotations

import secrets
import threading
from collections import Counter
from typing import Any

from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion

from broker_server.broker_address import BrokerAddress
from wire_protocol.topics import ROOT


class UpdateSpy:
    """A second reader of the updates, straight at the broker.

    Args:
        address: with a user that may read everything.
    """

    def __init__(self, address: BrokerAddress) -> None:
        self._seen: Counter[tuple[str, bytes]] = Counter()
        self._lock = threading.Lock()
        self._client = Client(CallbackAPIVersion.VERSION2, client_id=f"spy-{secrets.token_hex(4)}")
        user = address.server_credentials
        if user is not None:
            self._client.username_pw_set(user.username, user.password)
        self._client.reconnect_delay_set(1, 1)
        self._client.on_connect = self._on_connect
        self._client.on_message = self._on_message
        self._client.connect_async(address.host, address.port)

    def start(self) -> None:
        """Listen from now on; comes back when the broker does."""
        self._client.loop_start()

    def stop(self) -> None:
        """Listen no more."""
        self._client.disconnect()
        self._client.loop_stop()

    @property
    def published(self) -> int:
        """Messages seen, each resend counted."""
        with self._lock:
            return self._seen.total()

    @property
    def distinct(self) -> int:
        """Different messages seen."""
        with self._lock:
            return len(self._seen)

    def _on_connect(self, client: Client, *_rest: Any) -> None:
        client.subscribe(f"{ROOT}/+/d/+/up/update", qos=1)

    def _on_message(self, _client: Client, _data: object, message: Any) -> None:
        with self._lock:
            self._seen[message.topic, bytes(message.payload)] += 1
