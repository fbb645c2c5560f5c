"""Samples of memory: they show whether the bytes that are written are those that were there at the ``save`` call.

PyTorch does not show every write (``tensor.data``, NumPy views, kernels of others). So some cache lines of every tensor
are noted in the call, other ones in each save, and compared with what was copied later.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from checkpointer.system.memory import view_of

LINE = 64
"""Bytes that are noted together: a cache line, since reading one byte of it from memory takes as long."""

LINES_PER_MIB = 4

FEWEST_LINES = 8
"""Of each tensor. Tensors that have no more are noted whole."""

MOST_LINES = 1 << 15
"""Of all tensors together, where the fewest of each are less: the call takes milliseconds whatever the model's size."""

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1

Integers = NDArray[np.int64]
Bytes = NDArray[np.uint8]


class Span(Protocol):
    """The memory of one tensor, and where its bytes go in what is written."""

    address: int
    size: int
    place: int


class Sample:
    """What was noted of some spans. Answers are numbers of spans."""

    def __init__(self, items: Sequence[Items]) -> None:
        self._items = items

    def differs_from(self, block: memoryview, place: int) -> int | None:
        """A span of which other bytes were noted than ``block`` has, which begins at ``place`` in what is written."""
        return _first(items.differs_from(block, place) for items in self._items)

    def differs_from_memory(self, begin: int, end: int) -> int | None:
        """A span of which other bytes were noted than its memory has now, from place ``begin`` to ``end``."""
        return _first(items.differs_from_memory(begin, end) for items in self._items)


def _first(answers: Any) -> int | None:
    return next((answer for answer in answers if answer is not None), None)


class Items:
    """Pieces of equal width that were noted, in the order of their places."""

    def __init__(self, spans: Integers, places: Integers, noted: Bytes, addresses: Integers | None = None) -> None:
        """``noted``: a row for each item. ``addresses``: where they are in memory, if the processor can read it."""
        self._spans = spans
        self._places = places
        self._noted = noted
        self._addresses = addresses
        self._width = noted.shape[1]

    def differs_from(self, block: memoryview, place: int) -> int | None:
        end = place + len(block)
        first, last = self._touching(place, end)
        whole = int(np.searchsorted(self._places, place))
        cut = max(whole, int(np.searchsorted(self._places, end - self._width, side="right")))
        if whole < cut:
            found = _windows(block, self._width)[self._places[whole:cut] - place]
            answer = self._differing(whole, _rows(found, self._width))
            if answer is not None:
                return answer
        for item in (*range(first, whole), *range(cut, last)):  # one that begins or ends in another block
            begin = int(self._places[item])
            here = slice(max(begin, place), min(begin + self._width, end))
            noted = self._noted[item, here.start - begin : here.stop - begin]
            if noted.tobytes() != block[here.start - place : here.stop - place]:
                return int(self._spans[item])
        return None

    def differs_from_memory(self, begin: int, end: int) -> int | None:
        first, last = self._touching(begin, end)
        if self._addresses is None or first >= last:
            return None
        return self._differing(first, read(self._addresses[first:last], self._width))

    def _touching(self, begin: int, end: int) -> tuple[int, int]:
        """The items of which a byte lies from ``begin`` to ``end``: the first, and the first after."""
        first = int(np.searchsorted(self._places, begin - self._width, side="right"))
        return first, int(np.searchsorted(self._places, end))

    def _differing(self, first: int, found: Bytes) -> int | None:
        noted = self._noted[first : first + len(found)]
        if np.array_equal(noted, found):
            return None
        return int(self._spans[first + int((noted != found).any(axis=1).argmax())])


class Sampler:
    """Notes samples, save after save. Where to look is worked out once for tensors of the same sizes."""

    def __init__(self) -> None:
        self._sizes: Integers = np.empty(0, dtype=np.int64)
        self._plans: list[_Plan] = []

    def take(self, spans: Sequence[Span], seed: int) -> list[Items]:
        """A sample of the memory of ``spans``; which lines is decided by ``seed``, and no random generator is used."""
        addresses, sizes, places = (
            np.fromiter(map(attrgetter(column), spans), np.int64, len(spans)) for column in ("address", "size", "place")
        )
        if not np.array_equal(sizes, self._sizes):
            self._sizes, self._plans = sizes, _plans(sizes)
        return [_note(plan, addresses, places, seed) for plan in self._plans]


class _Plan(NamedTuple):
    """Items of one width. Each lies somewhere in a stretch of its span: there are as many stretches as items."""

    width: int
    spans: Integers
    first: Integers
    """The first line of the stretch."""
    lines: NDArray[np.uint64]
    """Lines of the stretch."""
    last: Integers
    """Where the last item of the span begins: what is left behind its last whole line is noted together with it."""
    phase: NDArray[np.uint64]
    """Makes the places in the stretches differ, so that no regular pattern of changes falls between them."""

    def offsets(self, seed: int) -> Integers:
        """Byte offsets in the spans, other ones for each seed."""
        moved = (self.phase + np.uint64(scrambled(seed) >> 32)) & np.uint64(0xFFFFFFFF)
        line = self.first + (moved * self.lines >> np.uint64(32)).astype(np.int64)
        offsets: Integers = np.minimum(line * self.width, self.last)
        return offsets


def _plans(sizes: Integers) -> list[_Plan]:
    small = sizes < LINE
    lines = np.where(small, 0, -(-sizes // LINE))
    wanted = np.minimum(lines, _wanted(lines))
    every_byte = np.where(small, sizes, 0)
    plans = (_plan(LINE, lines, wanted, sizes), _plan(1, every_byte, every_byte, sizes))
    return [plan for plan in plans if len(plan.spans)]


def _wanted(lines: Integers) -> Integers:
    """How many lines of each span are worth noting."""
    share = lines * LINES_PER_MIB * LINE >> 20
    total = int(share.sum())
    if total > MOST_LINES:
        share = (share * (MOST_LINES / total)).astype(np.int64)
    wanted: Integers = np.maximum(share, FEWEST_LINES)
    return wanted


def _plan(width: int, lines: Integers, wanted: Integers, sizes: Integers) -> _Plan:
    """``wanted`` of the ``lines`` of each span."""
    spans = np.repeat(np.arange(len(sizes)), wanted)
    number = np.arange(len(spans)) - np.repeat(np.cumsum(wanted) - wanted, wanted)
    lines, wanted = lines[spans], wanted[spans]
    first = number * lines // np.maximum(wanted, 1)
    behind = (number + 1) * lines // np.maximum(wanted, 1)
    phase = np.arange(len(spans), dtype=np.uint64) * np.uint64(_GOLDEN) >> np.uint64(32)
    return _Plan(width, spans, first, (behind - first).astype(np.uint64), sizes[spans] - width, phase)


def _note(plan: _Plan, addresses: Integers, places: Integers, seed: int) -> Items:
    offsets = plan.offsets(seed)
    where = addresses[plan.spans] + offsets
    return Items(plan.spans, places[plan.spans] + offsets, read(where, plan.width), where)


class Comb(NamedTuple):
    """Lines at equal distances: for memory that the processor cannot read, where positions would have to be sent to."""

    first: int
    """The byte offset of the first."""
    step: int
    """Bytes from one to the next."""
    lines: int

    @property
    def offsets(self) -> Integers:
        """Of all lines, in bytes."""
        return self.first + self.step * np.arange(self.lines)


def comb(size: int, seed: int) -> Comb:
    """Lines of ``size`` bytes, at least one line; other ones for each seed."""
    count = min(max(size * LINES_PER_MIB >> 20, FEWEST_LINES), size // LINE)
    step = size // LINE // count * LINE
    spare = size - LINE - (count - 1) * step
    return Comb(scrambled(seed) % (spare + 1), step, count)


def scrambled(seed: int) -> int:
    """64 bits that look random (the finalizer of splitmix64): seeds in any rhythm give places all over a stretch."""
    bits = (seed + 1) * _GOLDEN & _MASK
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB & _MASK
    return bits ^ bits >> 31


def read(addresses: Integers, width: int) -> Bytes:
    """``width`` bytes from each address, a row each: one call, whatever their number."""
    if not len(addresses):
        return np.empty((0, width), dtype=np.uint8)
    base = int(addresses.min())
    # All memory from the first address to the last as one array. Nothing of it is touched but what is indexed.
    memory = view_of(base, int(addresses.max()) - base + width)
    return _rows(_windows(memory, width)[addresses - base], width)


def _windows(memory: memoryview, width: int) -> NDArray[Any]:
    """The ``width`` bytes from each byte on, as one item each."""
    return np.ndarray((len(memory) - width + 1,), dtype=f"V{width}", buffer=memory, strides=(1,))


def _rows(items: NDArray[Any], width: int) -> Bytes:
    return items.view(np.uint8).reshape(len(items), width)
