"""The cache of a virtual device: which of its examples it would read back, and what a step costs.

Follows the rules of ``edge_agent.frozen_prefix``: states are kept by boundary, a missing example
begins at the highest lower boundary that knows it, and another version of the prefix empties the
cache. Pure; holds row numbers, no states.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict


class VirtualCache(BaseModel):
    """What one device holds between two rounds.

    Attributes:
        version: of the prefix; see ``PrefixBook.version``.
        held: by boundary, the examples whose states are there, one bit each, in hex.
        loaded: digests of the parts of the snapshot that were downloaded.
    """

    model_config = ConfigDict(frozen=True)

    version: str = ""
    held: dict[int, str] = {}
    loaded: tuple[str, ...] = ()

    def of(self, version: str) -> VirtualCache:
        """The same cache if it is of this version of the prefix, else an empty one."""
        return self if self.version == version else VirtualCache(version=version)

    def with_loaded(self, sha256: str) -> VirtualCache:
        """Remember a downloaded part."""
        return self.model_copy(update={"loaded": (*self.loaded, sha256)})


class CacheBook:
    """A cache while its device trains one round.

    Args:
        cache: as it was before.
        boundary: the lowest trained layer.
        lengths: tokens of each of the device's examples.
    """

    def __init__(self, cache: VirtualCache, boundary: int, lengths: Sequence[int]) -> None:
        self._cache = cache
        self._boundary = boundary
        self._lengths = lengths
        self._held = {layer: int(bits, 16) for layer, bits in cache.held.items()}

    def visit(self, rows: Sequence[int]) -> int:
        """Token-layer pairs that the frozen layers compute for a batch; it is held then."""
        here = self._held.get(self._boundary, 0)
        missing = [row for row in dict.fromkeys(rows) if not here >> row & 1]
        starts: dict[int, list[int]] = {}
        lower = sorted((layer for layer in self._held if layer < self._boundary), reverse=True)
        for row in missing:
            start = next((layer for layer in lower if self._held[layer] >> row & 1), 0)
            starts.setdefault(start, []).append(row)
            here |= 1 << row
        if missing:
            self._held[self._boundary] = here
        return sum(
            len(some) * max(self._lengths[row] for row in some) * (self._boundary - start)
            for start, some in starts.items()
        )

    def after(self) -> VirtualCache:
        """The cache as it is now."""
        held = {layer: f"{bits:x}" for layer, bits in sorted(self._held.items())}
        return self._cache.model_copy(update={"held": held})
