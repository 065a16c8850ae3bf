"""What the frozen layers make of an example is computed once and read back from then on.

Below its trained layers a device applies something that does not change for many rounds. The
hidden states that enter the lowest trained layer are therefore the same whenever the example comes
again, as long as nothing random happens below: the frozen layers run without dropout, cached or
not. States are stored without padding in fp16 (bf16 where training computes in bf16), and a step
uses the stored values also for examples that it has just computed: a hit and a miss give equal
numbers.

Knows tensors and boundaries. Bytes and files are ``prefix_store``'s, the model's inside is
``layer_range``'s. Valid on Python 3.8.

Source: the activation cache of FedAdapter, arXiv:2205.10162; here per depth, so per device.
"""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from typing import Any, Callable, ContextManager, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import torch
from numpy.typing import NDArray

from edge_agent.base_model import BaseModel
from edge_agent.dataset import Padding, Tokenised, collate, padding_of
from edge_agent.layer_range import entering, given_up, states_entering
from edge_agent.prefix_store import PrefixStore, Shelf
from wire_protocol.model_family import layer_of
from wire_protocol.tensors import Adapter

PRETRAINED = "pretrained"
"""Version of a prefix to which no adapter is applied."""

Companions = Callable[[Tokenised], Sequence[Tokenised]]


class PrefixGoneError(Exception):
    """States are missing, and so are the layers that could compute them: load the model anew."""


@dataclass(frozen=True)
class PrefixCache:
    """Where a device keeps hidden states, and of which base model.

    Attributes:
        model_digest: names the base model, its tokenizer included.
        reuse_lower: begin a missing example from states that are stored at a lower boundary,
            which are rounded; without it states do not depend on what was stored before.
        companions: examples to compute together with a missing one; None computes
            the missing ones of a batch together.
    """

    store: PrefixStore
    model_digest: str
    reuse_lower: bool = True
    companions: Optional[Companions] = None

    def shelf(self, version: str, boundary: int, dtype: Any) -> Shelf:
        """The states at one boundary under one prefix."""
        key = f"{self.model_digest}/{version}/{boundary}/{dtype}"
        return self.store.shelf(hashlib.sha256(key.encode()).hexdigest()[:32])


class FrozenPrefix:
    """The layers below a boundary, and what is known of their output; a context manager.

    Args:
        base: with the adapter of the round attached and its mode set.
        adapter: that is applied; what lies below a boundary names its version.
        boundary: the lowest trained layer; at least 1.
        cache: where states are kept.
        autocast: of the training; None computes in float32.
    """

    def __init__(
        self,
        base: BaseModel,
        adapter: Adapter,
        *,
        boundary: int,
        cache: PrefixCache,
        autocast: Any = None,
    ) -> None:
        self._base = base
        self._boundary = boundary
        self._cache = cache
        self._autocast = autocast
        self._dtype = _stored_dtype(autocast)
        self._padding: Padding = padding_of(base.tokenizer)
        self._stack = contextlib.ExitStack()
        lowest = 1 if cache.reuse_lower else boundary
        self._shelves: Dict[int, Shelf] = {
            layer: self._stack.enter_context(
                cache.shelf(prefix_version(adapter, layer), layer, self._dtype)
            )
            for layer in range(boundary, lowest - 1, -1)
        }

    def __enter__(self) -> FrozenPrefix:
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def states(self, batch: Sequence[Tokenised]) -> Tuple[Any, int]:
        """What enters the lowest trained layer, and what it cost.

        Returns:
            (batch, longest, hidden) in float32, zero where padded; and the
            token-layer pairs that were computed for it, padding included.
        """
        found = {one.digest: self._read(self._boundary, one.digest) for one in batch}
        missing = {one.digest: one for one in batch if found[one.digest] is None}
        cost = self._fill(missing, found) if missing else 0
        return self._padded(batch, [found[one.digest] for one in batch]), cost

    def replacing(self, states: Any) -> ContextManager[None]:
        """While it lasts, a forward pass begins at the boundary with these states."""
        return entering(self._base, self._boundary, states)

    def _fill(self, missing: Mapping[bytes, Tokenised], found: Dict[bytes, Any]) -> int:
        """Compute and store what is missing; token-layer pairs that it took."""
        cost = 0
        for start, examples in self._groups(missing).items():
            if given_up(self._base) > start:
                raise PrefixGoneError
            for some in self._together(examples):
                longest = max(example.length for example in some)
                cost += len(some) * longest * (self._boundary - start)
                storable = []
                for example, states in zip(some, self._compute(some, start)):
                    rounded = states.to(self._dtype)
                    # Beyond the range of fp16: used as it is, and computed every time.
                    fits = bool(torch.isfinite(rounded).all())
                    digest = example.digest
                    if digest in found:
                        found[digest] = rounded if fits else states
                    if fits:
                        storable.append((digest, _bytes_of(rounded)))
                self._shelves[self._boundary].put(storable)
        return cost

    def _groups(self, missing: Mapping[bytes, Tokenised]) -> Dict[int, List[Tokenised]]:
        """Missing examples by the highest lower boundary that knows them; 0 begins afresh."""
        groups: Dict[int, List[Tokenised]] = {}
        for digest, example in missing.items():
            known = (
                layer
                for layer in sorted(self._shelves, reverse=True)
                if layer < self._boundary and self._shelves[layer].get(digest) is not None
            )
            groups.setdefault(next(known, 0), []).append(example)
        return groups

    def _together(self, examples: Sequence[Tokenised]) -> List[Sequence[Tokenised]]:
        """Which examples are computed in one batch."""
        companions = self._cache.companions
        if companions is None:
            return [examples]
        groups = {group[0].digest: group for group in map(companions, examples)}
        return list(groups.values())

    def _compute(self, examples: Sequence[Tokenised], start: int) -> List[Any]:
        """What enters the boundary for each example, (tokens, hidden) in float32 on the CPU."""
        base = self._base
        device = base.device
        inputs = {
            name: torch.tensor(rows, device=device)
            for name, rows in collate(examples, self._padding).items()
            if name != "labels"
        }
        states = None
        if start:
            stored = [self._read(start, example.digest) for example in examples]
            states = self._padded(examples, stored)
        autocast = torch.autocast(
            device.type, dtype=self._autocast, enabled=self._autocast is not None
        )
        with autocast:
            computed = states_entering(base, inputs, self._boundary, start=start, states=states)
        rows = computed.float().cpu()
        return [rows[row, : example.length] for row, example in enumerate(examples)]

    def _padded(self, examples: Sequence[Tokenised], states: Sequence[Any]) -> Any:
        """Rows of states as one float32 batch, (batch, longest, hidden), zero where padded."""
        longest = max(example.length for example in examples)
        padded = torch.zeros((len(examples), longest, self._base.shape.hidden_size))
        for row, example in enumerate(examples):
            padded[row, : example.length] = states[row]
        return padded.to(self._base.device)

    def _read(self, layer: int, digest: bytes) -> Any:
        """Stored states as they are stored, (tokens, hidden); None when there are none."""
        data = self._shelves[layer].get(digest)
        if data is None:
            return None
        values = torch.from_numpy(np.frombuffer(data, dtype=np.int16).copy()).view(self._dtype)
        return values.view(-1, self._base.shape.hidden_size)


def is_cached(
    cache: PrefixCache,
    adapter: Adapter,
    examples: Sequence[Tokenised],
    *,
    boundary: int,
    autocast: Any = None,
) -> bool:
    """Whether the states of all these examples are stored, so that no frozen layer will run."""
    version = prefix_version(adapter, boundary)
    with cache.shelf(version, boundary, _stored_dtype(autocast)) as shelf:
        return all(example.digest in shelf for example in examples)


def prefix_version(adapter: Adapter, boundary: int) -> str:
    """Names what is applied below a layer: equal versions give equal hidden states."""
    below: Dict[str, NDArray[np.float32]] = {
        name: tensor
        for name, tensor in adapter.items()
        if layer_of(name) is not None and int(layer_of(name) or 0) < boundary
    }
    if not below:
        return PRETRAINED
    digest = hashlib.sha256()
    for name in sorted(below):
        digest.update(f"{name} {below[name].shape} ".encode())
        digest.update(np.ascontiguousarray(below[name], dtype=np.float32).tobytes())
    return digest.hexdigest()


def _stored_dtype(autocast: Any) -> Any:
    return torch.bfloat16 if autocast is torch.bfloat16 else torch.float16


def _bytes_of(states: Any) -> bytes:
    data: bytes = states.contiguous().view(torch.int16).numpy().tobytes()
    return data
