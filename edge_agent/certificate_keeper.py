"""Keeps this device's certificate from running out, beside everything else that the agent does.

The question goes over MQTT, signed like everything that a device says; so does the answer. Neither
is in the outbox: what is lost is asked for again within the hour, and a month is left.
"""

from __future__ import annotations

import time
import uuid

import anyio
import structlog

from edge_agent.mqtt import DeviceLink
from edge_agent.renewal import Renewal
from wire_protocol.errors import DeviceError
from wire_protocol.messages import CertificateRequest, encode_message
from wire_protocol.topics import Channel, DeviceTopic

log = structlog.get_logger()

CHECK_S = 10.0


class CertificateKeeper:
    """Asks for the next certificate in time, and takes it in.

    Args:
        renewal: knows when.
    """

    def __init__(self, renewal: Renewal) -> None:
        self._renewal = renewal

    def sign(self, data: bytes) -> bytes:
        """Sign a message as this device, with the newest certificate."""
        return self._renewal.identity.sign(data)

    def heard(self, left_s: float | None) -> None:
        """The server said for how long our certificate is good; None: it did not."""
        if left_s is not None:
            self._renewal.heard(left_s, time.monotonic())

    async def ask_in_time(self, link: DeviceLink, topic: DeviceTopic) -> None:
        """Ask whenever it is time, until cancelled.

        Args:
            link: the connection to the broker.
            topic: any topic of this device; names the fleet and the device.
        """
        channel = str(DeviceTopic(topic.fleet, topic.device_id, Channel.CERTIFICATE_REQUEST))
        while True:
            if link.connected:
                request = self._renewal.request(time.time(), time.monotonic())
                if request is not None:
                    log.info("certificate_asked_for")
                    payload = encode_message(
                        CertificateRequest(csr_pem=request),
                        message_id=uuid.uuid4().hex,
                        sid=link.sid,
                    )
                    link.publish(channel, self.sign(payload))
            await anyio.sleep(CHECK_S)

    def take(self, pem: str) -> None:
        """Use this certificate from the next connection on.

        Raises:
            ProtocolError: it is not a newer one of this device, this key and this fleet.
        """
        before = self._renewal.identity.certificate
        try:
            self._renewal.install(pem)
        except DeviceError as error:
            # The old one is good for weeks, and it is asked for again.
            log.error("certificate_not_kept", error=str(error))
            return
        if self._renewal.identity.certificate.serial != before.serial:
            log.info("certificate_renewed")
