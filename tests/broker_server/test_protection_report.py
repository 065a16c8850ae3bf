"""What people see of defences and of privacy: the folder, the tables, the plain lines."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from broker_server.privacy import epsilon_after
from broker_server.round_summary import summarise
from broker_server.run_events import AdapterEvaluated, RoundAggregated
from broker_server.run_folder import metrics_lines, summary
from broker_server.run_setup import check_run, recipe_of, strategy_of
from broker_server.run_spec import PrivacySettings, RunSpec
from broker_server.run_state import Member, MemberCheckpoint
from broker_server.strategies.defence import Finding
from broker_server.tables import run_heading, runs_table
from broker_server.watch import describe_changes
from tests.support.run_json import run_json
from tests.support.run_reports import report
from wire_protocol.errors import ConfigError
from wire_protocol.model_family import ModelShape
from wire_protocol.parts import BlobRef

PRIVATE = PrivacySettings(clip_norm=0.5, noise_multiplier=2.0)
ADAPTER = BlobRef(sha256="ab" * 32, size_bytes=1)
SPEC = RunSpec.model_validate(
    {
        "name": "run",
        "model": "tiny",
        "dataset": "logs",
        "labels": ["a", "b"],
        "evaluation": {"sha256": "ab" * 32, "size_bytes": 1},
    }
)
SHAPE = ModelShape("bert", 6, 384, 384, 1_769_472)


def test_a_round_names_what_was_refused_and_counts_devices_not_findings() -> None:
    part = MemberCheckpoint(assignment_id="a", ranks=(0, 4), steps=1, predicted_s=1.0)
    members = {name: Member(part, 0.0, 0.0) for name in ("bad", "big", "good")}
    findings = (
        Finding("bad", "refused", "head is 41.0 times its usual size (limit 5)"),
        Finding("big", "clipped", "head is 2.5 times its usual size (limit 2)"),
        Finding("big", "weight", "it claims 900 examples; counted as 300"),
    )

    result = summarise(
        1,
        AdapterEvaluated(0.5, 1.0),
        members,
        aggregated=RoundAggregated(ADAPTER, findings, 1.5),
        collected_s=1.0,
        duration_s=1.0,
    )

    assert (result.clipped, result.refused, result.epsilon) == (1, 1, 1.5)
    details = {one.device_id: one.detail for one in result.devices}
    assert details["bad"] == "refused: head is 41.0 times its usual size (limit 5)"
    assert details["big"].count("; weight: it claims") == 1
    assert details["good"] == ""


def test_the_summary_says_what_privacy_was_spent_and_what_is_planned() -> None:
    run = replace(report(0.5, 0.6), privacy=PRIVATE)

    privacy = summary(run)["privacy"]

    assert isinstance(privacy, dict)
    assert privacy["epsilon"] == epsilon_after(PRIVATE, 2)
    assert privacy["epsilon_planned"] == epsilon_after(PRIVATE, run.rounds_planned)
    assert json.dumps(privacy)
    assert summary(report(0.5))["privacy"] is None
    assert metrics_lines(report(0.5))[-1]["epsilon"] is None


def test_watching_shows_verdicts_and_epsilon_and_nothing_without_them() -> None:
    plain = {
        "round": 1, "accuracy": 0.5, "loss": 1.0, "duration_s": 10.0, "waiting_s": 1.0,
        "bytes_up": 1, "bytes_down": 1, "devices": [],
    }  # fmt: skip
    guarded = {**plain, "clipped": 1, "refused": 4, "epsilon": 3.2104}

    before, after = (
        "\n".join(describe_changes(None, run_json(rounds=[one]))) for one in (plain, guarded)
    )

    assert ", 1 clipped, 4 refused, epsilon 3.21 so far" in after
    assert "clipped" not in before
    assert "epsilon" not in before


def test_runs_have_a_column_of_epsilon_once_one_of_them_is_private() -> None:
    run = {
        "run_id": "r", "name": "n", "strategy": "legend", "status": "running", "round_number": 1,
        "rounds": 2, "accuracy": 0.5, "reason": "",
    }  # fmt: skip
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(runs_table([run]))
    assert "epsilon" not in console.export_text()
    console.print(runs_table([run, {**run, "epsilon": 1.23456}]))
    assert "1.23" in console.export_text()
    private = run_json(spec={"privacy": PRIVATE.model_dump()})
    assert "epsilon 0 so far at delta 1e-05" in run_heading(private).plain


def test_devices_are_told_the_norm_and_only_in_private_runs() -> None:
    private = SPEC.model_copy(update={"privacy": PRIVATE})

    assert recipe_of(private, strategy_of(private)).clip_norm == 0.5
    plain = recipe_of(SPEC, strategy_of(SPEC))
    assert "clip_norm" not in plain.model_dump(mode="json", exclude_none=True)
    check_run(private, SHAPE)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"strategy": "hetlora", "privacy": PRIVATE}, "hetlora cannot have privacy"),
        ({"strategy_options": {"defence": "clip"}, "privacy": PRIVATE}, "breaks the bound"),
        ({"strategy_options": {"defence": "krum"}}, "one of none, clip"),
    ],
)
def test_a_run_that_cannot_be_sound_does_not_start(
    changes: dict[str, object], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        check_run(SPEC.model_copy(update=changes), SHAPE)
