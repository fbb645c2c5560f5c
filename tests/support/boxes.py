"""Boxes that hypothesis draws, and NumPy's slices of them: ``pairs`` are two boxes in one shape."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
from hypothesis import strategies as st

from checkpointer.format.boxes import Box


def slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(begin, begin + length) for begin, length in zip(*box, strict=True))


def numbered(shape: Sequence[int]) -> np.ndarray:
    """Every element another number."""
    return np.arange(prod(shape), dtype=np.int64).reshape(shape)


shapes = st.lists(st.integers(1, 6), max_size=4).map(tuple)


@st.composite
def box_in(draw: st.DrawFn, shape: tuple[int, ...], least: int = 0) -> Box:
    begins = [draw(st.integers(0, size - least)) for size in shape]
    lengths = [draw(st.integers(least, size - begin)) for size, begin in zip(shape, begins, strict=True)]
    return Box(tuple(begins), tuple(lengths))


pairs = shapes.flatmap(lambda shape: st.tuples(st.just(shape), box_in(shape), box_in(shape)))
