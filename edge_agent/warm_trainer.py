"""The trainer child's work: rounds and benchmarks, with everything loaded kept warm.

Joins the round directory to the recipe. Imports torch; the protocol with the agent's shell is
``trainer_child``'s business. Valid on Python 3.8.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Tuple

import torch

from edge_agent.base_model import BaseModel, load_base_model
from edge_agent.dataset import Tokenised
from edge_agent.error_feedback import COARSE, encode_with_feedback, read_residual
from edge_agent.finetune import Outcome, Supervision, prepare_data, train
from edge_agent.frozen_prefix import PrefixCache, PrefixGoneError, is_cached
from edge_agent.layer_range import give_up_below, given_up
from edge_agent.peak_memory import (
    give_back_at_once,
    is_out_of_memory,
    limit_memory,
    release_memory,
)
from edge_agent.precision import autocast_dtype
from edge_agent.prefix_store import PrefixStore
from edge_agent.probe import ProbeRequest, benchmark
from edge_agent.round_directory import (
    BENCHMARK_RESULT_FILE,
    RESIDUAL_FILE,
    TrainRequest,
    read_request,
    write_result,
)
from wire_protocol.durable import write_durably
from wire_protocol.errors import DeviceError, FailureCode, ProtocolError
from wire_protocol.lora import Codec
from wire_protocol.tensors import Adapter, decode, encode


class WarmTrainer:
    """Does one thing at a time; the base model and the tokenised data stay for the next."""

    def __init__(self) -> None:
        self._base: BaseModel | None = None
        self._base_key: tuple[object, ...] = ()
        self._data: list[Tokenised] = []
        self._data_key: tuple[object, ...] = ()

    def train(self, round_dir: Path, supervision: Supervision) -> int:
        """Do one assignment; its update and result lie in the round directory then.

        Returns:
            The steps done.

        Raises:
            DeviceError: this device cannot do it; the code says why.
        """
        request = read_request(round_dir)
        torch.set_num_threads(request.limits.threads)
        limit_memory(None)
        try:
            adapter = _applied(request)
            try:
                outcome = self._train(request, adapter, supervision)
            except PrefixGoneError:
                # Stored states proved damaged after the layers below had been freed.
                self._base = None
                outcome = self._train(request, adapter, supervision, whole=True)
        except ProtocolError as error:
            line = f"the global adapter does not fit: {error}"
            raise DeviceError(FailureCode.UNSUPPORTED_MODEL, line) from error
        write_result(
            round_dir,
            _encoded(outcome, request, round_dir),
            examples=outcome.examples,
            ranks=outcome.ranks,
            report=outcome.report,
        )
        return outcome.report.steps_done

    def _train(
        self,
        request: TrainRequest,
        adapter: Adapter,
        supervision: Supervision,
        *,
        whole: bool = False,
    ) -> Outcome:
        """Train; without the layers below, unless ``whole``, when their output is cached."""
        base, data = self._prepared(request)
        cache = _prefix_cache(request, examples=len(data))
        boundary = sum(rank == 0 for rank in request.ranks)
        autocast = autocast_dtype(base.device.type, request.limits.precision)
        if given_up(base) and (cache is None or given_up(base) > boundary):
            self._base = None
            base, data = self._prepared(request)
        if cache and boundary and not whole:
            if is_cached(cache, adapter, data, boundary=boundary, autocast=autocast):
                give_up_below(base, boundary)
                release_memory()
            elif given_up(base):
                self._base = None
                base, data = self._prepared(request)
        if request.quantised_layers:
            # Memory is short here: what quantising frees must not stay with the process.
            give_back_at_once()
        # Not before: the tokenizer aborts the process where torch would raise.
        limit_memory(request.limits.memory_limit_bytes)
        return train(
            base, data, adapter=adapter, request=request, supervision=supervision, cache=cache
        )

    def _prepared(self, request: TrainRequest) -> tuple[BaseModel, list[Tokenised]]:
        recipe = request.recipe
        base = self._base_model(request.model_dir, recipe.task, recipe.label_count)
        return base, self._tokenised(base, request)

    def benchmark(self, request_file: Path, on_step: Callable[[int, str], object]) -> None:
        """Measure a base model; the result lies next to the request then.

        Raises:
            DeviceError: this device cannot do it; the code says why.
        """
        value = json.loads(_read(request_file))
        request = _probe_request(value)
        torch.set_num_threads(request.threads)
        limit_memory(None)
        if self._base is not None and given_up(self._base):
            self._base = None  # it measures every layer
        base = self._base_model(Path(value["model_dir"]), value["task"], int(value["label_count"]))
        limit_memory(request.memory_limit_bytes)
        result = benchmark(base, request, on_step=on_step)
        target = request_file.with_name(BENCHMARK_RESULT_FILE)
        write_durably(target, json.dumps(result).encode(), site="trainer.benchmark")

    def _base_model(self, model_dir: Path, task: str, label_count: int) -> BaseModel:
        # A folder that was put right must not go on as what it had been.
        key = (model_dir, _stamps(model_dir), task, label_count)
        if self._base is None or self._base_key != key:
            self._base, self._data_key, self._data = None, (), []
            release_memory()
            self._base, self._base_key = load_base_model(model_dir, task, label_count), key
        return self._base

    def _tokenised(self, base: BaseModel, request: TrainRequest) -> list[Tokenised]:
        recipe = request.recipe
        try:
            state = request.dataset_file.stat()
            stamp: tuple[object, ...] = (state.st_mtime_ns, state.st_size)
        except OSError:
            stamp = ()  # loading says what is wrong with the file
        key = (request.dataset_file, *stamp, request.columns, recipe.labels, recipe.max_tokens)
        if key != self._data_key:
            self._data = prepare_data(
                base, request.dataset_file, columns=request.columns, recipe=recipe
            )
            self._data_key = key
        return self._data


def _stamps(folder: Path) -> Tuple[Tuple[str, int, int], ...]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    states = [(str(path), path.stat()) for path in files]
    return tuple((path, state.st_mtime_ns, state.st_size) for path, state in states)


def _applied(request: TrainRequest) -> Adapter:
    """The global adapter, and below it the snapshot that is kept for many rounds."""
    adapter = decode(_read(request.adapter_file))
    if request.prefix is None or request.prefix.adapter_file is None:
        return adapter
    return {**decode(_read(request.prefix.adapter_file)), **adapter}


def _prefix_cache(request: TrainRequest, *, examples: int) -> PrefixCache | None:
    """Where hidden states are kept; None where no example would be met again before they change."""
    if request.prefix is None:
        return None
    if request.prefix.rounds_left == 0 and request.steps * request.limits.batch_size <= examples:
        return None
    store = PrefixStore(request.prefix.cache_dir, request.prefix.cache_bytes)
    return PrefixCache(store, request.prefix.model_digest)


def failure_of(error: BaseException) -> DeviceError:
    """The named failure behind any exception that ended a command."""
    if isinstance(error, DeviceError):
        return error
    if is_out_of_memory(error):
        return DeviceError(FailureCode.OUT_OF_MEMORY, f"memory ran out: {_line(error)}")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        line = "the disk of the state directory is full; free some space"
        return DeviceError(FailureCode.DISK_FULL, line)
    return DeviceError(FailureCode.INTERNAL, f"{type(error).__name__}: {_line(error)}")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DeviceError(FailureCode.MISSING_FILE, f"{path} does not exist") from error


def _encoded(outcome: Outcome, request: TrainRequest, round_dir: Path) -> bytes:
    codec, residual_file = request.recipe.codec, request.residual_file
    try:
        # What was left out would come on top of an update that privacy limits in size.
        private = request.recipe.clip_norm is not None
        if codec not in COARSE or residual_file is None or private:
            return encode(outcome.delta, codec)
        residual = read_residual(residual_file)
        data, residual = encode_with_feedback(outcome.delta, residual, codec)
        left_out = encode(residual, Codec.FP32)
    except ProtocolError as error:
        line = f"the update cannot be sent: {error}; lower the learning rate"
        raise DeviceError(FailureCode.NON_FINITE_LOSS, line) from error
    # Beside the update, not in its place: a round that is trained again begins with the old one.
    write_durably(round_dir / RESIDUAL_FILE, left_out, site="trainer.residual")
    return data


def _probe_request(value: Mapping[str, Any]) -> ProbeRequest:
    return ProbeRequest(
        max_tokens=int(value["max_tokens"]),
        batch_size=int(value["batch_size"]),
        threads=int(value["threads"]),
        precision=value["precision"],
        flops_per_s=(value.get("stretch") or {}).get("flops_per_s"),
        onnx=bool(value["onnx"]),
        work_dir=Path(value["work_dir"]),
        memory_limit_bytes=value.get("memory_limit_bytes"),
    )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
