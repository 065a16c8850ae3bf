"""Finds in our source every place that writes to a disk, by reading the syntax trees."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("wire_protocol", "edge_agent", "broker_server")

STEPS_OF = {
    "write_durably": ("begin", "half", "written", "done"),
    "replace_file": ("begin", "half", "written", "done"),
    "move_into_place": ("written", "done"),
    "write_in_halves": ("half",),
    "remove_file": ("begin", "done"),
    "Journal": ("begin", "done"),
    "_transaction": ("begin", "done"),
}
"""Functions that carry a write site -> the points that they pass."""

_RAW_METHODS = frozenset(
    {
        "rename", "fsync", "link", "hardlink_to", "symlink_to", "write_text", "write_bytes",
        "mkstemp", "mkdtemp", "NamedTemporaryFile",
    }
)  # fmt: skip
_DATABASES = frozenset({"session", "connection", "engine"})


STARTING = ("server.start_number", "server.announce")
MODELS = ("server.base_model", "server.store.model")
RUNNING = (
    "server.store.device",
    "server.store.run",
    "server.store.status",
    "server.store.checkpoint",
    "server.store.update",
    "server.upload",
    "server.blob",
    "server.blob.spent",
    "server.adapter",
    "server.results",
)
WORKING = (
    "agent.counter",
    "agent.download_chunk",
    "agent.blob",
    "agent.download_report",
    "agent.assignment",
    "agent.outbox",
    "agent.outbox.acknowledged",
)
MEASURING = ("agent.base_model", "agent.benchmark_request", "agent.benchmark_cache")
"""In the order in which a new device comes by: what is done is not done again."""
TRAINING = ("trainer.update", "trainer.result")
"""The sites that ``tests/trust/test_crash_points.py`` kills in a fleet, by what sets them off."""


@dataclass(frozen=True)
class RawWrite:
    """A write that does not go through ``wire_protocol.durable``."""

    place: str
    call: str
    line: int


def points() -> dict[str, set[str]]:
    """Every write site and the steps in it where a process can die."""
    found: dict[str, set[str]] = {}
    for _, tree in _modules():
        for call in _calls(tree):
            name = _name_of(call.func)
            if name == "reached":
                site, step = (_text(argument) for argument in call.args)
                steps: tuple[str, ...] = (step,) if step else ()
            else:
                site, steps = _site(call), STEPS_OF.get(name, ())
            if site and steps:
                found.setdefault(site, set()).update(steps)
    return found


def raw_writes() -> list[RawWrite]:
    """Every write that is made by hand, with the function that makes it."""
    found = []
    for place, tree in _modules():
        if place == "wire_protocol.durable":
            continue
        for name, function in _functions(tree):
            for call in _calls(function, own=True):
                if _is_raw(call):
                    text = ast.unparse(call.func)
                    found.append(RawWrite(f"{place}.{name}", text, call.lineno))
    return found


@functools.cache
def _modules() -> tuple[tuple[str, ast.Module], ...]:
    paths = [path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))]
    return tuple(
        (
            ".".join(path.relative_to(ROOT).with_suffix("").parts),
            ast.parse(path.read_text(encoding="utf-8")),
        )
        for path in paths
    )


def _functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Every function by its qualified name, and what stands outside of them."""
    yield prefix.rstrip(".") or "<module>", tree
    for node in _own_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _functions(node, f"{prefix}{node.name}.")


def _own_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """What stands in a node, without the inside of functions and classes in it."""
    for child in ast.iter_child_nodes(tree):
        yield child
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _own_nodes(child)


def _calls(tree: ast.AST, *, own: bool = False) -> Iterator[ast.Call]:
    nodes = _own_nodes(tree) if own else ast.walk(tree)
    return (node for node in nodes if isinstance(node, ast.Call))


def _name_of(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _site(call: ast.Call) -> str:
    for keyword in call.keywords:
        if keyword.arg == "site":
            return _text(keyword.value)
    return _text(call.args[0]) if _name_of(call.func) == "_transaction" else ""


def _text(node: ast.expr) -> str:
    """A literal, or one of the step names; empty for anything computed."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.Name) and node.id in ("BEGIN", "HALF", "WRITTEN", "DONE"):
        return node.id.lower()
    return ""


def _is_raw(call: ast.Call) -> bool:
    name = _name_of(call.func)
    if name == "replace" and isinstance(call.func, ast.Attribute):
        # A string's takes two, a path's one; a dataclass's is called with names.
        return len(call.args) == 1 and not call.keywords
    if name == "open":
        return _opens_for_writing(call)
    if name in ("begin", "commit") and isinstance(call.func, ast.Attribute):
        return _name_of(call.func.value).strip("_") in _DATABASES
    return name in _RAW_METHODS and isinstance(call.func, ast.Attribute)


def _opens_for_writing(call: ast.Call) -> bool:
    inside = [node for argument in _arguments(call) for node in ast.walk(argument)]
    flags = {node.attr for node in inside if isinstance(node, ast.Attribute)}
    if any(flag.startswith("O_") for flag in flags):
        return not flags <= {"O_RDONLY", "O_DIRECTORY", "O_CLOEXEC", "root"}
    texts = [node.value for node in inside if isinstance(node, ast.Constant)]
    computed = any(isinstance(node, ast.Name) and node.id == "mode" for node in inside)
    return computed or any(
        isinstance(text, str) and 0 < len(text) <= 3 and bool(set(text) & set("wax+"))
        for text in texts
    )


def _arguments(call: ast.Call) -> list[ast.expr]:
    return [*call.args, *(k.value for k in call.keywords if k.arg == "mode")]
