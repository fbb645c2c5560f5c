"""Boxes against NumPy's slices: how many elements they hold, and where two of them meet."""

from __future__ import annotations

from math import prod

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpointer.format.boxes import overlap, whole
from tests.support.boxes import box_in, numbered, pairs, shapes, slices

ANY = settings(max_examples=200, deadline=None)


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
