"""Hostile input from a seed: messages, adapters, YAML and JSON that went wrong on purpose.

Every function takes a ``random.Random`` and gives the same bytes for the same seed, so a finding
is named by its seed and its number.
"""

from __future__ import annotations

import copy
import json
import random
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any

DEFLATED = b"legend.deflate/1\n"
"""First line of an adapter whose codec deflates."""

DEEP = 2_000
"""Nesting that overruns a recursive reader."""

NASTY_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 2**31, 2**53, 2**53 + 1, 2**63, 2**64, -(2**63), 10**400,
    0.0, -0.0, 1e-320, 1e308, -1e308, float("nan"), float("inf"), float("-inf"), 0.1,
    "", " ", "x" * 81, "x" * 501, "x" * 5_000, "\x00", "\ud800", "\u2028", "\r\n\x1b[31m", "../..",
    "/etc/passwd", "ab" * 32, "AB" * 32, "١٢٣", "1", "NaN", "legend.birth/1", "legend.update/2",
    "a.1-0.b", "mallory", "update-run-1", "%s%n", "{}", "null", "🦙" * 40,
    [], [[]], {}, [0] * 300, [1e999], {"": None}, {"a": {"a": {"a": {}}}}, ["x"] * 50,
    [[0, 4, 8]], [-1], [2**70], {"kind": "failure"}, {"type": "rebirth", "jitter_s": 1e9},
)  # fmt: skip

TOKENS: tuple[bytes, ...] = (
    b"\x00", b"\xff", b"\xed\xa0\x80", b"\xc3\x28", b"\xf0\x9f", b"\xef\xbb\xbf", b"{", b"}", b"[",
    b"]", b'"', b"\\", b"\\u0000", b"\\ud800", b"NaN", b"-Infinity", b"1e999", b"-0", b"9" * 30,
    b"9" * 5000, b"null", b"true", b",", b":", b"\n", b"/*", b"[" * DEEP, b'{"a":' * DEEP,
)  # fmt: skip


def case(seed: int | str, number: int) -> random.Random:
    """The source of one case; the same on every machine."""
    return random.Random(f"{seed}/{number}")


def nasty(rng: random.Random) -> Any:
    """A value that was not expected; a copy, since documents are changed in place."""
    return copy.deepcopy(rng.choice(NASTY_VALUES))


def mutated_message(rng: random.Random, samples: Sequence[bytes]) -> bytes:
    """A message that is nearly one of the samples."""
    data = rng.choice(samples)
    if rng.random() < 0.6:
        data = mutated_json(rng, data)
    if rng.random() < 0.5:
        data = mutated_bytes(rng, data, samples)
    return data


def mutated_json(rng: random.Random, data: bytes) -> bytes:
    """Other values, other names, other nesting; still JSON, or nearly."""
    document = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        document = _changed(rng, document)
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=rng.random() < 0.7)
    if rng.random() < 0.15:
        text = _with_a_key_twice(rng, text)
    return text.encode(errors="surrogatepass")


def mutated_bytes(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Bits flipped, pieces lost, doubled or exchanged, and text that parsers trip over."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        place = rng.randrange(len(changed) + 1)
        end = min(len(changed), place + rng.randrange(1, 40))
        kind = rng.randrange(6)
        if kind == 0 and place < len(changed):
            changed[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del changed[place:end]
        elif kind == 2:
            changed[place:place] = changed[place:end]
        elif kind == 3:
            changed[place:place] = rng.choice(TOKENS)
        elif kind == 4:
            del changed[place:]
        else:
            other = rng.choice(others)
            cut = rng.randrange(len(other) + 1)
            changed[place:] = other[cut:]
    return bytes(changed)


def mutated_adapter(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file with a hostile header or hostile numbers, deflated if it was."""
    if data.startswith(DEFLATED):
        inside = mutated_adapter(rng, zlib.decompress(data[len(DEFLATED) :]))
        packed = DEFLATED + zlib.compress(inside, 1)
        return mutated_bytes(rng, packed, [packed]) if rng.random() < 0.2 else packed
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    kind = rng.randrange(8)
    if kind == 0:
        sizes = (0, 1, length - 1, length + 1, 2**31, 2**40, 2**63, 2**64 - 1, 100_000_001)
        return struct.pack("<Q", rng.choice(sizes)) + data[8:]
    if kind == 1 and body:
        for _ in range(rng.choice((1, 3))):
            place = rng.randrange(0, max(1, len(body) - 4), 4)
            bits = rng.choice((b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\x00\x00\x80\xff"))
            body[place : place + 4] = bits
    elif kind == 2:
        return mutated_bytes(rng, data, [data])
    elif kind == 3:
        text = _with_a_key_twice(rng, json.dumps(header))
        return _with_header(text.encode(), body)
    elif kind == 4:
        deep = rng.choice(("[", '{"a":')) * DEEP
        return _with_header(json.dumps(header).encode()[:-1] + f',"x":{deep}'.encode(), body)
    else:
        for _ in range(rng.choice((1, 2))):
            _damage_entry(rng, header)
    if rng.random() < 0.2:
        del body[rng.randrange(len(body) + 1) :]
    text = json.dumps(header)
    return _with_header(text.encode() + b" " * (-len(text) % 8), body)


def mutated_yaml(rng: random.Random, text: str) -> str:
    """A settings file that a person could have broken, or somebody who means harm."""
    lines = text.splitlines() or [""]
    for _ in range(rng.choice((1, 1, 2, 4))):
        place = rng.randrange(len(lines))
        piece = rng.choice(YAML_PIECES)
        kind = rng.randrange(5)
        if kind == 0:
            lines[place] = lines[place].partition(":")[0] + ": " + piece
        elif kind == 1:
            lines.insert(place, piece)
        elif kind == 2:
            lines[place] = " " * rng.randrange(4) + lines[place]
        elif kind == 3:
            lines[place] = piece + ": " + lines[place].partition(":")[2]
        else:
            lines[place] = f"{lines[place].partition(':')[0]}: {json.dumps(nasty(rng))}"
    text = "\n".join(lines)
    if rng.random() < 0.2:
        place = rng.randrange(len(text) + 1)
        text = text[:place] + rng.choice("\x00\t\x85\u2028\ufeff&*!|>%@`{}[]") + text[place:]
    return text


def alias_bomb(levels: int = 9, width: int = 9) -> str:
    """The billion laughs: a few hundred bytes that stand for ``width ** levels`` values."""
    lines = ["a0: &a0 [x, x]"]
    for level in range(1, levels + 1):
        aliases = ", ".join([f"*a{level - 1}"] * width)
        lines.append(f"a{level}: &a{level} [{aliases}]")
    return "\n".join(lines) + "\n"


YAML_PIECES: tuple[str, ...] = (
    "&a [*a]", "*nobody", "&a x", "!!python/object/apply:os.system [true]", "!!timestamp x",
    "!!int ''", "!!int x", "!!float x", "!!binary x", "!!set {a, b}", "!!omap [a: 1]", "!!bool x",
    "!!null x", "2001-13-45", "2001-02-30 99:99:99", "0x", "0b", "0b2", "1__0", "1:99:99", ".nan",
    "-.inf", "1e999", "9" * 5000, "? [a]", "? {a: b}", "<<: *a", "<<: 1", "<<: [1]", "[", "{",
    "]", "'", '"', "|", ">", "%YAML 9.9", "---", "...", "- x", "~", "yes", "!<x> y", "[" * DEEP,
    "{a: " * DEEP, "k" * 5000, '"\\ud800"', '"\\x00"', "&" * 40, "a: b: c", "\t", "{[a]: b}",
)  # fmt: skip


def _changed(rng: random.Random, document: Any) -> Any:
    """The document with one of its places made different."""
    places = list(_places(document))
    if not places:
        return nasty(rng)
    holder, key = rng.choice(places)
    kind = rng.randrange(8)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice(("schema", "sid", "x", "\x00", "\ud800", "k" * 300))] = holder.pop(key)
    elif kind == 2:
        other, name = rng.choice(places)
        holder[key] = json.loads(json.dumps(other.get(name) if isinstance(other, dict) else other))
    elif kind == 3:
        holder[key] = [holder[key]] * rng.choice((1, 2, 40))
    elif kind == 4:
        holder[key] = {str(holder[key])[:60]: holder[key]}
    else:
        holder[key] = nasty(rng)
    return document


def _places(value: Any) -> Any:
    if not isinstance(value, (dict, list)):
        return
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield value, key
        if isinstance(inner, (dict, list)):
            yield from _places(inner)


def _with_a_key_twice(rng: random.Random, text: str) -> str:
    opened = [place for place, letter in enumerate(text) if letter == "{"]
    if not opened:
        return text
    place = rng.choice(opened) + 1
    end = text.find(":", place)
    key = text[place:end] if end > 0 else '"x"'
    comma = "" if text[place : place + 1] == "}" else ","
    return f"{text[:place]}{key}:{json.dumps(nasty(rng))}{comma}{text[place:]}"


def _with_header(header: bytes, body: bytes | bytearray) -> bytes:
    return struct.pack("<Q", len(header)) + header + bytes(body)


def _damage_entry(rng: random.Random, header: dict[str, Any]) -> None:
    name = rng.choice(list(header))
    entry = header[name]
    if name == "__metadata__" or rng.random() < 0.1:
        header[name] = nasty(rng)
        return
    choices: tuple[Callable[[], None], ...] = (
        lambda: entry.__setitem__("dtype", rng.choice(_DTYPES)),
        lambda: entry.__setitem__("shape", copy.deepcopy(rng.choice(_SHAPES))),
        lambda: entry.__setitem__("data_offsets", rng.choice(_OFFSETS)),
        lambda: entry.__setitem__(rng.choice(tuple(entry) or ("x",)), nasty(rng)),
        lambda: entry.pop(rng.choice(tuple(entry)), None) if entry else None,
        lambda: header.__setitem__(name + ".scale", dict(entry)),
        lambda: header.__setitem__(
            rng.choice((".scale", "", "\x00", "x" * 9000)), header.pop(name)
        ),
        lambda: header.__setitem__("again", dict(entry)),
    )
    if isinstance(entry, dict):
        rng.choice(choices)()


_DTYPES = (
    "F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "U16", "U32", "U64", "BOOL",
    "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "C64", "f32", "", "PICKLE",
)  # fmt: skip
_SHAPES: tuple[Any, ...] = (
    [], [0], [1], [2**31], [2**63], [2**64], [2**32, 2**32], [0, 2**63], [-1], [1] * 100, [1.5],
    ["1"], [[1]], None, [2**31, 0, 2**31],
)  # fmt: skip
_OFFSETS: tuple[Any, ...] = (
    [0, 0], [0, 1], [0, 4], [4, 0], [0, 2**40], [0, 2**64], [-4, 0], [8, 16], [0], [0, 4, 8], None,
    [2**63, 2**63 + 4],
)  # fmt: skip
