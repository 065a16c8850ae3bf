"""What waits in the outbox is signed when it goes out, by whoever the device is then."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from edge_agent.agent import Agent
from edge_agent.command_guard import CommandGuard
from edge_agent.mqtt import DeviceLink
from edge_agent.notify import Notifier
from edge_agent.outbox import OutgoingMessage
from edge_agent.round_work import Workshop
from edge_agent.settings import AgentSettings
from edge_agent.state_dir import StateDir
from edge_agent.status_file import StatusFile
from wire_protocol.signed import Signer, read_signed


class Link:
    """A connection that takes everything."""

    connected = True
    sid = 1

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def publish(self, _topic: str, payload: bytes, **_options: Any) -> bool:
        self.sent.append(payload)
        return True


def an_agent(state_dir: Path, link: Link, signer: Signer) -> Agent:
    settings = AgentSettings(
        server="http://127.0.0.1:1", fleet="home", device_id="nano-1", state_dir=state_dir
    )
    workshop = SimpleNamespace(device=SimpleNamespace(settings=settings), state=StateDir(state_dir))
    return Agent(
        cast("Workshop", workshop),
        cast("DeviceLink", link),
        on_hopeless=lambda _refusal: None,
        status=StatusFile(state_dir),
        notifier=Notifier({}),
        rng=random.Random(1),
        guard=CommandGuard("home", "nano-1", None),
        sign=signer.sign,
    )


def test_an_update_of_before_a_new_enrolment_carries_the_new_certificate(tmp_path: Path) -> None:
    old, new = Signer(bytes([1]) * 32, "revoked"), Signer(bytes([2]) * 32, "newest")
    link = Link()
    before = an_agent(tmp_path, link, old)
    before.outbox.add(OutgoingMessage("update-a", "a/topic", b"the manifest"), now=0.0)
    before._publish_outbox()  # what the loop does after each event
    an_agent(tmp_path, link, new)._publish_outbox()
    opened = [read_signed(payload) for payload in link.sent]
    assert [one.text for one in opened] == ["the manifest"] * 2
    assert [one.voucher for one in opened] == ["revoked", "newest"]
