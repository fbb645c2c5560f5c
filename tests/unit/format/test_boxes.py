"""Boxes against NumPy's slices: how many elements they hold, and where two of them meet."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpointer.format.boxes import Box, overlap, whole

ANY = settings(max_examples=200, deadline=None)


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


@ANY
@given(pairs)
def test_the_overlap_of_two_boxes_is_the_elements_that_both_hold(case) -> None:
    shape, a, b = case
    everything = numbered(shape)
    both = np.intersect1d(everything[slices(a)], everything[slices(b)])
    found = overlap(a, b)
    assert found == overlap(b, a)
    assert (found is None) == (both.size == 0)
    if found is not None:
        assert np.array_equal(everything[slices(found)].ravel(), both)


@ANY
@given(shapes.flatmap(lambda shape: st.tuples(st.just(shape), box_in(shape))))
def test_a_box_has_as_many_elements_as_its_slice_and_the_whole_has_all(case) -> None:
    shape, box = case
    assert box.numel == numbered(shape)[slices(box)].size
    assert numbered(shape)[slices(whole(shape))].size == whole(shape).numel == prod(shape)
