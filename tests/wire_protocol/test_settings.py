"""Settings: a typo stops the program with the nearest known key."""

from __future__ import annotations

import pytest
from pydantic import Field

from wire_protocol.errors import ConfigError
from wire_protocol.settings import Settings, parse_settings


class Inner(Settings):
    speed: float = Field(1.0, gt=0)


class Outer(Settings):
    server: str = "here"
    count: int = 3
    inner: Inner | None = None
    many: dict[str, Inner] = Field(default_factory=dict)


def parse(text: str, **environ: str) -> Outer:
    return parse_settings(Outer, text, source="file.yml", environ=environ, prefix="APP_")


def test_an_empty_file_gives_the_defaults() -> None:
    assert parse("") == Outer()


def test_the_environment_overrides_the_file_also_inside() -> None:
    settings = parse("count: 1\ninner: {speed: 2}", APP_COUNT="5", APP_INNER__SPEED="0.5")
    assert (settings.count, settings.inner) == (5, Inner(speed=0.5))


def test_other_variables_with_the_prefix_are_left_alone() -> None:
    assert parse("", APP_SETTINGS="/etc/x", APP="y") == Outer()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sever: there", "file.yml: unknown key 'sever'; did you mean 'server'?"),
        ("inner: {sped: 2}", "unknown key 'inner.sped'; did you mean 'speed'?"),
        ("many: {a: {sped: 2}}", "unknown key 'many.a.sped'; did you mean 'speed'?"),
        ("zzz: 1", "known keys: count, inner, many, server"),
        ("count: many", "count: "),
        ("inner: {speed: 0}", "inner.speed: "),
        ("- a", "must hold keys and values"),
        ("a: [", "not YAML"),
    ],
)
def test_a_mistake_is_one_line_that_says_where_and_what(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 78
