from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from rich.console import Console

from broker_server.watch import EXIT_CODES, Pace, describe_changes, render_run, watch_run
from tests.support.run_json import live_json, member_json, round_json, run_json
from wire_protocol.errors import ServerUnavailable

HASTE = Pace(poll_s=1.0, patience_s=3.0, sleep=lambda _seconds: None)


def plain_text(run: dict[str, Any], width: int = 80) -> str:
    console = Console(record=True, width=width, file=io.StringIO(), color_system=None)
    console.print(render_run(run))
    text = console.export_text()
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines())


def fetching(*answers: dict[str, Any] | Exception) -> Callable[[], dict[str, Any]]:
    remaining: Iterator[dict[str, Any] | Exception] = iter(answers)

    def fetch() -> dict[str, Any]:
        answer = next(remaining)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return fetch


GOLDEN = """\
triage  run-1  legend  running  round 2/2
accuracy 50.0 %  ▂▅  before training 12.5 %

device  state     depth  ranks    step           loss  completion  waiting
pi5     training      4  4 4 8 8  █░░░░░ 3/10   1.500     6.2 s …        -
nano    updated       4  4 4 8 8  ██████ 10/10  0.750      20.5 s    1.2 s
roof    failed        -  -        -                 -           -        -
roof: out of memory

round 1: accuracy 50.0 %, 15.0 s, mean waiting 3.0 s, up 120.0 kB, down 2.4 MB
"""


def test_a_run_in_its_second_round_looks_like_this() -> None:
    run = run_json(
        round_number=2,
        accuracy_before=0.125,
        rounds=[round_json(1, member_json("pi5"), accuracy=0.5)],
        live=[
            live_json("pi5"),
            live_json(
                "nano",
                board="jetson-nano",
                state="updated",
                step=10,
                completion_s=20.5,
                waiting_s=1.25,
                loss=0.75,
            ),
            live_json(
                "roof",
                board="jetson-nano",
                state="failed",
                depth=0,
                ranks=[],
                step=0,
                steps=0,
                loss=None,
                detail="out of memory",
            ),
        ],
    )
    assert plain_text(run) + "\n" == GOLDEN


def test_a_queued_run_without_devices_is_two_words() -> None:
    run = run_json(status="queued", round_number=0, accuracy_before=None)
    assert plain_text(run) == "triage  run-1  legend  queued  round 0/2"


def test_control_codes_from_a_device_do_not_reach_the_terminal() -> None:
    run = run_json(live=[live_json("pi5", state="failed", detail="bad\x1b[2J\nline")])
    assert "\x1b" not in plain_text(run)
    ended = run_json(
        round_number=2, rounds=[round_json(1, member_json("a", status="failed", detail="\x1b[1m"))]
    )
    assert not any("\x1b" in line for line in describe_changes(None, ended))


def test_the_first_look_says_what_the_run_is() -> None:
    lines = describe_changes(None, run_json(status="queued", round_number=0, accuracy_before=None))
    assert lines == ["run run-1 triage: legend, 2 rounds, queued"]


def test_a_started_round_is_said_once_with_its_depths() -> None:
    queued = run_json(status="queued", round_number=0, accuracy_before=None)
    started = run_json(live=[live_json("pi5"), live_json("nano", depth=2)])

    assert describe_changes(queued, started) == [
        "run run-1 started",
        "accuracy before training 12.5 %",
        "round 1 started: pi5 depth 4, nano depth 2",
    ]
    assert describe_changes(started, started) == []


def test_a_finished_device_is_said_once_even_when_the_round_result_repeats_it() -> None:
    training = run_json(live=[live_json("pi5"), live_json("nano")])
    one_done = run_json(
        live=[live_json("pi5", state="updated", completion_s=9.0, loss=0.5), live_json("nano")]
    )
    next_round = run_json(
        round_number=2,
        live=[live_json("pi5"), live_json("nano")],
        rounds=[
            round_json(
                1,
                member_json("pi5", completion_s=9.0, loss=0.5),
                member_json("nano", status="straggler", completion_s=None, detail="too late"),
            )
        ],
    )

    assert describe_changes(training, one_done) == [
        "round 1: pi5 finished in 9.0 s, depth 4, loss 0.500"
    ]
    assert describe_changes(one_done, next_round) == [
        "round 1: nano straggler: too late",
        "round 1: accuracy 50.0 %, 15.0 s, mean waiting 3.0 s, up 120.0 kB, down 2.4 MB",
        "round 2 started: pi5 depth 4, nano depth 4",
    ]


def test_who_stays_out_and_why_nothing_happens_are_said_once() -> None:
    idle = live_json("roof", state="idle", depth=0, ranks=[], detail="has no dataset 'x'")
    waiting = run_json(rounds=[], live=[idle], reason="waits: no device can take part")
    lines = describe_changes(run_json(rounds=[], live=[]), waiting)
    assert "roof stays out: has no dataset 'x'" in lines
    assert "waits: no device can take part" in lines
    assert describe_changes(waiting, waiting) == []


def test_a_device_that_is_lost_is_said() -> None:
    before = run_json(live=[live_json("pi5")])
    assert "pi5 was lost" in describe_changes(
        before, run_json(live=[live_json("pi5", state="lost")])
    )


def test_a_round_is_said_to_have_started_only_when_its_devices_are_known() -> None:
    idle = live_json("pi5", state="idle", depth=0, ranks=[])
    waiting = run_json(live=[idle])

    assert describe_changes(run_json(), waiting) == []
    assert describe_changes(waiting, run_json(live=[live_json("pi5")])) == [
        "round 1 started: pi5 depth 4"
    ]


def test_rounds_that_passed_between_two_looks_are_all_said() -> None:
    rounds = [round_json(number, member_json("pi5")) for number in (1, 2)]
    lines = describe_changes(
        run_json(status="queued", round_number=0),
        run_json(status="finished", round_number=2, rounds=rounds),
    )
    assert [line for line in lines if "started" in line] == [
        "round 1 started: pi5 depth 4",
        "round 2 started: pi5 depth 4",
    ]
    assert lines[-1] == "run run-1 finished, accuracy 50.0 %"


def test_a_pipe_gets_plain_lines_until_the_run_ends() -> None:
    output = io.StringIO()
    end = run_json(status="failed", reason="no device can take part")

    run = watch_run(fetching(run_json(), run_json(), end), Console(file=output), pace=HASTE)

    assert run["status"] == "failed"
    assert "\x1b" not in output.getvalue()
    assert output.getvalue().splitlines() == [
        "run run-1 triage: legend, 2 rounds, running",
        "accuracy before training 12.5 %",
        "run run-1 failed: no device can take part, accuracy 12.5 %",
    ]


def test_a_terminal_gets_the_table() -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=100)
    live = [live_json("pi5")]

    watch_run(fetching(run_json(live=live), run_json(status="finished")), console, pace=HASTE)

    assert "\x1b[" in output.getvalue()
    assert "3/10" in output.getvalue()


def test_a_server_that_restarts_is_waited_for() -> None:
    away = ServerUnavailable("away")
    answers = fetching(run_json(), away, away, run_json(status="finished"))
    assert watch_run(answers, Console(file=io.StringIO()), pace=HASTE)["status"] == "finished"


def test_a_server_that_stays_away_ends_the_watching() -> None:
    answers = fetching(run_json(), *[ServerUnavailable("away")] * 5)
    with pytest.raises(ServerUnavailable):
        watch_run(answers, Console(file=io.StringIO()), pace=HASTE)


def test_every_end_of_a_run_has_an_exit_code_of_its_own() -> None:
    assert EXIT_CODES == {"finished": 0, "failed": 1, "cancelled": 2}
