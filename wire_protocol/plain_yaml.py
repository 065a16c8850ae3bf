"""YAML from people, and from whoever can write into their files: values or one error.

PyYAML's safe loader runs no code, but it lets Python's own errors through, recurses as deep as
the text goes, and takes a few hundred bytes of aliases that stand for billions of values.
"""

from __future__ import annotations

from typing import Any

import yaml

from wire_protocol.errors import ConfigError, one_line

LONGEST_CHARACTERS = 1024 * 1024
DEEPEST = 50
MOST_VALUES = 100_000
"""With every alias counted as what it stands for."""


def read_yaml(text: str, *, source: str) -> Any:
    """Read one document.

    Args:
        text: may be empty, which is None.
        source: what the text is, for error messages.

    Raises:
        ConfigError: not YAML, or larger than anything that a person writes.
    """
    if len(text) > LONGEST_CHARACTERS:
        raise ConfigError(f"{source} is longer than {LONGEST_CHARACTERS} characters")
    loader = None
    try:
        loader = _BoundedLoader(text)
        return loader.get_single_data()
    except (
        yaml.YAMLError,
        # PyYAML's constructors: "!!int x", "2001-13-45", "!!timestamp x", ...
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        raise ConfigError(f"{source} is not YAML: {_why(error)}") from error
    finally:
        if loader is not None:
            loader.dispose()


def _why(error: Exception) -> str:
    """What is wrong and where; PyYAML's own words would quote the line, and a password in it."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return one_line(error)
    words = one_line(" ".join(filter(None, (error.context, error.problem))))
    mark = error.problem_mark or error.context_mark
    return f"{words} in line {mark.line + 1}, column {mark.column + 1}" if mark else words


class _BoundedLoader(yaml.SafeLoader):
    """Counts what it composes before anything is made of it."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._values = 0
        self._open: set[str] = set()
        self._values_of: dict[str, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        mark, anchor = event.start_mark, str(getattr(event, "anchor", None) or "")
        is_alias = isinstance(event, yaml.AliasEvent)
        if is_alias and anchor in self._open:
            raise yaml.composer.ComposerError(None, None, f"{anchor!r} contains itself", mark)
        if self._depth >= DEEPEST:
            raise yaml.composer.ComposerError(None, None, "values nested too deeply", mark)
        before = self._values
        self._depth += 1
        if anchor and not is_alias:
            self._open.add(anchor)
        node = super().compose_node(parent, index)
        self._depth -= 1
        self._values += self._values_of.get(anchor, 0) if is_alias else 1
        if self._values > MOST_VALUES:
            raise yaml.composer.ComposerError(None, None, "too many values", mark)
        if anchor and not is_alias:
            self._open.discard(anchor)
            self._values_of[anchor] = self._values - before
        return node
