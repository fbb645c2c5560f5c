"""The table in columns: what is written is read, and each check agrees with one that counts element by element."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpointer.errors import CorruptCheckpointError
from checkpointer.format.columns import Form, pack, unpack
from checkpointer.format.index import ITEM_SIZES, Chunk, Component, FileRecord, Index, Placement, RankPart, TensorSpec
from checkpointer.format.layouts import Cut, Layout
from checkpointer.format.layouts import Form as Cuts
from checkpointer.format.table import Ragged, are_dense, index_files, pack_part, parse_index, parse_part

HEADER = (64, "a" * 32)
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
keys = st.text(max_size=6) | st.sampled_from(["weight", "état", "層.0", "\ud800", "a" * 300])


def specs(shape: tuple[int, ...]) -> st.SearchStrategy[TensorSpec]:
    """Tensors of a shape: any dtype, device and order of dimensions."""

    def strided(order: list[int]) -> tuple[int, ...] | None:
        strides, step = [0] * len(shape), 1
        for dimension in order:
            strides[dimension] = step
            step *= shape[dimension]
        return tuple(strides) if 0 not in shape else None

    orders = st.permutations(range(len(shape))).map(strided)
    return st.builds(
        TensorSpec,
        st.sampled_from(sorted(ITEM_SIZES)),
        st.just(shape),
        st.none() | orders,
        st.sampled_from(["cpu", "cuda:0"]),
    )


@st.composite
def indexes(draw: st.DrawFn) -> Index:
    """An index of one process, and what could be said of several: tensors in slabs, in one or two files."""
    components: dict[str, Component] = {}
    chunks: dict[tuple[str, str], tuple[Chunk, ...]] = {}
    ends = dict.fromkeys(("a.safetensors", "b.safetensors"), HEADER[0])
    for name in draw(st.lists(st.sampled_from(["model", "optimizer", "x"]), unique=True)):
        tensors = {key: draw(specs(draw(shapes))) for key in draw(st.lists(keys, unique=True, max_size=5))}
        meta: dict[str, Any] = {"inner": ["w"]}
        if name == "optimizer":
            groups = draw(st.lists(st.lists(st.tuples(st.none() | st.just("model.w"), shapes), max_size=3), max_size=2))
            meta |= {
                "params": [[row[0] for row in group] for group in groups],
                "shapes": [[list(row[1]) for row in group] for group in groups],
                "devices": [["cpu" for _ in group] for group in groups],
                "dtypes": [["bfloat16" for _ in group] for group in groups],
            }
        kind = "optimizer" if name == "optimizer" else "module"
        components[name] = Component(kind, {"tree": [1, None]}, tensors, meta)
        for key, spec in tensors.items():
            file = draw(st.sampled_from(sorted(ends)))
            chunks[name, key] = tuple(slabs(spec, file, ends, draw(st.integers(1, 3))))
    stored = {path: FileRecord(end, "b" * 32, header=HEADER) for path, end in ends.items()}
    plain = {"files/é.txt": FileRecord(3, "c" * 32), "model.bin": FileRecord(5, "d" * 32, "e" * 32, 2)}
    parts = draw(st.dictionaries(st.integers(0, 9), st.builds(FileRecord, st.integers(0, 99), st.just("f" * 32))))
    return Index(components, chunks, {**plain, **stored}, dict(sorted(parts.items())))


def slabs(spec: TensorSpec, file: str, ends: dict[str, int], count: int) -> list[Chunk]:
    """A tensor in slabs of its first dimension, one behind the other in the file; whole where it has no elements."""
    rows = spec.shape[0] if spec.shape and 0 not in spec.shape else 1
    step = -(-rows // count)
    made = []
    for begin in range(0, rows, step):
        offsets, lengths = (0,) * len(spec.shape), spec.shape
        if count > 1 and rows > 1:
            offsets, lengths = (begin, *offsets[1:]), (min(step, rows - begin), *lengths[1:])
        elif begin:
            break
        size = prod(lengths) * ITEM_SIZES[spec.dtype]
        digest = f"{random.Random(str((file, ends[file]))).getrandbits(128):032x}"
        made.append(Chunk(offsets, lengths, file, ends[file], ends[file] + size, digest))
        ends[file] += size
    return made


def read(index: Index) -> Index:
    files = index_files(index)
    return parse_index(files["index.json"], files["index.safetensors"], "the index")


@settings(deadline=None)
@given(indexes())
def test_every_index_reads_back_as_it_was_written(index):
    found = read(index)
    assert dict(found.components) == dict(index.components)
    assert dict(found.chunks) == index.chunks
    assert found.files == index.files
    assert found.parts == index.parts


@settings(deadline=None)
@given(indexes(), st.randoms(use_true_random=False))
def test_an_index_whose_chunks_are_moved_is_refused(index, luck):
    places = [place for place, chunks in index.chunks.items() for chunk in chunks if chunk.end > chunk.begin]
    if not places:
        return
    place = luck.choice(places)
    number = luck.choice([n for n, chunk in enumerate(index.chunks[place]) if chunk.end > chunk.begin])
    chunk = index.chunks[place][number]
    moved = luck.choice([-(2**63), -1, chunk.begin - 1, chunk.begin + 1, 2**62, 2**63 - 1])
    chunks = list(index.chunks[place])
    chunks[number] = chunk._replace(begin=moved)
    with pytest.raises(CorruptCheckpointError):
        read(replace(index, chunks={**index.chunks, place: tuple(chunks)}))


boxes = st.lists(st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3))] * 2), min_size=1, max_size=5)


@settings(deadline=None, max_examples=300)
@given(st.tuples(st.integers(1, 3), st.integers(1, 3)), boxes)
def test_a_tensor_is_accepted_where_each_element_lies_in_just_one_chunk(shape, cut):
    counts = np.zeros(shape, int)
    chunks, position, inside = [], HEADER[0], True
    for pairs in cut:
        offsets, lengths = tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs)
        inside &= all(begin + length <= size for begin, length, size in zip(offsets, lengths, shape, strict=True))
        counts[tuple(slice(begin, begin + length) for begin, length in pairs)] += 1
        chunks.append(Chunk(offsets, lengths, "a", position, position + prod(lengths), "0" * 32))
        position += prod(lengths)
    component = Component("module", {}, {"w": TensorSpec("uint8", shape)})
    files = {"a": FileRecord(position, "0" * 32, header=HEADER)}
    index = Index({"m": component}, {("m", "w"): tuple(chunks)}, files)
    if inside and (counts == 1).all():
        assert dict(read(index).chunks) == index.chunks
    else:
        with pytest.raises(CorruptCheckpointError):
            read(index)


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 9)), min_size=1, max_size=4))
def test_strides_are_dense_where_they_reach_each_of_so_many_elements_once(pairs):
    sizes, strides = [size for size, _ in pairs], [stride for _, stride in pairs]
    reached = sorted(
        sum(index * stride for index, stride in zip(place, strides, strict=True))
        for place in itertools.product(*map(range, sizes))
    )
    expected = reached == list(range(prod(sizes)))
    assert bool(are_dense(np.array([sizes]), np.array([strides]))[0]) is expected


@given(st.lists(st.lists(st.integers(0, 5), max_size=4)))
def test_rows_of_any_lengths_are_what_they_were(rows):
    ragged = Ragged.of(rows)
    assert [list(ragged.row(number)) for number in range(len(rows))] == rows
    seen = {int(n): list(map(int, m)) for _, ns, ms in ragged.by_length() for n, m in zip(ns, ms, strict=True)}
    assert [seen[number] for number in range(len(rows))] == rows


def test_a_column_of_another_form_or_twice_in_the_header_is_refused():
    forms = {"a": Form("I64"), "h": Form("U8", 16)}
    columns = {"a": np.arange(3), "h": np.zeros((2, 16), np.uint8)}
    data = pack(columns, {"x": "y"})
    found, texts = unpack(data, forms, "table")
    assert texts == {"x": "y"}
    assert all(np.array_equal(found[name], columns[name]) for name in columns)
    for forged in (
        data[:-1],
        data + b"\0",
        data.replace(b'"a":', b'"h":'),
        data.replace(b"I64", b"F64"),
        b"",
        data[:8],
    ):
        with pytest.raises(CorruptCheckpointError):
            unpack(forged, forms, "table")


# -------------------------------------------------------------------------------------------- parts of several ranks


def over_two_ranks() -> Index:
    """A weight that two ranks hold in halves, and a bias that the second of them has written."""
    tensors = {"weight": TensorSpec("float32", (5, 2)), "bias": TensorSpec("float64", (3,))}
    ranks = np.array([[0, 1]], np.int32)
    layouts = [Layout(Cuts((2,), (Cut(0, 0),)), ranks), Layout(Cuts((2,)), ranks)]
    parts = {0: FileRecord(9, "0" * 32), 1: FileRecord(9, "1" * 32)}
    placement = Placement(layouts, np.array([0, 1]), np.array([0, 1]))
    return read(Index({"model": Component("module", {}, tensors)}, {}, {}, parts, placement))


def part_of(rank: int) -> RankPart:
    """What a rank has written of it, and a random state of its own, inside."""
    begin = HEADER[0]
    rows = {0: [(0, 24)], 1: [(0, 16), (1, 24)]}[rank]
    written, file = {}, f"model-rank-{rank:05d}.safetensors"
    for number, size in rows:
        written[number] = Chunk((), (), file, begin, begin + size, f"{number:032x}")
        begin += size
    own = {"rng": Component("rng", {"seed": rank}, {"state": TensorSpec("uint8", (4,))})}
    chunks = {("rng", "state"): (Chunk((0,), (4,), "", 0, 4, "9" * 32),)}
    return RankPart(own, chunks, {file: FileRecord(begin, "2" * 32, header=HEADER)}, written)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_part_says_where_the_boxes_lie_that_follow_from_the_layouts(rank):
    index = over_two_ranks()
    data = pack_part(part_of(rank), b"abcd")
    found = parse_part(data, rank, index, "the part")
    weight = found.written[0]
    assert (weight.offsets, weight.lengths) == (((0, 0), (3, 2)), ((3, 0), (2, 2)))[rank]
    assert (weight.begin, weight.end) == (64, (88, 80)[rank])
    assert set(found.written) == ({0}, {0, 1})[rank]
    assert found.components["rng"].tree == {"seed": rank}
    (own,) = found.chunks["rng", "state"]
    assert own.file == f"index-{rank:05d}.safetensors"
    assert data[own.begin : own.end] == b"abcd"


@pytest.mark.parametrize(
    "forge",
    [
        lambda part: replace(part, written={}),
        lambda part: replace(part, written={1: part.written[1]}),
        lambda part: replace(part, written={**part.written, 1: part.written[1]._replace(begin=2**62)}),
        lambda part: replace(part, files={path: replace(file, size=999) for path, file in part.files.items()}),
        lambda part: replace(part, chunks={("rng", "state"): (Chunk((0,), (4,), "", 1, 5, "9" * 32),)}),
    ],
)
def test_a_part_that_is_not_what_the_index_says_is_refused(forge):
    with pytest.raises(CorruptCheckpointError):
        parse_part(pack_part(forge(part_of(1)), b"abcd"), 1, over_two_ranks(), "the part")
    with pytest.raises(CorruptCheckpointError):
        parse_part(pack_part(part_of(1), b"abcd"), 0, over_two_ranks(), "the part of another rank")
