"""What each device was given to work on, and so what it may fetch and send.

Pure: assignments are recorded and forgotten, questions are answered. A device may read the base
models that it was asked to work with and the adapters of its open assignment, and it may send
updates as large as that assignment can need, and no others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from pydantic import BaseModel

from broker_server.access import Refusal
from wire_protocol.model_family import ModelShape, adapter_shapes
from wire_protocol.tensors import MAX_ADAPTER_BYTES

UPLOADS_PER_ASSIGNMENT = 4
"""An update is one blob; a device that trained again after a crash sends another."""

_REMEMBERED_REPORTS = 8
_BYTES_PER_VALUE = 4
_HEADER_BYTES = 4096
_HEADER_BYTES_PER_TENSOR = 512


@dataclass(frozen=True)
class Assignment:
    """An assignment that is open.

    Attributes:
        blobs: digests of what it is worked on with: the adapter, and parts of it.
        largest_update_bytes: no update of it is larger.
        report_ids: the last messages that said how it ended.
    """

    assignment_id: str
    blobs: frozenset[str]
    largest_update_bytes: int
    report_ids: tuple[str, ...] = ()


class Grants:
    """Assignments and base models by device."""

    def __init__(self) -> None:
        self._assignments: dict[str, Assignment] = {}
        self._models: dict[str, set[str]] = {}
        self._for_everybody: set[str] = set()
        self._files: dict[str, frozenset[str]] = {}

    def know_model(self, digest: str, files: Iterable[str]) -> None:
        """Remember which blobs a base model consists of."""
        self._files[digest] = frozenset(files)

    def allow_model(self, digest: str, device_id: str | None = None) -> None:
        """Let a device, or every one, read a base model."""
        if device_id is None:
            self._for_everybody.add(digest)
        else:
            self._models.setdefault(device_id, set()).add(digest)

    def record(self, device_id: str, assignment: Assignment) -> bool:
        """Open an assignment in the place of the one before.

        Returns:
            True when there was another one, whose uploads nobody will ask for.
        """
        before = self._assignments.get(device_id)
        if before and before.assignment_id == assignment.assignment_id:
            return False
        self._assignments[device_id] = assignment
        return before is not None

    def reported(self, device_id: str, message_id: str, assignment_id: str) -> None:
        """The device said how its assignment ended; the answer closes it."""
        current = self._assignments.get(device_id)
        if current and current.assignment_id == assignment_id:
            ids = (*current.report_ids, message_id)[-_REMEMBERED_REPORTS:]
            self._assignments[device_id] = replace(current, report_ids=ids)

    def answered(self, device_id: str, message_id: str) -> bool:
        """The server answered a device's message; true when that closed its assignment."""
        current = self._assignments.get(device_id)
        if not current or message_id not in current.report_ids:
            return False
        del self._assignments[device_id]
        return True

    def forget(self, device_id: str, assignment_id: str) -> bool:
        """Close an assignment; true when it was open."""
        current = self._assignments.get(device_id)
        if not current or current.assignment_id != assignment_id:
            return False
        del self._assignments[device_id]
        return True

    def devices(self) -> list[str]:
        """Who has an open assignment."""
        return sorted(self._assignments)

    def works_on(self, device_id: str, assignment_id: str) -> bool:
        """Whether this is the device's open assignment."""
        current = self._assignments.get(device_id)
        return current is not None and current.assignment_id == assignment_id

    def may_describe(self, device_id: str, model_digest: str) -> bool:
        """Whether the device may see what a base model consists of."""
        return model_digest in self._models.get(device_id, ()) or (
            model_digest in self._for_everybody
        )

    def may_read(self, device_id: str, sha256: str) -> bool:
        """Whether the device may fetch a blob."""
        current = self._assignments.get(device_id)
        if current and sha256 in current.blobs:
            return True
        digests = self._models.get(device_id, set()) | self._for_everybody
        return any(sha256 in self._files.get(digest, ()) for digest in digests)

    def may_write(self, device_id: str, size_bytes: int = 0) -> Refusal | None:
        """Whether the device may send an update of this size; None: yes."""
        current = self._assignments.get(device_id)
        if current is None:
            return Refusal(403, "no_assignment", "this device has no open assignment")
        if size_bytes > current.largest_update_bytes:
            limit = f"an update of this assignment has at most {current.largest_update_bytes} bytes"
            return Refusal(413, "too_large", f"{limit}, not {size_bytes}")
        return None


def blobs_in(part: BaseModel) -> frozenset[str]:
    """The digests of all blobs that a message or record names, however deep."""
    return frozenset(_digests(part.model_dump(mode="json")))


def _digests(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(digest := value.get("sha256"), str):
            yield digest
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _digests(inner)


def largest_update_bytes(
    shape: ModelShape, ranks: tuple[int, ...], label_count: int, *, factors: str = "both"
) -> int:
    """The size of an update in the widest codec, with room for its header."""
    tensors = adapter_shapes(shape, ranks, label_count, factors=factors)
    values = sum(math.prod(size) for size in tensors.values())
    header = _HEADER_BYTES + _HEADER_BYTES_PER_TENSOR * len(tensors)
    return min(MAX_ADAPTER_BYTES, values * _BYTES_PER_VALUE + header)
