"""The MQTT contract, over every broker that the server can run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion

from broker_server.broker_address import BrokerAddress
from broker_server.mqtt import BrokerConnected, BrokerLost
from edge_agent.mqtt import BrokerLogin, Connected, CredentialsRefused, Disconnected, Received
from tests.support.brokers import (
    FLEET,
    Kind,
    RunningBroker,
    device_link,
    next_message,
    next_of,
    running_broker,
    server_link,
    settled,
    topic,
)
from tests.support.ports import free_port
from wire_protocol.errors import ProtocolError
from wire_protocol.messages import MAX_WIRE_BYTES, State, decode_message
from wire_protocol.topics import Broadcast, Channel, FleetTopic

pytestmark = [pytest.mark.integration, pytest.mark.anyio]

HOLDS_A_LINK = """
import sys
from pathlib import Path
import anyio
from edge_agent.mqtt import BrokerLogin, Connected
from tests.support.brokers import device_link, next_of

async def main() -> None:
    host, port, user, password, folder = sys.argv[1:]
    login = BrokerLogin(host, int(port), user, password)
    async with device_link(login, "doomed", Path(folder)) as link:
        await next_of(link, Connected)
        print("connected", flush=True)
        await anyio.sleep_forever()

anyio.run(main)
"""


@pytest.fixture(params=["embedded", "mosquitto"])
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RunningBroker]:
    kind: Kind = request.param
    with running_broker(kind, tmp_path / "server") as running:
        yield running


async def test_messages_pass_in_both_directions(broker: RunningBroker, tmp_path: Path) -> None:
    async with (
        server_link(broker.address) as server,
        device_link(broker.login, "nano-1", tmp_path) as device,
    ):
        await next_of(device, Connected)
        # A broker drops what nobody has subscribed to yet; devices speak once the server is there.
        await settled(server, BrokerConnected)
        birth = topic("nano-1", Channel.BIRTH)
        assert device.publish(birth, b"hello")
        message = await next_message(server, lambda message: message.topic == birth)
        message.acknowledge()
        assert message.payload == b"hello"

        command = topic("nano-1", Channel.COMMAND)
        assert server.publish(command, b"do this")
        while (received := await next_of(device, Received)).topic != command:
            pass
        assert received.payload == b"do this"


async def test_a_command_for_another_device_is_not_heard(
    broker: RunningBroker, tmp_path: Path
) -> None:
    async with (
        server_link(broker.address) as server,
        device_link(broker.login, "nano-1", tmp_path) as device,
    ):
        await next_of(device, Connected)
        await next_message(server, lambda message: message.topic.endswith("nano-1/up/state"))
        server.publish(topic("nano-2", Channel.COMMAND), b"not for you")
        server.publish(topic("nano-1", Channel.COMMAND), b"for you")
        while (received := await next_of(device, Received)).payload != b"for you":
            assert received.payload != b"not for you"


async def test_mosquitto_lets_no_device_speak_or_listen_for_another(tmp_path: Path) -> None:
    secret = topic("nano-2", Channel.COMMAND)
    with running_broker("mosquitto", tmp_path / "server") as broker:
        async with (
            server_link(broker.address) as server,
            device_link(broker.login, "nano-1", tmp_path) as device,
        ):
            await next_of(device, Connected)
            eavesdropper = Client(CallbackAPIVersion.VERSION2, client_id="nano-3")
            heard: list[str] = []
            eavesdropper.on_message = lambda _client, _data, message: heard.append(message.topic)
            eavesdropper.username_pw_set(broker.login.username, broker.login.password)
            eavesdropper.connect(broker.login.host, broker.login.port)
            eavesdropper.subscribe("#", qos=1)
            while eavesdropper.loop(timeout=0.2) == 0 and not heard:
                pass  # the retained state of the server is for everybody
            server.publish(secret, b"for nano-2 alone")
            device.publish(topic("nano-2", Channel.EVENT), b"forged")
            device.publish(topic("nano-1", Channel.EVENT), b"true")
            message = await next_message(server, lambda message: "/up/evt" in message.topic)
            assert message.payload == b"true"
            server.publish(str(FleetTopic(FLEET, Broadcast.COMMAND)), b"the end")
            while not heard[-1].endswith("all/cmd"):
                eavesdropper.loop(timeout=0.2)
            assert secret not in heard
            eavesdropper.disconnect()


async def test_devices_hear_whether_the_server_is_there(
    broker: RunningBroker, tmp_path: Path
) -> None:
    state_topic = str(FleetTopic(FLEET, Broadcast.SERVER_STATE))

    async def heard(*, online: bool) -> int:
        # The retained message and the live one may both arrive: QoS 1 is at least once.
        while True:
            received = await next_of(device, Received)
            if received.topic == state_topic:
                envelope, state = decode_message(State, received.payload)
                if state.online is online:
                    return envelope.sid

    async with device_link(broker.login, "nano-1", tmp_path) as device:
        await next_of(device, Connected)
        async with server_link(broker.address, start_number=12):
            assert await heard(online=True) == 12
        assert await heard(online=False) == 12


async def test_a_device_that_is_killed_leaves_its_last_will_with_its_session_number(
    broker: RunningBroker, tmp_path: Path
) -> None:
    login = broker.login
    arguments = [login.host, str(login.port), login.username, login.password, str(tmp_path)]

    async def state_after(kill: bool) -> tuple[int, bool]:
        message = await next_message(
            server,
            lambda message: (
                message.topic == topic("doomed", Channel.STATE)
                and decode_message(State, message.payload)[1].online is not kill
            ),
        )
        message.acknowledge()
        envelope, state = decode_message(State, message.payload)
        return envelope.sid, state.online

    async with server_link(broker.address) as server:
        for sid in (1, 2):
            with subprocess.Popen(  # noqa: ASYNC220 - starting takes no time
                [sys.executable, "-c", HOLDS_A_LINK, *arguments], stdout=subprocess.PIPE
            ) as device:
                assert device.stdout is not None
                await anyio.to_thread.run_sync(device.stdout.readline)
                assert await state_after(kill=False) == (sid, True)
                device.kill()
            assert await state_after(kill=True) == (sid, False)


async def test_a_device_that_leaves_says_goodbye_itself(
    broker: RunningBroker, tmp_path: Path
) -> None:
    async with server_link(broker.address) as server:
        async with device_link(broker.login, "nano-1", tmp_path) as device:
            connected = await next_of(device, Connected)
        states: list[State] = []
        while not states or states[-1].online:
            message = await next_message(server, lambda m: m.topic.endswith("up/state"))
            message.acknowledge()
            envelope, state = decode_message(State, message.payload)
            assert envelope.sid == connected.sid
            states.append(state)
    assert not device.alive
    assert not device.publish(topic("nano-1", Channel.EVENT), b"too late")


async def test_both_sides_come_back_after_the_broker_was_killed(
    broker: RunningBroker, tmp_path: Path
) -> None:
    async with (
        server_link(broker.address) as server,
        device_link(broker.login, "nano-1", tmp_path) as device,
    ):
        first = await next_of(device, Connected)
        await settled(server, BrokerConnected)
        assert broker.launcher.pid is not None
        os.kill(broker.launcher.pid, signal.SIGKILL)
        lost = await next_of(device, Disconnected)
        assert lost.reason
        assert not device.publish(topic("nano-1", Channel.EVENT), b"nobody hears this")
        await settled(server, BrokerLost)
        again = await anyio.to_thread.run_sync(broker.launcher.start)
        assert again == broker.address
        second = await next_of(device, Connected)
        assert second.sid > first.sid
        await settled(server, BrokerConnected)
        device.publish(topic("nano-1", Channel.EVENT), b"back")
        message = await next_message(server, lambda message: message.payload == b"back")
        message.acknowledge()
        server.publish(topic("nano-1", Channel.COMMAND), b"welcome")
        while (await next_of(device, Received)).payload != b"welcome":
            pass


async def test_what_the_server_did_not_acknowledge_comes_again(
    broker: RunningBroker, tmp_path: Path
) -> None:
    event = topic("nano-1", Channel.EVENT)

    def is_event(message: object) -> bool:
        return getattr(message, "topic", "") == event

    async with device_link(broker.login, "nano-1", tmp_path) as device:
        async with server_link(broker.address) as server:
            state = await next_message(server, lambda message: message.topic.endswith("up/state"))
            state.acknowledge()
            await next_of(device, Connected)
            for number in range(5):
                assert device.publish(event, str(number).encode())
            for number in range(5):
                message = await next_message(server, is_event)
                assert message.payload == str(number).encode()
                if number < 2:
                    message.acknowledge()
        async with server_link(broker.address) as server:
            again = {(await next_message(server, is_event)).payload for _ in range(3)}
    assert again == {b"2", b"3", b"4"}


async def test_messages_may_be_acknowledged_in_any_order(
    broker: RunningBroker, tmp_path: Path
) -> None:
    event = topic("nano-1", Channel.EVENT)
    async with device_link(broker.login, "nano-1", tmp_path) as device:
        async with server_link(broker.address) as server:
            held = [await next_message(server, lambda message: message.topic.endswith("up/state"))]
            await next_of(device, Connected)
            for number in range(10):
                device.publish(event, str(number).encode())
                held.append(await next_message(server, lambda message: message.topic == event))
            for message in reversed(held):
                message.acknowledge()
            device.publish(event, b"and on")
            last = await next_message(server, lambda message: message.topic == event)
            last.acknowledge()
            assert last.payload == b"and on"
        async with server_link(broker.address) as server:
            device.publish(event, b"news")
            message = await next_message(server, lambda message: message.topic == event)
            assert message.payload == b"news"


async def test_an_acknowledgement_from_before_a_loss_does_not_touch_the_new_connection(
    broker: RunningBroker, tmp_path: Path
) -> None:
    event = topic("nano-1", Channel.EVENT)
    async with (
        server_link(broker.address) as server,
        device_link(broker.login, "nano-1", tmp_path) as device,
    ):
        await next_of(device, Connected)
        await next_message(server, lambda message: message.topic.endswith("up/state"))
        device.publish(event, b"one")
        held = await next_message(server, lambda message: message.topic == event)
        assert broker.launcher.pid is not None
        os.kill(broker.launcher.pid, signal.SIGKILL)
        await next_of(device, Disconnected)
        await anyio.to_thread.run_sync(broker.launcher.start)
        await next_of(device, Connected)
        with anyio.fail_after(20):
            while not server.connected:
                await server.receive()
        held.acknowledge()

        async def say_two() -> None:
            # The new broker drops what comes before the server's subscription, as outboxes know.
            while True:
                device.publish(event, b"two")
                await anyio.sleep(0.2)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(say_two)
            message = await next_message(server, lambda message: message.payload == b"two")
            tasks.cancel_scope.cancel()
        message.acknowledge()
        assert server.connected


async def test_a_flood_waits_instead_of_filling_the_memory(
    broker: RunningBroker, tmp_path: Path
) -> None:
    async with (
        server_link(broker.address) as server,
        device_link(broker.login, "nano-1", tmp_path, queue_size=2) as device,
    ):
        await next_of(device, Connected)
        await next_message(server, lambda message: message.topic.endswith("up/state"))
        command = topic("nano-1", Channel.COMMAND)
        for number in range(50):
            assert server.publish(command, str(number).encode())
        numbers: list[int] = []
        while len(numbers) < 50:
            received = await next_of(device, Received)
            if received.topic == command:
                numbers.append(int(received.payload))
    assert numbers == list(range(50))


async def test_a_full_queue_does_not_delay_the_stop(broker: RunningBroker, tmp_path: Path) -> None:
    async with (
        server_link(broker.address) as server,
        device_link(broker.login, "nano-1", tmp_path, queue_size=1) as device,
    ):
        await next_of(device, Connected)
        await next_message(server, lambda message: message.topic.endswith("up/state"))
        for number in range(20):
            server.publish(topic("nano-1", Channel.COMMAND), str(number).encode())
        await next_of(device, Received)
    assert not device.alive


async def test_a_message_that_is_too_large_is_refused_and_the_link_lives_on(
    broker: RunningBroker, tmp_path: Path
) -> None:
    async with (
        server_link(broker.address) as server,
        device_link(broker.login, "nano-1", tmp_path) as device,
    ):
        await next_of(device, Connected)
        await next_message(server, lambda message: message.topic.endswith("up/state"))
        with pytest.raises(ProtocolError, match="exceeds"):
            device.publish(topic("nano-1", Channel.EVENT), b"x" * (MAX_WIRE_BYTES + 1))
        with pytest.raises(ProtocolError, match="exceeds"):
            server.publish(topic("nano-1", Channel.COMMAND), b"x" * (MAX_WIRE_BYTES + 1))
        largest = b"x" * MAX_WIRE_BYTES
        device.publish(topic("nano-1", Channel.EVENT), largest)
        message = await next_message(server, lambda message: message.payload == largest)
        message.acknowledge()


async def test_a_wrong_password_is_counted_and_reported(
    broker: RunningBroker, tmp_path: Path
) -> None:
    login = BrokerLogin(broker.login.host, broker.login.port, broker.login.username, "wrong")
    async with device_link(login, "nano-1", tmp_path) as device:
        first = await next_of(device, CredentialsRefused)
        second = await next_of(device, CredentialsRefused)
        assert not device.connected
    assert (first.times, second.times) == (1, 2)
    assert "wrong" not in repr(login)


async def test_a_broker_that_is_not_there_is_reported_and_found_later(tmp_path: Path) -> None:
    nowhere = BrokerLogin("127.0.0.1", free_port())
    async with device_link(nowhere, "nano-1", tmp_path) as device:
        lost = await next_of(device, Disconnected)
        assert "refused" in lost.reason.lower()
        assert not device.publish(topic("nano-1", Channel.EVENT), b"x")
    async with server_link(BrokerAddress("127.0.0.1", free_port())) as server:
        event = await server.receive()
        assert isinstance(event, BrokerLost)


async def test_a_garbled_topic_does_not_end_the_link(broker: RunningBroker, tmp_path: Path) -> None:
    async with (
        server_link(broker.address) as server,
        device_link(broker.login, "nano-1", tmp_path) as device,
    ):
        await next_of(device, Connected)
        await next_message(server, lambda message: message.topic.endswith("up/state"))
        server.publish(topic("nano-1", Channel.COMMAND) + "/deeper/than-known", b"\xff\x00")
        server.publish(topic("nano-1", Channel.COMMAND), b"after")
        while (await next_of(device, Received)).payload != b"after":
            pass
        assert device.alive
