"""Component trees as data, without torch: what stands there in one word, spelled out. See FORMAT.md, "Trees"."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from typing import Any

from checkpointer.errors import CorruptCheckpointError
from checkpointer.format.index import Json

MOST_COUNTED = 1_000_000
"""Numbers that one tree may stand for in one word, so that a forged one cannot use up memory."""


def spelled_out(tree: Json, keys: Iterable[str]) -> Json:
    """``tree`` with ``$tensors``, ``$slots`` and ``$count`` replaced by the entries that they stand for.

    ``keys``: those of the component's tensors, in the order of the table. For those who walk trees; decoding needs no
    such copy.

    Raises:
        CorruptCheckpointError: a prefix that no tensor has, a tensor in two such dicts, too many numbers.
    """
    return _Speller(keys).spell(tree)


class _Speller:
    def __init__(self, keys: Iterable[str]) -> None:
        self._rows = sorted((key, row) for row, key in enumerate(keys))
        self._spread: set[str] = set()
        self._counted = 0

    def spell(self, node: Json) -> Json:
        if isinstance(node, list):
            return [self.spell(item) for item in node]
        if not isinstance(node, dict):
            return node
        if len(node) == 1:
            ((tag, payload),) = node.items()
            if tag == "$tensors":
                return self._tensors(payload)
            if tag == "$slots":
                return self._slots(payload)
            if tag == "$count":
                return self._count(payload)
        return {key: self.spell(item) for key, item in node.items()}

    def _tensors(self, prefix: Json) -> Json:
        found: dict[str, Json] = {name: {"$tensor": key} for key, name in self._below(prefix)}
        return {"$dict": [[name, node] for name, node in found.items()]} if any(n[:1] == "$" for n in found) else found

    def _slots(self, prefix: Json) -> Json:
        found: dict[int, dict[str, Json]] = {}
        for key, rest in self._below(prefix):
            number, dot, slot = rest.partition(".")
            if not dot or not number.isascii() or not number.isdecimal():
                raise CorruptCheckpointError(f"tensor {key[:80]!r} is no slot of a parameter with a number")
            found.setdefault(int(number), {})[slot] = {"$tensor": key}
        pairs: list[Json] = [[number, slots] for number, slots in found.items()]
        return {"$dict": pairs}

    def _count(self, payload: Json) -> Json:
        pair: Any = payload
        if not isinstance(pair, list) or [type(item) for item in pair] != [int, int] or min(pair) < 0:
            raise CorruptCheckpointError("$count is no pair of numbers")
        start, count = pair
        self._counted += count
        if self._counted > MOST_COUNTED:
            raise CorruptCheckpointError(f"more than {MOST_COUNTED} integers are counted in one tree")
        return list(range(start, start + count))

    def _below(self, prefix: Json) -> list[tuple[str, str]]:
        """Every tensor whose key begins with ``prefix``, in the order of the table: its key, and the rest of that."""
        if not isinstance(prefix, str) or (prefix and not prefix.endswith(".")):
            raise CorruptCheckpointError("the prefix of a dict of tensors does not end in a dot")
        last = (prefix[:-1] + "/", -1) if prefix else (chr(0x10FFFF) * 2, 0)  # what sorts behind all of them
        rows = self._rows[bisect_left(self._rows, (prefix, -1)) : bisect_left(self._rows, last)]
        keys = [key for key, _ in sorted(rows, key=lambda row: row[1])]
        if not keys or not self._spread.isdisjoint(keys):
            raise CorruptCheckpointError(f"no tensor begins with {prefix[:80]!r}, or one is in two dicts of tensors")
        self._spread.update(keys)
        return [(key, key[len(prefix) :]) for key in keys]
