"""JSON for files that may be hostile: no duplicate keys, no NaN literals, and no error but one.

A *sealed* file is an indented JSON object whose last member is ``checksum``: the xxh3-128 of all bytes before the
comma that precedes it. Any changed byte shows, with no other file needed. A sealed line is the same without the line
breaks and spaces.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import xxhash

from checkpointer.errors import CorruptCheckpointError

_TAIL = re.compile(rb',\n  "checksum": "([0-9a-f]{32})"\n}\n')
_TAIL_LENGTH = len(b',\n  "checksum": ""\n}\n') + 32


def seal(fields: Mapping[str, object]) -> bytes:
    """A sealed file with ``fields``, one line each."""
    lines = [f"  {dumps(name)}: {dumps(value)}" for name, value in fields.items()]
    head = ("{\n" + ",\n".join(lines)).encode("ascii")
    return head + b',\n  "checksum": "' + xxhash.xxh3_128_hexdigest(head).encode("ascii") + b'"\n}\n'


def unseal(data: bytes, where: str) -> dict[str, Any]:
    """The fields of a sealed file; ``where`` names it in errors.

    Raises:
        CorruptCheckpointError: truncated, changed, or never sealed.
    """
    tail = _TAIL.fullmatch(data[-_TAIL_LENGTH:])
    if not tail:
        raise CorruptCheckpointError(f"{where} is truncated or damaged ({len(data)} bytes, no checksum at its end)")
    if xxhash.xxh3_128_hexdigest(data[:-_TAIL_LENGTH]).encode("ascii") != tail[1]:
        raise CorruptCheckpointError(f"{where} is damaged: its bytes do not match its checksum")
    return mapping(loads(data, where), where)


_LINE_TAIL = re.compile(rb',"checksum":"([0-9a-f]{32})"}')
_LINE_TAIL_LENGTH = len(b',"checksum":""}') + 32


def seal_line(fields: Mapping[str, object]) -> bytes:
    """As ``seal``, in one line: for files that grow by records, of which each is whole or not by itself."""
    head = dumps(fields)[:-1].encode("ascii")
    return head + b',"checksum":"' + xxhash.xxh3_128_hexdigest(head).encode("ascii") + b'"}\n'


def unseal_line(line: bytes, where: str) -> dict[str, Any]:
    """The fields of a sealed line, which is given without the line break at its end.

    Raises:
        CorruptCheckpointError: truncated, changed, or never sealed.
    """
    tail = _LINE_TAIL.fullmatch(line[-_LINE_TAIL_LENGTH:])
    head = line[:-_LINE_TAIL_LENGTH]
    if not tail or xxhash.xxh3_128_hexdigest(head).encode("ascii") != tail[1]:
        raise CorruptCheckpointError(f"{where} is damaged: its bytes do not match its checksum")
    return mapping(loads(line, where), where)


SLICE = 200
"""Entries of a dict or list that are encoded at a time."""

MAX_LEVELS = 8
"""Levels that are looked through for long dicts and lists."""


def dumps(value: object, *, indent: int | None = None) -> str:
    """Compact (or indented) ASCII JSON; NaN and infinity are refused, for JSON has no word for them."""
    if indent is None:
        return "".join(_pieces(value, MAX_LEVELS))
    return json.dumps(value, allow_nan=False, indent=indent)


def _pieces(value: object, levels: int) -> Iterator[str]:
    """The text of ``value``, piece by piece: one call for all of it would hold the GIL for a tenth of a second."""
    kind = type(value)
    if levels == 0 or (kind is not dict and kind is not list) or not value:
        yield _encode(value)
        return
    assert isinstance(value, (dict, list))
    brackets = "{}" if isinstance(value, dict) else "[]"
    yield brackets[0]
    if len(value) > SLICE:
        entries = iter(value.items() if isinstance(value, dict) else value)
        separator = ""
        while part := list(islice(entries, SLICE)):
            yield separator + _encode(kind(part))[1:-1]
            separator = ","
    elif isinstance(value, dict):
        separator = ""
        for key, item in value.items():
            yield separator + _encode({key: None})[1:-5]
            yield from _pieces(item, levels - 1)
            separator = ","
    else:
        separator = ""
        for item in value:
            yield separator
            yield from _pieces(item, levels - 1)
            separator = ","
    yield brackets[1]


_encode = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode


def loads(data: bytes, what: str) -> Any:
    """Parse ``data``.

    Raises:
        CorruptCheckpointError: naming ``what``; not JSON, nested too deeply, or a key given twice.
    """
    try:
        return json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpointError(f"{what} is not valid JSON: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:40]} is too large")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def integer(value: object, what: str, *, low: int = 0, high: int = 2**63 - 1) -> int:
    """``value`` if it is an integer between ``low`` and ``high`` (a bool is not)."""
    if type(value) is not int or not low <= value <= high:
        raise CorruptCheckpointError(f"{what} must be an integer from {low} to {high}, found {str(value)[:40]!r}")
    return value


def integers(value: object, what: str) -> tuple[int, ...]:
    """``value`` as a tuple of non-negative integers."""
    return tuple([integer(item, what) for item in array(value, what)])


def array(value: object, what: str) -> list[Any]:
    """``value`` if it is a JSON array."""
    if type(value) is not list:
        raise CorruptCheckpointError(f"{what} must be an array, found {type(value).__name__}")
    return value


def mapping(value: object, what: str) -> dict[str, Any]:
    """``value`` if it is a JSON object."""
    if type(value) is not dict:
        raise CorruptCheckpointError(f"{what} must be an object, found {type(value).__name__}")
    return value


def string(value: object, what: str) -> str:
    """``value`` if it is a string."""
    if type(value) is not str:
        raise CorruptCheckpointError(f"{what} must be a string, found {type(value).__name__}")
    return value


def digest(value: object, what: str) -> str:
    """``value`` if it is an xxh3-128 hash: 32 lower-case hexadecimal digits."""
    text = string(value, f"hash of {what!r}")
    if len(text) != 32 or text.strip("0123456789abcdef"):
        raise CorruptCheckpointError(f"hash of {what!r} must be 32 hexadecimal digits")
    return text
