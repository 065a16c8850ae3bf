"""An update that arrives while the server, started again, is still taking up its run."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import anyio
import pytest

from broker_server.blobs import BlobStore
from broker_server.coordinator import Coordinator
from broker_server.delivery import RunContext
from broker_server.evaluator import Evaluator
from broker_server.mqtt import Incoming, ServerLink
from broker_server.run_events import RunStarted
from broker_server.run_loop import RunLoop
from broker_server.run_state import RunCheckpoint, RunPlan
from broker_server.server import Server
from broker_server.strategies import strategy_named
from tests.support.capacities import SIX_LAYERS
from tests.support.in_process_server import server_in
from tests.support.messages import a_birth, a_manifest, a_recipe
from wire_protocol.messages import Ack, encode_message
from wire_protocol.model_family import ModelShape
from wire_protocol.parts import BlobRef
from wire_protocol.topics import Channel, DeviceTopic

SHA = "a" * 64
RUN = "run-1"


class Link:
    """Brings a birth and an update."""

    def publish(self, *_args: object) -> None:
        """Nobody listens."""

    async def incoming(self) -> AsyncIterator[Incoming]:
        said = ((Channel.BIRTH, a_birth()), (Channel.UPDATE, a_manifest(run_id=RUN)))
        for channel, body in said:
            payload = encode_message(body, message_id=channel.name, sid=1)
            yield Incoming(str(DeviceTopic("home", "pi", channel)), payload, False, lambda: None)


async def nothing(_run_id: str) -> None:
    """No results to write."""


def loaded_run(server: Server) -> RunLoop:
    """A run whose last checkpoint was read, and whose loop has not begun."""
    plan = RunPlan(RUN, rounds=1, shape=SIX_LAYERS, recipe=a_recipe(), model_digest=SHA)
    start = RunCheckpoint(
        round_number=1,
        attempt=0,
        adapter=BlobRef(sha256=SHA, size_bytes=1),
        baseline_done=True,
        tokens_per_step=1.0,
    )
    context = RunContext(RUN, "run", Path(), "tiny", cast("ModelShape", None), (), SHA)
    return RunLoop(
        context,
        Coordinator(plan, strategy_named("legend", {}), start),
        server.store,
        BlobStore(server.state.blobs),
        Evaluator(),
        folder=server.state.runs / RUN,
        post=server,
        on_report=lambda *_: None,
        on_commit=nothing,
    )


@pytest.mark.parametrize(("begun", "status"), [(False, "busy"), (True, "rejected")])
def test_it_is_to_be_sent_again_until_the_round_is_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bool, status: str
) -> None:
    answers: list[Ack] = []
    with server_in(tmp_path) as server:
        server.store.create_run(RUN, "{}")
        server.store.set_status(RUN, "running")
        loop = server.runs.active = loaded_run(server)
        if begun:
            loop.coordinator.handle(RunStarted(), 0.0)
        monkeypatch.setattr(server, "ack", lambda _device, ack: answers.append(ack))
        server.link = cast("ServerLink", Link())
        anyio.run(server.pump)
    assert [ack.status for ack in answers if ack.re == Channel.UPDATE.name] == [status]
