"""An MQTT client that tries things, and says what came of them."""

from __future__ import annotations

import ssl
import threading
import time
from dataclasses import dataclass

from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from typing_extensions import Self

PATIENCE_S = 60.0


@dataclass(frozen=True)
class Heard:
    """A message that arrived."""

    topic: str
    payload: bytes


class MqttClient:
    """One client; never reconnects by itself.

    Args:
        port: of a broker on this machine.
        tls: what it presents and trusts.
        client_id: what it calls itself.
        will: topic and payload that the broker is to publish when it dies.
    """

    def __init__(
        self,
        port: int,
        tls: ssl.SSLContext,
        client_id: str,
        *,
        will: tuple[str, bytes] | None = None,
    ) -> None:
        self._port = port
        self._tls = tls
        self._client_id = client_id
        self._will = will
        self._client: Client | None = None
        self._changed = threading.Condition()
        self._subscribed: set[int] = set()
        self._over = False
        self.connected = False
        self.heard: list[Heard] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def connect(self) -> bool:
        """Try to get in; false when the broker or TLS says no."""
        self.close()
        self._over = False
        client = Client(
            CallbackAPIVersion.VERSION2, self._client_id, protocol=MQTTProtocolVersion.MQTTv311
        )
        client.tls_set_context(self._tls)
        if self._will:
            client.will_set(*self._will, qos=1)
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_subscribe = self._on_subscribe
        self._client = client
        try:
            client.connect("127.0.0.1", self._port, keepalive=60)
        except (ssl.SSLError, ConnectionError):
            return False
        client.loop_start()
        self._wait(lambda: self.connected or self._over)
        if self.connected:
            # A certificate that TLS 1.3 refuses, it refuses a moment after the handshake.
            self.subscribe("connected/and/heard")
        return self.connected

    def subscribe(self, *filters: str) -> None:
        """Subscribe at QoS 1 and wait for the broker's word, which says nothing about access."""
        assert self._client is not None
        for one in filters:
            _, mid = self._client.subscribe(one, qos=1)
            self._wait(lambda mid=mid: mid in self._subscribed or self._over)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Publish at QoS 1 and wait for the PUBACK, which says nothing about access."""
        assert self._client is not None
        self._client.publish(topic, payload, qos=1, retain=retain).wait_for_publish(PATIENCE_S)

    def wait_for(self, payload: bytes) -> list[Heard]:
        """Everything that was heard until this arrived."""
        self._wait(lambda: any(one.payload == payload for one in self.heard))
        return list(self.heard)

    def wait_for_disconnect(self) -> None:
        """Until the broker ended the connection."""
        self._wait(lambda: self._over)

    def die(self) -> None:
        """Break the connection off, so that the broker publishes the will."""
        assert self._client is not None
        sock = self._client.socket()
        assert sock is not None
        self._client.loop_stop()
        # Without a DISCONNECT, which is what makes the broker publish the will.
        sock.close()

    def close(self) -> None:
        """Leave; harmless when not connected."""
        client, self._client = self._client, None
        if client is not None:
            client.on_disconnect = None
            client.disconnect()
            client.loop_stop()
        self.connected = False

    def _wait(self, condition: object) -> None:
        assert callable(condition)
        deadline = time.monotonic() + PATIENCE_S
        with self._changed:
            while not condition():
                left_s = deadline - time.monotonic()
                assert left_s > 0, f"{self._client_id} waited in vain; it heard {self.heard[-5:]}"
                self._changed.wait(left_s)

    def _on_connect(self, *arguments: object) -> None:
        with self._changed:
            self.connected = not getattr(arguments[3], "is_failure", True)
            self._over = not self.connected
            self._changed.notify_all()

    def _on_disconnect(self, *_arguments: object) -> None:
        with self._changed:
            self.connected = False
            self._over = True
            self._changed.notify_all()
        # paho would try again for ever.
        if self._client is not None:
            self._client.disconnect()

    def _on_subscribe(self, _client: object, _data: object, mid: int, *_more: object) -> None:
        with self._changed:
            self._subscribed.add(mid)
            self._changed.notify_all()

    def _on_message(self, _client: object, _data: object, message: MQTTMessage) -> None:
        with self._changed:
            self.heard.append(Heard(message.topic, bytes(message.payload)))
            self._changed.notify_all()
