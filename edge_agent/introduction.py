"""What a device says about itself whenever it connects."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version

from edge_agent.capability import current_capability
from edge_agent.round_work import Workshop
from wire_protocol.messages import Birth
from wire_protocol.parts import DatasetReport


def introduction(shop: Workshop, boot_id: str, datasets: Mapping[str, DatasetReport]) -> Birth:
    """Say who this device is and what it can do now."""
    device = shop.device
    return Birth(
        boot_id=boot_id,
        agent_version=version("legend-edge"),
        board=device.board,
        emulated=device.emulation.label if device.emulation else None,
        capability=current_capability(device, shop.state, trainer_pid=shop.trainer.pid),
        datasets=dict(datasets),
        heartbeat_s=device.settings.heartbeat_s,
        not_training=shop.watch.reason[:500],
    )
