"""The agent put together: the only module that knows every part."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sys

import anyio
import structlog

from edge_agent.agent import Agent
from edge_agent.blobs import BlobClient
from edge_agent.capability import Device, this_device
from edge_agent.certificate_keeper import CertificateKeeper
from edge_agent.command_guard import CommandGuard
from edge_agent.emulation import emulation_of
from edge_agent.identity import Identity, identity_of, tls_of
from edge_agent.join import Joined, find_broker
from edge_agent.link import ShapedLink
from edge_agent.metrics import AgentCounters, serve_metrics
from edge_agent.mqtt import DeviceLink
from edge_agent.notify import Notifier
from edge_agent.policy_watch import PolicyWatch
from edge_agent.renewal import Renewal
from edge_agent.round_work import Workshop
from edge_agent.settings import AgentSettings
from edge_agent.state_dir import StateDir
from edge_agent.status_file import StatusFile
from edge_agent.trainer import Trainer
from wire_protocol.errors import ConfigError, DeviceError, LegendError, Refused
from wire_protocol.topics import Channel, DeviceTopic

log = structlog.get_logger()

LOOK_AGAIN_S = 10.0
"""Longest pause before a broker that refused us is looked up again."""


async def run_agent(settings: AgentSettings) -> None:
    """Run one agent until SIGTERM or SIGINT.

    Raises:
        AlreadyRunning: another agent holds the state directory.
        ConfigError, Refused: the settings are wrong, or the server says no.
    """
    emulation = emulation_of(settings.emulate) if settings.emulate else None
    device = this_device(settings, emulation)
    identity = identity_of(settings)
    if identity is None and settings.token is None and settings.server.startswith("https://"):
        raise ConfigError(
            f"this device is not enrolled at {settings.server}: run edge-agent enroll --url "
            f"{settings.server} --token TOKEN, with a token of broker-server pki token"
        )
    state = StateDir(settings.state_dir)
    with state.locked():
        notifier = Notifier(os.environ)
        failure: LegendError | None = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_stop_on_signal, tasks.cancel_scope, name="signals")
            try:
                await _serve(device, state, notifier, identity)
            except LegendError as error:
                # Raised here it would leave the group wrapped, and not as one line.
                failure = error
                tasks.cancel_scope.cancel()
        if failure is not None:
            raise failure


async def _serve(
    device: Device, state: StateDir, notifier: Notifier, identity: Identity | None
) -> None:
    settings, tls = device.settings, tls_of(identity)
    rng = random.Random()  # noqa: S311 - jitter, not secrets
    keeper = CertificateKeeper(Renewal(identity, rng)) if identity else None
    counters = AgentCounters()
    shape = device.emulation.link if device.emulation else None
    trainer = Trainer(
        settings.trainer_python or sys.executable,
        log_file=state.root / "trainer.log",
        threads=settings.threads,
    )
    async with (
        BlobClient(settings.server, token=settings.token, tls=tls) as provisioning,
        BlobClient(settings.server, token=settings.token, link=ShapedLink(shape), tls=tls) as blobs,
    ):
        workshop = Workshop(device, state, blobs, provisioning, trainer, PolicyWatch(device, state))
        await anyio.to_thread.run_sync(workshop.watch.look)
        # Ready means that the agent runs: a device may boot long before its server.
        notifier.ready("looking for the server")
        try:
            with serve_metrics(settings, counters):
                while True:
                    joined = await find_broker(settings, provisioning, rng, identity)
                    if keeper:
                        keeper.heard(joined.certificate_left_s)
                    await _stay_connected(workshop, joined, notifier, rng, keeper, counters)
                    await anyio.sleep(rng.uniform(0, LOOK_AGAIN_S))
        finally:
            notifier.stopping("stopping")
            with anyio.CancelScope(shield=True):
                await trainer.close()


async def _stay_connected(
    workshop: Workshop,
    joined: Joined,
    notifier: Notifier,
    rng: random.Random,
    keeper: CertificateKeeper | None,
    counters: AgentCounters,
) -> None:
    """Serve over one broker; returns when it should be looked for again."""
    settings, state = workshop.device.settings, workshop.state
    topic = DeviceTopic(settings.fleet, settings.device_id, Channel.STATE)
    link = DeviceLink(joined.broker, topic, next_sid=state.counter("sid").increment)

    refusals: list[Refused] = []

    def give_up(refusal: Refused | None) -> None:
        if refusal is not None:
            refusals.append(refusal)
            tasks.cancel_scope.cancel()
        # A broker named in the settings is the only one there is: keep trying it.
        elif settings.broker is None:
            log.warning("broker_looked_for_again")
            tasks.cancel_scope.cancel()

    async with link, anyio.create_task_group() as tasks:
        agent = Agent(
            workshop,
            link,
            on_hopeless=give_up,
            status=StatusFile(state.root),
            notifier=notifier,
            rng=rng,
            guard=guard_of(settings, state, joined.operator_key),
            sign=keeper.sign if keeper else bytes,
            on_certificate=keeper.take if keeper else None,
            counters=counters,
        )
        if keeper:
            tasks.start_soon(keeper.ask_in_time, link, topic, name="certificate")
        await agent.run(tasks)
    if refusals:
        raise refusals[0]


def guard_of(settings: AgentSettings, state: StateDir, operator_key: str | None) -> CommandGuard:
    """Believes this operator's newest server key, over restarts too.

    Numbers are an operator's own: a device that moves to another fleet starts anew.
    """
    name = hashlib.sha256((operator_key or "").encode()).hexdigest()[:16]
    newest = state.counter(f"server_key-{name}")

    def remember(number: int) -> None:
        try:
            newest.raise_to(number)
        except DeviceError as error:
            # It counts until the next connection, and is heard again then.
            log.error("server_key_not_remembered", error=str(error))

    return CommandGuard(
        settings.fleet,
        settings.device_id,
        operator_key,
        key_number=newest.value,
        on_new_key=remember,
    )


async def _stop_on_signal(scope: anyio.CancelScope) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for received in signals:
            log.info("agent_stopping", signal=received.name)
            scope.cancel()
            return
