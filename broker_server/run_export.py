"""A run's result on this machine: adapter folder, merged model, ONNX file.

Fetches from the server what is missing; the conversion itself is
``model_export``'s business (it needs torch, so it is imported on demand).
"""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from broker_server.operator_api_client import OperatorApi, fetch_adapter, fetch_model
from wire_protocol.errors import ConfigError


@dataclass(frozen=True)
class ExportPlan:
    """What to write below ``folder``; ``base`` None fetches the base model."""

    folder: Path
    merge: bool = False
    onnx: bool = False
    base: Path | None = None


def export_run(api: OperatorApi, run_id: str, plan: ExportPlan) -> Iterator[str]:
    """Write the adapter of a run and what can be made of it.

    Yields:
        One line for a person after each thing that was written.

    Raises:
        ConfigError: torch is not installed, or the base model is not the run's.
        Refused: the run has no adapter yet.
    """
    run = api.run(run_id)
    fetch_adapter(api, run_id, plan.folder)
    place = str(plan.folder)
    yield f"adapter in {place}; load it with PeftModel.from_pretrained(base_model, {place!r})"
    if not (plan.merge or plan.onnx):
        return
    _quieten_libraries()
    try:
        from broker_server.model_export import merge, to_onnx  # noqa: PLC0415 - needs torch
    except ImportError as error:
        raise ConfigError("--merge and --onnx need: pip install 'legend-edge[train]'") from error
    # torch sets up its own loggers when it is imported, so this comes after it.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with _base_model(api, str(run["spec"]["model"]), plan.base) as base, _scratch() as scratch:
        merged = plan.folder / "merged" if plan.merge else scratch
        merge(plan.folder, base, merged)
        if plan.merge:
            yield f"merged model in {merged}"
        if plan.onnx:
            target = plan.folder / "model.onnx"
            check = to_onnx(merged, target)
            yield (
                f"ONNX model in {target}: differs from torch by at most "
                f"{check.max_abs_difference:.2g} over {check.examples} examples"
            )


def _quieten_libraries() -> None:
    """Keep notes that are true of every export off the screen: errors still show."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.simplefilter("ignore", FutureWarning)


@contextmanager
def _base_model(api: OperatorApi, name: str, given: Path | None) -> Iterator[Path]:
    if given is not None:
        yield given
        return
    with _scratch() as folder:
        fetch_model(api, name, folder)
        yield folder


@contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="legend-export-") as folder:
        yield Path(folder)
