"""``GET /v1/doctor``: figures that only the server knows. What they mean is ``fleet_doctor``'s."""

from __future__ import annotations

import os
import time
from importlib.metadata import version
from typing import TYPE_CHECKING

from anyio import to_thread

from broker_server.metrics import database_bytes, open_uploads, resident_bytes

if TYPE_CHECKING:
    from broker_server.server import Server


async def checkup(server: Server) -> dict[str, object]:
    """Look at everything once; the database is read in a thread."""
    store, state = server.store, server.state
    damage = await to_thread.run_sync(store.damage)
    disk = os.statvfs(state.root)
    file = store.file
    counters = server.counters
    return {
        "version": version("legend-edge"),
        "fleet": server.settings.fleet,
        # For a comparison by eye and by the doctor alone: no decision depends on a date.
        "time_s": time.time(),
        "broker": {"kind": server.settings.broker.kind, "connected": server.link.connected},
        "disk": {
            "path": str(state.root),
            "free_bytes": disk.f_bavail * disk.f_frsize,
            "size_bytes": disk.f_blocks * disk.f_frsize,
        },
        "database": {
            "kind": store.kind,
            "damage": damage,
            "size_bytes": database_bytes(file) if file else None,
        },
        "certificates": _certificates(server),
        "dropped_messages": [
            {"channel": channel, "reason": reason, "count": count}
            for (channel, reason), count in sorted(counters.dropped.items())
        ],
        "unsaved_births": counters.unsaved,
        "open_uploads": len(open_uploads(state.blobs)),
        "resident_bytes": resident_bytes(),
    }


def _certificates(server: Server) -> list[dict[str, object]]:
    """Days that the newest certificate of every name has left; those revoked are left out."""
    if server.pki is None:
        return []
    newest: dict[tuple[str, str], float] = {}
    for record in server.pki.records():
        if record.revoked_at is None and record.kind != "takeover":
            key = (record.kind, record.name)
            newest[key] = max(newest.get(key, 0.0), record.not_after)
    now = time.time()
    return [
        {"kind": kind, "name": name, "days_left": round((until - now) / 86400, 1)}
        for (kind, name), until in sorted(newest.items())
    ]
