"""Settings files: YAML text plus environment overrides become a strict model.

Shared by every program so that a typo is reported in the same words
everywhere. Pure: the caller reads the file and passes the environment.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from wire_protocol.errors import ConfigError, one_line
from wire_protocol.plain_yaml import read_yaml


class Settings(BaseModel):
    """Part of a settings file: unknown keys are errors, values do not change."""

    model_config = ConfigDict(frozen=True, extra="forbid")


SettingsType = TypeVar("SettingsType", bound=BaseModel)


def parse_settings(
    model: type[SettingsType],
    text: str,
    *,
    source: str,
    environ: Mapping[str, str],
    prefix: str,
) -> SettingsType:
    """Read settings.

    Args:
        model: the strict model to build.
        text: YAML; may be empty.
        source: name of the file, for error messages.
        environ: ``{prefix}KEY`` overrides ``key`` and ``{prefix}A__B`` overrides
            ``b`` inside ``a``; values are YAML.
        prefix: e.g. ``EDGE_AGENT_``.

    Raises:
        ConfigError: not YAML, an unknown key (with the nearest known one), or
            a value out of range.
    """
    values = _mapping(text, source)
    for name, value in sorted(environ.items()):
        path = name[len(prefix) :].lower().split("__")
        if name.startswith(prefix) and path[0] in model.model_fields:
            _override(values, path, value, name)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: {explain(error, model)}") from error


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first problem of a validation in one line, with the nearest known key."""
    problems = error.errors(include_url=False)
    # A typo often shows twice, as an unknown key and as a missing one: name the typo.
    first = next((one for one in problems if one["type"] == "extra_forbidden"), problems[0])
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _fields_at(model, first["loc"][:-1])
        place = one_line(place, longest=80)
        near = difflib.get_close_matches(str(first["loc"][-1])[:80], known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(known)}"
        return f"unknown key {place!r}{hint}"
    if first["type"] == "missing":
        return f"key {place!r} is missing"
    # A validator of ours: its sentence stands by itself.
    message = first["msg"].removeprefix("Value error, ")
    return one_line(f"{place}: {message}" if place else message)


def _mapping(text: str, source: str) -> dict[str, Any]:
    values = read_yaml(text, source=source)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{source} must hold keys and values, not a {type(values).__name__}")
    return values


def _override(values: dict[str, Any], path: list[str], value: str, name: str) -> None:
    parsed = read_yaml(value, source=f"environment variable {name}")
    for key in path[:-1]:
        inner = values.setdefault(key, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"environment variable {name}: {key!r} holds no keys")
        values = inner
    values[path[-1]] = parsed


def _fields_at(model: type[BaseModel], place: tuple[int | str, ...]) -> list[str]:
    current: Any = model
    for part in place:
        field = getattr(current, "model_fields", {}).get(part)
        if field is None:
            break
        current = _model_inside(field.annotation) or current
    return sorted(getattr(current, "model_fields", {}))


def _model_inside(annotation: Any) -> type[BaseModel] | None:
    """The settings model inside e.g. ``Emulation | None`` or ``dict[str, Dataset]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        if found := _model_inside(argument):
            return found
    return None
