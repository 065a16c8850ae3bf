"""The trainer's modules also run under Python 3.8, with few packages."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRAINER = (
    "base_model",
    "clip_update",
    "dataset",
    "error_feedback",
    "finetune",
    "frozen_prefix",
    "gradient_sizes",
    "tail_penalty",
    "losses",
    "layer_range",
    "onnx_runtime",
    "peak_memory",
    "peft_adapter",
    "precision",
    "prefix_store",
    "probe",
    "quantised_activations",
    "round_directory",
    "stretch",
    "trainer_child",
    "warm_trainer",
)
CONTRACT = (
    "durable",
    "errors",
    "lora",
    "model_family",
    "records",
    "safetensors_bytes",
    "tensors",
)
MODULES = [f"edge_agent.{name}" for name in TRAINER] + [
    f"wire_protocol.{name}" for name in CONTRACT
]
PACKAGES = {"numpy", "torch", "transformers", "peft", "safetensors", "onnxruntime", "pyarrow"}
NEWER_STDLIB = {"tomllib", "zoneinfo", "graphlib"}
NEWER_METHODS = {"removeprefix", "removesuffix", "is_relative_to", "with_stem", "hardlink_to"}
BUILTIN_GENERICS = {"list", "dict", "tuple", "set", "frozenset", "type"}


@pytest.fixture(params=MODULES)
def tree(request: pytest.FixtureRequest) -> ast.Module:
    path = ROOT / (str(request.param).replace(".", "/") + ".py")
    return ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))


def imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module in ("edge_agent", "wire_protocol"):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)


def evaluated(node: ast.AST) -> Iterator[ast.AST]:
    """Every node that runs: all but annotations."""
    yield node
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from evaluated(child)


def test_only_the_trainers_packages_are_imported(tree: ast.Module) -> None:
    allowed = (sys.stdlib_module_names - NEWER_STDLIB) | PACKAGES
    strange = [
        name
        for name in imported(tree)
        if name not in MODULES and name.partition(".")[0] not in allowed
    ]
    assert strange == []


def test_annotations_are_not_evaluated(tree: ast.Module) -> None:
    assert "__future__" in list(imported(tree))


def test_nothing_that_runs_is_newer_than_python_3_8(tree: ast.Module) -> None:
    abstract = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "collections.abc"
        for alias in node.names
    }
    for node in evaluated(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
            assert node.value.id not in BUILTIN_GENERICS | abstract, ast.unparse(node)
        elif isinstance(node, ast.Attribute):
            assert node.attr not in NEWER_METHODS, ast.unparse(node)
        elif isinstance(node, ast.Call):
            newer = {keyword.arg for keyword in node.keywords} & {"slots", "kw_only", "strict"}
            assert not newer, ast.unparse(node)
