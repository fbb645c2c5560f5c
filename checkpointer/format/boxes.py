"""Boxes of tensors, as numbers: where they begin, how long they are, and where two of them meet.

A box is given by its ``offsets`` in a tensor and its ``lengths``, one number for each dimension. In a tensor of shape
(2, 3), whose elements lie row-major in this order::

    0 1 2
    3 4 5

``Box((0, 1), (2, 2))`` holds 1, 2, 4 and 5. With ``Box((1, 0), (1, 2))``, which holds 3 and 4, it shares
``Box((1, 1), (1, 1))``: the 4.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple


class Box(NamedTuple):
    """A part of a tensor."""

    offsets: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements."""
        return prod(self.lengths)


def whole(shape: tuple[int, ...]) -> Box:
    """The box of all elements."""
    return Box((0,) * len(shape), shape)


def overlap(a: Box, b: Box) -> Box | None:
    """What both hold; ``None`` where that is no element."""
    begins = tuple(max(pair) for pair in zip(a.offsets, b.offsets, strict=True))
    ends = (
        min(start + length, other_start + other_length)
        for start, length, other_start, other_length in zip(*a, *b, strict=True)
    )
    lengths = tuple(end - begin for begin, end in zip(begins, ends, strict=True))
    return Box(begins, lengths) if all(length > 0 for length in lengths) else None
