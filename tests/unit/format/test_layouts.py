"""Layouts: which rank holds which box, against arrays that are really cut, and against torch's own arithmetic."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from checkpointer.errors import CorruptCheckpointError
from checkpointer.format.layouts import (
    BoxColumns,
    Cut,
    Form,
    Layout,
    Place,
    TensorColumns,
    check_columns,
    digits,
    parse_layout,
    piece,
    pieces_of,
    written_by,
)
from tests.support.boxes import box_in, numbered, slices

ANY = settings(max_examples=200, deadline=None)

meshes = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)
shapes = st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple)


@st.composite
def layouts(draw: st.DrawFn, dimensions: int = 3, mesh: tuple[int, ...] | None = None) -> Layout:
    mesh = mesh or draw(meshes)
    order = draw(st.permutations(range(len(mesh))))[: draw(st.integers(0, len(mesh)))]
    cuts = tuple(Cut(dimension, draw(st.integers(0, dimensions - 1))) for dimension in order)
    groups = draw(st.integers(1, 3))
    ranks = np.array(draw(st.permutations(range(groups * prod(mesh)))), np.int32)
    return Layout(Form(mesh, cuts), ranks.reshape(groups, -1))


cut_tensors = shapes.flatmap(lambda shape: st.tuples(st.just(shape), layouts(len(shape))))


def really_cut(shape: Sequence[int], layout: Layout) -> dict[int, np.ndarray]:
    """What each rank holds of the numbers of a tensor's elements, by cutting an array again and again."""
    found = {}
    for group, cell in itertools.product(range(len(layout.ranks)), range(layout.form.cells)):
        part, where = numbered(shape), np.unravel_index(cell, layout.form.mesh)
        for cut in layout.form.cuts:
            # torch.chunk leaves out the pieces that are empty
            pieces = torch.from_numpy(part).chunk(layout.form.mesh[cut.mesh], cut.dimension)
            number = int(where[cut.mesh])
            empty = part.take(range(0), axis=cut.dimension)
            part = pieces[number].numpy() if number < len(pieces) else empty
        found[int(layout.ranks[group, cell])] = part
    return found


@ANY
@given(cut_tensors)
def test_the_box_of_each_rank_is_what_cutting_the_tensor_leaves_to_it(drawn):
    shape, layout = drawn
    for rank, part in really_cut(shape, layout).items():
        place = layout.place_of(rank)
        assert place is not None
        box = layout.form.box(shape, place.shard)
        assert box.lengths == part.shape
        assert np.array_equal(numbered(shape)[slices(box)], part)
        assert layout.holders[place.replica, place.shard] == rank


@ANY
@given(cut_tensors, st.data())
def test_any_replica_writes_every_element_once(drawn, data):
    shape, layout = drawn
    owner = data.draw(st.integers(0, layout.replicas - 1))
    count = np.zeros(shape, int)
    ranks = []
    for rank, box in layout.boxes(shape, owner):
        count[slices(box)] += 1
        ranks.append(rank)
    assert (count == 1).all()
    assert ranks, "somebody writes a tensor without elements, too"
    assert len(set(ranks)) == len(ranks)


@ANY
@given(layouts())
def test_a_rank_knows_its_place_without_the_ranks_of_the_layout(layout):
    for group, cell in itertools.product(range(len(layout.ranks)), range(layout.form.cells)):
        place = layout.form.place(group, cell)
        assert place == layout.place_of(int(layout.ranks[group, cell]))
        assert layout.form.position(place) == group * layout.form.cells + cell
    assert layout.place_of(len(layout.ranks.ravel())) is None


@ANY
@given(cut_tensors, st.data())
def test_the_shards_that_overlap_a_box_are_found(drawn, data):
    shape, layout = drawn
    box = data.draw(box_in(shape))
    wanted = set(numbered(shape)[slices(box)].ravel())
    every = [set(numbered(shape)[slices(layout.form.box(shape, shard))].ravel()) for shard in range(layout.form.shards)]
    assert layout.form.overlapping(shape, box).tolist() == [
        number for number, held in enumerate(every) if held & wanted
    ]


@ANY
@given(st.integers(0, 50), st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple))
def test_all_pieces_of_a_dimension_are_those_that_are_asked_for_one_by_one(size, parts):
    found = pieces_of(size, parts)
    for number, (begin, length) in enumerate(zip(*found, strict=True)):
        expected, left = 0, size
        for count, digit in zip(parts, digits(number, parts), strict=True):
            start, left = piece(left, count, digit)
            expected += start
        assert (int(begin), int(length)) == (expected, left)


# ------------------------------------------------------------------------------------ as torch cuts


def placements_of(form: Form) -> list[Placement]:
    """As torch writes an order of cuts: a dimension that is cut after ones to its right is strided."""
    found: list[Placement] = [Replicate() for _ in form.mesh]
    for number, cut in enumerate(form.cuts):
        earlier = [c.mesh for c in form.cuts[:number] if c.dimension == cut.dimension and c.mesh > cut.mesh]
        factor = prod(form.mesh[dimension] for dimension in earlier)
        found[cut.mesh] = _StridedShard(cut.dimension, split_factor=factor) if factor > 1 else Shard(cut.dimension)
    return found


def torch_agrees(shape: tuple[int, ...], form: Form) -> None:
    places = placements_of(form)
    for cell in range(form.cells):
        where = [int(x) for x in np.unravel_index(cell, form.mesh)]
        lengths, offsets = _compute_local_shape_and_global_offset(shape, form.mesh, where, places)
        box = form.box(shape, form.place(0, cell).shard)
        assert box.lengths == tuple(lengths)
        if box.numel:
            assert box.offsets == tuple(offsets)


@ANY
@given(cut_tensors)
def test_torch_has_the_same_boxes_where_mesh_dimensions_cut_from_left_to_right(drawn):
    shape, layout = drawn
    torch_agrees(shape, layout.form._replace(cuts=tuple(sorted(layout.form.cuts))))


@ANY
@given(layouts(), st.lists(st.integers(0, 3), min_size=3, max_size=3))
def test_torch_has_the_same_boxes_in_any_order_where_pieces_are_even(layout, times):
    """Uneven ones under ``_StridedShard`` are other boxes in torch itself, from version to version."""
    parts = layout.form.parts
    torch_agrees(tuple(factor * prod(parts.get(axis, ())) for axis, factor in enumerate(times)), layout.form)


def test_fsdp_over_tensor_parallelism_cuts_by_the_second_mesh_dimension_first():
    form = Form((2, 2), (Cut(1, 0), Cut(0, 0)))
    assert placements_of(form) == [_StridedShard(0, split_factor=2), Shard(0)]
    assert [form.box((8,), form.place(0, rank).shard).offsets for rank in range(4)] == [(0,), (4,), (2,), (6,)]


# ------------------------------------------------------------------------------------ whole tables


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[tuple[int, ...]], TensorColumns, list[Layout]]:
    mesh = draw(meshes)
    known = draw(st.lists(layouts(3, mesh), min_size=1, max_size=3))
    known = [Layout(layout.form, known[0].ranks) for layout in known]
    drawn = draw(st.lists(st.tuples(st.lists(st.integers(0, 9), min_size=0, max_size=4), st.integers(0, 2))))
    rows = [(tuple(shape), number % len(known)) for shape, number in drawn]
    rows = [(shape, number) for shape, number in rows if max(known[number].form.parts, default=-1) < len(shape)]
    owner = [draw(st.integers(0, known[number].replicas - 1)) for _, number in rows]
    return [shape for shape, _ in rows], columns([s for s, _ in rows], [n for _, n in rows], owner), known


def columns(shapes: Sequence[Sequence[int]], layout: Sequence[int], owner: Sequence[int]) -> TensorColumns:
    starts = np.cumsum([0, *map(len, shapes)])
    flat = np.array([size for shape in shapes for size in shape], np.int64)
    return TensorColumns(flat, starts.astype(np.int64), np.array(layout, np.int64), np.array(owner, np.int64))


def listed(found: BoxColumns) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    spans = list(itertools.pairwise(found.starts.tolist()))
    return [
        (number, tuple(found.offsets[b:e].tolist()), tuple(found.lengths[b:e].tolist()))
        for number, (b, e) in zip(found.tensors.tolist(), spans, strict=True)
    ]


@ANY
@given(tables())
def test_what_a_rank_wrote_of_a_table_is_what_each_tensor_says(drawn):
    shapes, table, known = drawn
    check_columns(table, known, "the table")
    expected: dict[int, list[object]] = {}
    for number, shape in enumerate(shapes):
        layout = known[table.layout[number]]
        for rank, box in layout.boxes(shape, int(table.owner[number])):
            expected.setdefault(rank, []).append((number, *box))
    for rank in range(known[0].ranks.size):
        assert listed(written_by(rank, table, known)) == expected.get(rank, [])


LARGE = 2**63 - 1


@pytest.mark.parametrize("size", [LARGE, LARGE - 1, 2**62 + 1])
@pytest.mark.parametrize("parts", [1, 2, 3, 1000])
def test_the_largest_sizes_are_cut_without_an_overflow(size, parts):
    found = pieces_of(size, (parts,))
    assert [tuple(map(int, pair)) for pair in zip(*found, strict=True)] == [piece(size, parts, n) for n in range(parts)]
    assert sum(map(int, found.lengths)) == size


# ------------------------------------------------------------------------------------ from anywhere

PAIR = np.arange(2, dtype=np.int32)[None]
COLUMNS = Form((2,), (Cut(0, 1),))
GOOD = {"mesh": [2, 2], "cuts": [[1, 0], [0, 0]]}


@ANY
@given(layouts())
def test_a_layout_comes_back_from_its_json(layout):
    found = parse_layout(layout.form.to_json(), layout.ranks.ravel(), layout.ranks.size, "layout")
    assert found.form == layout.form
    assert np.array_equal(found.ranks, layout.ranks)


@pytest.mark.parametrize(
    "change,ranks",
    [
        ({}, [0, 1, 2]),
        ({}, []),
        ({}, [0, 1, 2, 2]),
        ({}, [0, 1, 2, -1]),
        ({}, [0, 1, 2, 8]),
        ({}, [0, 1, 2, 3, 4, 5, 6, 3]),
        ({}, list(range(12))),
        ({"mesh": []}, [0]),
        ({"mesh": [0, 4]}, [0, 1, 2, 3]),
        ({"mesh": [2**40, 2**40]}, [0, 1, 2, 3]),
        ({"mesh": [-2, -2]}, [0, 1, 2, 3]),
        ({"mesh": [2.0, 2]}, [0, 1, 2, 3]),
        ({"mesh": [1] * 15 + [2, 2]}, [0, 1, 2, 3]),
        ({"mesh": None}, [0, 1, 2, 3]),
        ({"cuts": [[0, 0], [0, 1]]}, [0, 1, 2, 3]),
        ({"cuts": [[2, 0]]}, [0, 1, 2, 3]),
        ({"cuts": [[0, 64]]}, [0, 1, 2, 3]),
        ({"cuts": [[0]]}, [0, 1, 2, 3]),
        ({"cuts": [0, 0]}, [0, 1, 2, 3]),
        ({"mesh": [1] * 5, "cuts": [[n, 0] for n in range(5)]}, [0]),
    ],
)
def test_what_is_no_layout_is_refused(change, ranks):
    with pytest.raises(CorruptCheckpointError):
        parse_layout({**GOOD, **change}, np.array(ranks, np.int64), 8, "layout 0")
    assert parse_layout(GOOD, np.arange(8), 8, "layout 0").replicas == 2


@pytest.mark.parametrize("layout,owner", [([2, 0], [0, 0]), ([-1, 0], [0, 0]), ([0, 0], [2, 0]), ([0, 1], [0, -1])])
def test_a_table_that_names_what_is_not_there_is_refused(layout, owner):
    known = [Layout(Form((2,)), PAIR), Layout(COLUMNS, PAIR)]
    check_columns(columns([(3,), (3, 3)], [0, 1], [1, 0]), known, "the table")
    with pytest.raises(CorruptCheckpointError):
        check_columns(columns([(3,), (3, 3)], layout, owner), known, "the table")


def test_a_tensor_that_lacks_a_dimension_that_is_cut_is_refused():
    known = [Layout(COLUMNS, PAIR)]
    with pytest.raises(CorruptCheckpointError, match="tensor 1 is cut along a dimension"):
        check_columns(columns([(3, 3), (3,)], [0, 0], [0, 0]), known, "the table")


def test_a_rank_outside_a_layout_wrote_nothing_of_it():
    known = [Layout(Form((2,), (Cut(0, 0),)), PAIR + 1)]
    table = columns([(4,)], [0], [0])
    assert known[0].place_of(0) is None
    assert listed(written_by(0, table, known)) == []
    assert listed(written_by(2, table, known)) == [(0, (2,), (2,))]
    assert known[0].place_of(2) == Place(0, 1)
