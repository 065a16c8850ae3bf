"""What a stranger can invent without end must not be remembered without end."""

from __future__ import annotations

import random

from broker_server.fleet import MOST_UNMEASURABLE, Fleet
from broker_server.server import _kind_of
from tests.support.messages import a_birth
from wire_protocol.topics import Channel, DeviceTopic


def test_a_device_cannot_name_models_without_end() -> None:
    fleet = Fleet()
    fleet.born("pi", 1, a_birth(), 0.0)
    for number in range(10 * MOST_UNMEASURABLE):
        fleet.could_not_measure("pi", f"{number:064x}", "no")
    unmeasurable = fleet.devices["pi"].unmeasurable
    assert len(unmeasurable) <= MOST_UNMEASURABLE
    assert f"{10 * MOST_UNMEASURABLE - 1:064x}" in unmeasurable, "the newest is what counts"


def test_invented_topics_are_counted_together() -> None:
    rng = random.Random(1)
    invented = {f"legend/v1/lab/d/pi/up/{rng.getrandbits(40)}" for _ in range(1000)}
    assert {_kind_of(topic) for topic in invented} == {"unknown"}
    known = {_kind_of(str(DeviceTopic("lab", "pi", channel))) for channel in Channel}
    assert "unknown" not in known
    assert len(known) <= len(Channel)
