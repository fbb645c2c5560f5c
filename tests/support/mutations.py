"""Changes to files that are valid: of single bytes, and of JSON as a structure. Each takes its luck from ``random``."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any, TypeAlias

Json: TypeAlias = Any
Place: TypeAlias = tuple[Any, ...]
DEEPEST = 40

NUMBERS = (
    0, -1, 1, 2, 7, 63, 64, 65, 255, 4096, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, -(2**63), 2**64, 10**400,
    0.5, -0.0, 1e308, -1e308, 1e-320,
)  # fmt: skip
TEXTS = (
    "", ".", "..", "../x", "/etc/passwd", "a/../../b", "\0", "\x1b[31m", "\u202egpj.exe", "\ufeff", "\ud800",
    "é", "e\u0301",
    "／", "nan", "NaN", "inf", "$tensor", "$dict", "$custom", "__class__", "os.system", "x" * 300, "0" * 32, "f" * 32,
    "checkpoint-1", "model.safetensors", "index.json", "manifest.json", "float64", "cuda:99", "meta",
)  # fmt: skip
TAGS = (
    "$tensor", "$tuple", "$set", "$frozenset", "$dict", "$odict", "$counter", "$defaultdict", "$deque", "$bytes",
    "$int",
    "$float", "$complex", "$slice", "$range", "$size", "$dtype", "$device", "$datetime", "$timedelta", "$path",
    "$ndarray",
    "$npscalar", "$sparse", "$quantized", "$subclass", "$custom", "$parameter", "$leaf", "$unknown",
)  # fmt: skip
WORDS = (
    b"{", b"}", b"[", b"]", b":", b",", b'"', b"\\u0000", b"null", b"true", b"NaN", b"Infinity", b"1e999", b"-",
    b"9" * 5000,
    b"\xff", b"\xef\xbb\xbf", b"\0", b"\n", b"[" * 3000, b'{"a":' * 3000, b"&a ", b"*a", b"!!python/object:os.system ",
    b"<<: ", b"? ", b"- ", b"|", b">", b"%YAML 9.9\n", b"---\n", b"2**63", b"0x10", b"1:30", b".inf", b"\t",
)  # fmt: skip


def change_bytes(data: bytes, random: Random) -> bytes:
    """One to four changes: flip, set, insert, delete, duplicate, move, truncate, or a word of the grammar."""
    for _ in range(random.randint(1, 4)):
        data = _change_bytes_once(data, random)
    return data


def _change_bytes_once(data: bytes, random: Random) -> bytes:
    at = random.randint(0, len(data))
    to = min(len(data), at + random.choice((1, 1, 2, 8, 40, 400)))
    kind = random.randint(0, 7)
    if kind == 0 and at < len(data):
        return data[:at] + bytes([data[at] ^ (1 << random.randint(0, 7))]) + data[at + 1 :]
    if kind == 1 and at < len(data):
        return data[:at] + bytes([random.randint(0, 255)]) + data[at + 1 :]
    if kind == 2:
        return data[:at] + random.choice(WORDS) + data[at:]
    if kind == 3:
        return data[:at] + data[to:]
    if kind == 4:
        return data[:to] + data[at:to] * random.choice((1, 2, 50)) + data[to:]
    if kind == 5:
        other = random.randint(0, len(data))
        return data[:other] + data[at:to] + data[other:]
    if kind == 6:
        return data[:at]
    return data[:at] + random.choice(WORDS) + data[to:]


def places(value: Json) -> list[Place]:
    """The way to everything inside a JSON value, as far as ``DEEPEST`` levels down."""
    found: list[Place] = []
    waiting: list[tuple[Place, Json]] = [((), value)]
    while waiting:
        at, node = waiting.pop()
        found.append(at)
        inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        waiting += [((*at, key), item) for key, item in inner if len(at) < DEEPEST]
    return found


def change_json(value: Json, random: Random) -> Json:
    """One to three changes of a JSON value as a structure; the value itself stays as it is."""
    value = copy.deepcopy(value)
    for _ in range(random.randint(1, 3)):
        found = places(value)
        if len(found) > 1:
            _change_json_once(value, found, random)
    return value


def _change_json_once(value: Json, found: list[Place], random: Random) -> None:
    *way, key = random.choice(found[1:])
    holder = _at(value, way)
    kind = random.randint(0, 6)
    if kind == 0:
        del holder[key]
    elif kind == 1:
        holder[key] = copy.deepcopy(_at(value, random.choice(found)))
    elif kind == 2 and isinstance(holder, dict):
        holder[random.choice(TEXTS)] = holder.pop(key)
    elif kind == 3 and isinstance(holder[key], str):
        text = holder[key]
        holder[key] = random.choice((text[:-1], text + "x", text.upper(), text * 2, "\u202e" + text, text[::-1]))
    elif kind == 4 and isinstance(holder[key], (int, float)):
        number = holder[key]
        holder[key] = random.choice((number + 1, number - 1, -number, number * 2, str(number), float(number % 2**60)))
    elif kind == 5:
        holder[key] = {random.choice(TAGS): copy.deepcopy(holder[key])}
    else:
        holder[key] = any_json(random)


def any_json(random: Random, depth: int = 3) -> Json:
    """Generated from nothing: numbers at borders, names that mean something, tags, deep nesting."""
    kind = random.randint(0, 9 if depth else 5)
    if kind <= 1:
        return random.choice(NUMBERS)
    if kind <= 3:
        return random.choice(TEXTS)
    if kind <= 5:
        return random.choice((None, True, False, [], {}))
    if kind == 6:
        return [any_json(random, depth - 1) for _ in range(random.randint(0, 4))]
    if kind == 7:
        return {random.choice(TEXTS): any_json(random, depth - 1) for _ in range(random.randint(0, 4))}
    if kind == 8:
        return {random.choice(TAGS): any_json(random, depth - 1)}
    return nested(random.choice((50, 200)), random)


def nested(depth: int, random: Random) -> Json:
    """A value inside ``depth`` others."""
    value: Json = 1
    tag = random.choice(("", "a", *TAGS))
    for _ in range(depth):
        value = {tag: value} if tag else [value]
    return value


def text_of(value: Json, random: Random) -> bytes:
    """JSON text, now and then with a key twice, or with what only Python takes for JSON."""
    text = json.dumps(value)
    if random.randint(0, 9) == 0:
        text = text.replace("{", '{"step": 1, "step": 2, ', 1)
    if random.randint(0, 9) == 0:
        text = text.replace("0", random.choice(("NaN", "1e999", "-Infinity", "00")), 1)
    return text.encode("utf-8", "surrogatepass")


def _at(value: Json, way: Any) -> Json:
    for key in way:
        value = value[key]
    return value
