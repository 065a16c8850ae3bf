"""The figures of a finished round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from broker_server.run_events import AdapterEvaluated, RoundAggregated
from broker_server.run_state import Member, MemberResult, RoundResult


def summarise(
    round_number: int,
    evaluated: AdapterEvaluated,
    members: Mapping[str, Member],
    *,
    aggregated: RoundAggregated,
    collected_s: float,
    duration_s: float,
) -> RoundResult:
    """Put together what a round brought and what it cost.

    Args:
        round_number: from 1.
        evaluated: the new global adapter on the held-out file.
        members: the cohort as it ended.
        aggregated: what the aggregation found about the updates.
        collected_s: from the first assignment to the end of collecting; a
            device's waiting time is this minus its completion time.
        duration_s: from the first assignment to the new global adapter.

    Source: arXiv:2412.20004, average waiting time.
    """
    devices = tuple(
        _member_result(device_id, member, collected_s, _words(device_id, aggregated))
        for device_id, member in sorted(members.items())
    )
    verdicts = {(one.device_id, one.verdict) for one in aggregated.findings}
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
        clipped=sum(verdict == "clipped" for _, verdict in verdicts),
        refused=sum(verdict == "refused" for _, verdict in verdicts),
        epsilon=aggregated.epsilon,
        energy_j=_total([device.energy_j for device in devices if device.steps]),
    )


def _words(device_id: str, aggregated: RoundAggregated) -> str:
    """What was found about one device's update, in one line."""
    mine = [one for one in aggregated.findings if one.device_id == device_id]
    return "; ".join(f"{one.verdict}: {one.reason}" for one in mine)


def _member_result(device_id: str, member: Member, collected_s: float, found: str) -> MemberResult:
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
        detail="; ".join(part for part in (member.detail, found) if part),
        emulated=manifest.emulated if manifest else None,
        energy_j=manifest.report.energy_j if manifest else None,
    )


def _total(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None
