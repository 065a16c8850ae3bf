"""What coarse codecs left out of virtual devices' updates; a live device keeps it on its disk.

Between rounds it lies in the simulation's blobs, one per device, so that an interrupted simulation
goes on with the same numbers. Of an open round it is in memory: that round is trained again.
"""

from __future__ import annotations

from collections.abc import Mapping

from broker_server.blobs import BlobStore
from wire_protocol.parts import BlobRef


class VirtualResiduals:
    """The residual of each device that has one.

    Args:
        blobs: of the simulation.
        committed: by device, as the last checkpoint says.
    """

    def __init__(self, blobs: BlobStore, committed: Mapping[str, BlobRef]) -> None:
        self._blobs = blobs
        self._committed = dict(committed)
        self._open: dict[str, bytes] = {}

    def of(self, device_id: str) -> bytes | None:
        """An encoded adapter; None for a device that left nothing out yet."""
        if device_id in self._open:
            return self._open[device_id]
        kept = self._committed.get(device_id)
        return None if kept is None else self._blobs.read(kept.sha256)

    def keep(self, device_id: str, left_out: bytes) -> None:
        """Replace a device's residual."""
        self._open[device_id] = left_out

    def commit(self) -> dict[str, BlobRef]:
        """Put into the blobs what changed; returns what the checkpoint has to say.

        Raises:
            DiskFull: there is no space.
        """
        for device_id, left_out in self._open.items():
            sha256 = self._blobs.put(left_out)
            self._committed[device_id] = BlobRef(sha256=sha256, size_bytes=len(left_out))
        self._open.clear()
        return dict(self._committed)
