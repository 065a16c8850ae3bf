"""Runs and devices as the operator's API shows them. Pure: records in, JSON values out."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

from broker_server.fleet import DeviceRecord, Fleet
from broker_server.run_folder import Baseline, RunReport
from broker_server.run_loop import RunLoop
from broker_server.run_spec import RunSpec
from broker_server.run_state import Member, MemberStatus, RoundResult
from broker_server.store import ModelRow, RunRecord
from wire_protocol.versions import protocol_problem

if TYPE_CHECKING:
    from broker_server.pki_ledger import IssuedCertificate

_FINAL = (MemberStatus.UPDATED, MemberStatus.FAILED, MemberStatus.STRAGGLER)


def device_list(
    fleet: Fleet, now: float, certificates: Iterable[IssuedCertificate] = ()
) -> list[dict[str, object]]:
    """Every device, with what it can do and why it is not used, if so.

    Args:
        fleet: the registry.
        now: monotonic seconds.
        certificates: of the fleet; a device whose every one is revoked is shown as revoked.
    """
    devices = [one for one in certificates if one.kind == "device"]
    valid = {one.name for one in devices if one.revoked_at is None}
    revoked = {one.name for one in devices} - valid
    return [
        {
            "device_id": device_id,
            "board": known.birth.board,
            "emulated": known.birth.emulated,
            "agent_version": known.birth.agent_version,
            "state": "revoked" if device_id in revoked else _state(known),
            "busy_with": known.busy_with,
            "last_seen_s": round(now - known.last_seen, 1),
            "capability": known.capability.model_dump(mode="json"),
            "datasets": {
                name: report.model_dump(mode="json")
                for name, report in known.birth.datasets.items()
            },
            "not_training": known.not_training,
            "note": known.note,
        }
        for device_id, known in sorted(fleet.devices.items())
    ]


def _state(known: DeviceRecord) -> str:
    if protocol_problem(known.birth.protocol):
        return "refused"
    return "online" if known.online else "lost"


def model_view(row: ModelRow, family: str, layer_count: int) -> dict[str, object]:
    """One registered base model."""
    files = json.loads(row.files)
    return {
        "name": row.name,
        "digest": row.digest,
        "family": family,
        "layer_count": layer_count,
        "size_bytes": sum(file["size_bytes"] for file in files),
        "files": files,
    }


def run_report(record: RunRecord, rounds: list[RoundResult]) -> RunReport:
    """A run as its result folder describes it."""
    spec = RunSpec.model_validate_json(record.spec)
    return RunReport(
        run_id=record.run_id,
        name=spec.name,
        strategy=spec.strategy,
        base_model=spec.model,
        task=spec.task,
        labels=spec.labels,
        status=record.status,
        reason=record.reason,
        rounds_planned=spec.rounds,
        baseline=Baseline(**json.loads(record.baseline)) if record.baseline else None,
        rounds=tuple(rounds),
        privacy=spec.privacy,
    )


def run_line(report: RunReport, loop: RunLoop | None) -> dict[str, object]:
    """One run in a list; its last round is enough."""
    scores = [result.accuracy for result in report.rounds]
    if not scores and report.baseline:
        scores = [report.baseline.accuracy]
    return {
        "run_id": report.run_id,
        "name": report.name,
        "strategy": report.strategy,
        "status": report.status,
        "round_number": loop.coordinator.round_number if loop else _last_number(report),
        "rounds": report.rounds_planned,
        "accuracy": scores[-1] if scores else None,
        "epsilon": report.rounds[-1].epsilon if report.rounds else None,
        "reason": report.reason or (loop.coordinator.waits_for() if loop else ""),
    }


def run_detail(
    record: RunRecord, report: RunReport, loop: RunLoop | None, fleet: Fleet, now: float
) -> dict[str, object]:
    """Everything about one run, with what its devices do now."""
    return {
        "run_id": report.run_id,
        "name": report.name,
        "strategy": report.strategy,
        "status": report.status,
        "reason": report.reason or (loop.coordinator.waits_for() if loop else ""),
        "spec": json.loads(record.spec),
        "round_number": loop.coordinator.round_number if loop else _last_number(report),
        "phase": loop.coordinator.phase.value if loop else "ended",
        "rounds_total": report.rounds_planned,
        "accuracy_before": report.baseline.accuracy if report.baseline else None,
        "loss_before": report.baseline.loss if report.baseline else None,
        "rounds": [result.model_dump(mode="json") for result in report.rounds],
        "live": _live(loop, fleet, now) if loop else [],
    }


def _last_number(report: RunReport) -> int:
    return report.rounds[-1].round if report.rounds else 0


def _live(loop: RunLoop, fleet: Fleet, now: float) -> list[dict[str, object]]:
    open_round = loop.coordinator.round
    members = open_round.members if open_round else {}
    return [
        _live_line(device_id, loop, fleet, members.get(device_id), now)
        for device_id in sorted(set(loop.coordinator.devices) | set(members))
        if device_id in fleet.devices
    ]


def _live_line(
    device_id: str, loop: RunLoop, fleet: Fleet, member: Member | None, now: float
) -> dict[str, object]:
    known = fleet.devices[device_id]
    said = loop.live.get(device_id)
    state = "idle"
    if member is not None:
        final = member.status in _FINAL
        state = member.status.value if final or said is None else said.phase
    if not known.online:
        state = "lost"
    ranks = member.checkpoint.ranks if member else ()
    completion_s = member.completion_s if member else None
    elapsed_s = now - member.assigned_at if member and completion_s is None else completion_s
    waits = completion_s is not None and member is not None
    return {
        "device_id": device_id,
        "board": known.birth.board,
        "state": state,
        "depth": sum(rank > 0 for rank in ranks),
        "ranks": list(ranks),
        "step": said.step if said else 0,
        "steps": member.checkpoint.steps if member else 0,
        "loss": said.loss if said else None,
        "elapsed_s": round(elapsed_s or 0.0, 2),
        "completion_s": completion_s,
        "waiting_s": now - member.assigned_at - (completion_s or 0.0) if waits and member else None,
        "detail": member.detail if member else loop.coordinator.devices[device_id].note,
    }
