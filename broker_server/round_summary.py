"""The figures of a finished round."""

from __future__ import annotations

from collections.abc import Mapping

from broker_server.run_events import AdapterEvaluated
from broker_server.run_state import Member, MemberResult, RoundResult


def summarise(
    round_number: int,
    evaluated: AdapterEvaluated,
    members: Mapping[str, Member],
    *,
    collected_s: float,
    duration_s: float,
) -> RoundResult:
    """Put together what a round brought and what it cost.

    Args:
        round_number: from 1.
        evaluated: the new global adapter on the held-out file.
        members: the cohort as it ended.
        collected_s: from the first assignment to the end of collecting; a
            device's waiting time is this minus its completion time.
        duration_s: from the first assignment to the new global adapter.

    Source: arXiv:2412.20004, average waiting time.
    """
    devices = tuple(
        _member_result(device_id, member, collected_s)
        for device_id, member in sorted(members.items())
    )
    waits = [device.waiting_s for device in devices if device.waiting_s is not None]
    return RoundResult(
        round=round_number,
        accuracy=evaluated.accuracy,
        loss=evaluated.loss,
        duration_s=duration_s,
        waiting_s=sum(waits) / len(waits) if waits else 0.0,
        bytes_up=sum(device.bytes_up for device in devices),
        bytes_down=sum(device.bytes_down for device in devices),
        devices=devices,
    )


def _member_result(device_id: str, member: Member, collected_s: float) -> MemberResult:
    manifest = member.manifest
    ranks = manifest.ranks if manifest else member.checkpoint.ranks
    completion_s = member.completion_s
    return MemberResult(
        device_id=device_id,
        depth=sum(rank > 0 for rank in ranks),
        ranks=ranks,
        steps=manifest.report.steps_done if manifest else 0,
        predicted_s=member.checkpoint.predicted_s,
        completion_s=completion_s,
        waiting_s=None if completion_s is None else max(0.0, collected_s - completion_s),
        loss=manifest.report.last_loss if manifest else None,
        bytes_up=manifest.update.size_bytes if manifest else 0,
        bytes_down=manifest.report.download_bytes if manifest else 0,
        status=member.status.value,
        detail=member.detail,
        emulated=manifest.emulated if manifest else None,
    )
