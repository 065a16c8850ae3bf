"""Topics are built and parsed in one module, and nowhere else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wire_protocol.errors import ProtocolError
from wire_protocol.topics import (
    Broadcast,
    Channel,
    DeviceTopic,
    FleetTopic,
    device_filters,
    parse_topic,
    server_filters,
)

NAMES = st.from_regex(r"[a-z0-9][a-z0-9-]{0,47}", fullmatch=True)
SOURCE = Path(__file__).parents[2]


@given(NAMES, NAMES, st.sampled_from(Channel))
def test_a_device_topic_is_read_back_as_it_was_written(
    fleet: str, device_id: str, channel: Channel
) -> None:
    topic = DeviceTopic(fleet, device_id, channel)
    assert parse_topic(str(topic)) == topic


@given(NAMES, st.sampled_from(Broadcast))
def test_a_fleet_topic_is_read_back_as_it_was_written(fleet: str, channel: Broadcast) -> None:
    topic = FleetTopic(fleet, channel)
    assert parse_topic(str(topic)) == topic


@given(st.text(max_size=300))
def test_any_other_text_is_a_protocol_error(text: str) -> None:
    try:
        topic = parse_topic(text)
    except ProtocolError:
        return
    assert str(topic) == text


@given(NAMES, NAMES, st.sampled_from(Channel))
def test_topics_stay_within_the_limits_of_every_broker(
    fleet: str, device_id: str, channel: Channel
) -> None:
    text = str(DeviceTopic(fleet, device_id, channel))
    assert text.count("/") <= 7
    assert len(text.encode()) <= 256


@pytest.mark.parametrize("name", ["", "Upper", "a/b", "+", "#", "-first", "x" * 49, "über"])
def test_a_name_that_could_change_the_topic_is_refused(name: str) -> None:
    with pytest.raises(ProtocolError):
        DeviceTopic("fleet", name, Channel.BIRTH)
    with pytest.raises(ProtocolError):
        device_filters("fleet", name)
    with pytest.raises(ProtocolError):
        server_filters(name)


def test_a_device_subscribes_to_itself_and_to_the_fleet_only() -> None:
    filters = device_filters("home", "pi-1")
    assert filters == ["legend/v1/home/d/pi-1/down/#", "legend/v1/home/all/#"]


def test_no_topic_literal_lives_outside_the_topics_module() -> None:
    literal = re.compile(r"legend/v\d|/d/\{|up/(state|birth|hb|evt|update|ack)|down/(cmd|ack)")
    offenders = [
        str(path.relative_to(SOURCE))
        for package in ("wire_protocol", "profiles", "edge_agent", "broker_server")
        for path in (SOURCE / package).rglob("*.py")
        if path.name != "topics.py" and literal.search(path.read_text(encoding="utf-8"))
    ]
    assert offenders == []
