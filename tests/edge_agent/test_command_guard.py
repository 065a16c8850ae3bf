"""What a device believes: everything its own server says to it now, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_server.voice import MESSAGE_TTL_S, ServerVoice
from edge_agent.app import guard_of
from edge_agent.command_guard import CommandGuard
from edge_agent.settings import AgentSettings
from edge_agent.state_dir import StateDir
from wire_protocol.errors import DeviceError, FailureCode, ProtocolError
from wire_protocol.messages import Command, Rebirth, decode_message, encode_message
from wire_protocol.signed import ServerKeyStatement, Signer, sign_statement

OPERATOR = Signer(bytes([1]) * 32)
SERVER_SEED = bytes([2]) * 32
COMMAND = Command(command=Rebirth())
SID = 7


def voice(
    *,
    seed: bytes = SERVER_SEED,
    operator: Signer = OPERATOR,
    number: int = 1,
    start_number: int = 1,
    fleet: str = "home",
    vouched_seed: bytes | None = None,
) -> ServerVoice:
    key = Signer(vouched_seed or seed).public_key
    statement = ServerKeyStatement(fleet=fleet, server_key=key, number=number)
    return ServerVoice(Signer(seed, sign_statement(statement, operator)), start_number, 0.0)


def say(server: ServerVoice, *, now: float = 10.0, to: str = "nano-1", sid: int = SID) -> bytes:
    return server.say(COMMAND, message_id="m1", now=now, to=to, sid=sid)


def guard(**kwargs: object) -> CommandGuard:
    return CommandGuard("home", "nano-1", OPERATOR.public_key, **kwargs)  # type: ignore[arg-type]  # any keyword


def a_device(state_dir: Path) -> AgentSettings:
    return AgentSettings(
        server="http://127.0.0.1:1", fleet="home", device_id="nano-1", state_dir=state_dir
    )


def refused(device: CommandGuard, data: bytes, because: str, *, now: float = 10.0) -> None:
    with pytest.raises(ProtocolError, match=because):
        device.open(data, sid=SID, now=now)


def test_a_command_of_the_server_for_this_session_is_believed() -> None:
    text = guard().open(say(voice()), sid=SID, now=10.0)
    assert decode_message(Command, text)[1] == COMMAND


def test_a_command_for_every_device_is_believed_in_any_session() -> None:
    text = guard().open(voice().say(COMMAND, message_id="m1", now=1.0), sid=99, now=10.0)
    assert decode_message(Command, text)[1] == COMMAND


def test_an_unsigned_command_is_refused() -> None:
    refused(guard(), encode_message(COMMAND, message_id="m1", sid=SID), "not signed")


def test_a_command_with_one_changed_byte_is_refused() -> None:
    signed = json.loads(say(voice()))
    signed["text"] = signed["text"].replace("rebirth", "rebirtH")
    refused(guard(), json.dumps(signed).encode(), "signature is wrong")


def test_a_command_for_another_device_is_refused() -> None:
    refused(guard(), say(voice(), to="nano-2"), "for 'nano-2'")


def test_a_command_for_another_session_is_refused() -> None:
    refused(guard(), say(voice(), sid=SID - 1), "session 6")


def test_a_repeated_command_is_refused() -> None:
    device, command = guard(), say(voice())
    device.open(command, sid=SID, now=10.0)
    refused(device, command, "used before")


def test_a_command_of_an_earlier_server_start_is_refused_after_one_of_the_present() -> None:
    device, old = guard(), say(voice(start_number=3))
    device.open(say(voice(start_number=4)), sid=SID, now=10.0)
    refused(device, old, "used before|earlier start")


def test_a_command_that_was_held_back_is_refused_without_any_wall_clock() -> None:
    device, server = guard(), voice()
    held_back = say(server, now=10.0)
    device.open(say(server, now=20.0), sid=SID, now=1020.0)
    refused(device, held_back, "older than 60 s", now=1020.0 + MESSAGE_TTL_S)


def test_a_late_but_fresh_enough_command_is_believed() -> None:
    device, server = guard(), voice()
    slow = say(server, now=10.0)
    device.open(say(server, now=20.0), sid=SID, now=1020.0)
    device.open(slow, sid=SID, now=1010.0 + MESSAGE_TTL_S - 1.0)


@given(st.floats(-0.0004, 0.0004), st.integers(1, 400))
def test_clocks_that_drift_apart_never_make_fresh_commands_old(drift: float, days: int) -> None:
    device, server = guard(), voice()
    for day in range(0, days, 5):
        at_s = day * 86400.0
        device.open(say(server, now=at_s), sid=SID, now=5.0 + at_s * (1.0 + drift))


def test_a_key_that_the_operator_did_not_sign_is_refused() -> None:
    refused(guard(), say(voice(operator=Signer(bytes([9]) * 32))), "not signed by this fleet")


def test_a_key_beside_the_statement_of_another_is_refused() -> None:
    refused(guard(), say(voice(seed=bytes([5]) * 32, vouched_seed=SERVER_SEED)), "another key")


def test_the_server_of_another_fleet_is_refused() -> None:
    refused(guard(), say(voice(fleet="office")), "fleet 'office'")


def test_a_replaced_server_key_is_refused_once_the_new_one_was_heard() -> None:
    numbers: list[int] = []
    device = guard(key_number=1, on_new_key=numbers.append)
    old, new = voice(), voice(seed=bytes([3]) * 32, number=2, start_number=2)
    device.open(say(old), sid=SID, now=10.0)
    device.open(say(new), sid=SID, now=10.0)
    assert numbers == [2]
    refused(device, say(old), "replaced by a newer one")
    refused(guard(key_number=2), say(old), "replaced by a newer one")


def test_a_server_key_is_remembered_over_restarts_and_by_operator(tmp_path: Path) -> None:
    settings, state = a_device(tmp_path), StateDir(tmp_path)
    guard_of(settings, state, OPERATOR.public_key).open(say(voice(number=2)), sid=SID, now=10.0)
    refused(guard_of(settings, state, OPERATOR.public_key), say(voice()), "replaced by a newer one")
    other = Signer(bytes([9]) * 32)
    moved = guard_of(settings, state, other.public_key)
    moved.open(say(voice(operator=other)), sid=SID, now=10.0)


def test_a_new_server_key_is_believed_while_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, state = a_device(tmp_path), StateDir(tmp_path)

    def full(*_args: object, **_options: object) -> None:
        raise DeviceError(FailureCode.DISK_FULL, "no space left")

    monkeypatch.setattr("edge_agent.state_dir.write_durably", full)
    device = guard_of(settings, state, OPERATOR.public_key)
    device.open(say(voice(number=2)), sid=SID, now=10.0)
    refused(device, say(voice()), "replaced by a newer one")


def test_without_an_operator_key_signed_and_unsigned_commands_are_read() -> None:
    device = CommandGuard("home", "nano-1", None)
    for data in (say(voice()), encode_message(COMMAND, message_id="m1", sid=SID)):
        assert decode_message(Command, device.open(data, sid=SID, now=0.0))[1] == COMMAND


@given(st.binary(max_size=400))
def test_garbage_is_refused_and_nothing_else(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        guard().open(data, sid=SID, now=0.0)


@given(st.permutations(range(8)))
def test_reordered_commands_are_each_believed_once(order: list[int]) -> None:
    device, server = guard(), voice()
    commands = [say(server) for _ in range(8)]
    for index in order:
        device.open(commands[index], sid=SID, now=10.0)
    for command in commands:
        refused(device, command, "used before")
