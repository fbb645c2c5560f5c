"""Tables that no writer makes: read with every promise kept, or refused with a typed error."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpointer.errors import CorruptCheckpointError, FormatVersionError
from checkpointer.format.columns import pack
from checkpointer.format.index import ITEM_SIZES, Chunk, Chunks, Component, FileRecord, Index, RankPart, TensorSpec
from checkpointer.format.table import THIS_FILE, index_files, pack_part, parse_index, parse_part
from tests.support.forge import read_table

Change = Callable[[dict[str, Any], dict[str, str]], object]
EMPTY = TensorSpec("float32", (0, 3))
BYTES = TensorSpec("uint8", (4,))


def an_index(spec: TensorSpec) -> Index:
    """One tensor in one file."""
    chunk = Chunk((0,) * len(spec.shape), spec.shape, "m.safetensors", 72, 72 + spec.nbytes, "0" * 32)
    files = {"m.safetensors": FileRecord(72 + spec.nbytes, "0" * 32, header=(72, "0" * 32))}
    return Index({"m": Component("module", {}, {"a": spec})}, {("m", "a"): (chunk,)}, files)


def a_part(spec: TensorSpec) -> bytes:
    """The part of a rank with one tensor of its own, inside."""
    chunk = Chunk((0,) * len(spec.shape), spec.shape, "", 0, spec.nbytes, "0" * 32)
    part = RankPart({"m": Component("stateful", {}, {"a": spec})}, {("m", "a"): (chunk,)})
    return pack_part(part, b"x" * spec.nbytes)


def forged(data: bytes, change: Change) -> bytes:
    columns, texts = read_table(data)
    columns = {name: column.copy() for name, column in columns.items()}
    change(columns, texts)
    return pack(columns, texts)


def read(index: Index, change: Change) -> Index:
    files = index_files(index)
    return parse_index(files["index.json"], forged(files["index.safetensors"], change), "the index")


def setting(column: str, number: int) -> Change:
    return lambda columns, _: columns.update({column: np.full_like(columns[column], number)})


@pytest.mark.parametrize("file", [1, 2, THIS_FILE - 1, THIS_FILE])
@pytest.mark.parametrize("spec", [EMPTY, BYTES], ids=["no bytes", "bytes"])
def test_a_chunk_in_a_file_that_is_not_listed_is_refused_also_where_it_has_no_bytes(spec, file):
    def change(columns: dict[str, Any], texts: dict[str, str]) -> None:
        setting("chunk_file", file)(columns, texts)
        setting("chunk_begin", 0)(columns, texts)

    with pytest.raises(CorruptCheckpointError, match="does not list"):
        read(an_index(spec), change)


@pytest.mark.parametrize("file", [0, 1, THIS_FILE - 1])
@pytest.mark.parametrize("spec", [EMPTY, BYTES], ids=["no bytes", "bytes"])
def test_a_chunk_of_a_part_in_a_file_that_is_not_listed_is_refused(spec, file):
    data = forged(a_part(spec), setting("own_chunk_file", file))
    with pytest.raises(CorruptCheckpointError, match="does not list"):
        parse_part(data, 1, an_index(BYTES), "the part")


def test_a_part_whose_own_tensors_have_no_bytes_is_read():
    part = parse_part(a_part(EMPTY), 1, an_index(BYTES), "the part")
    (chunk,) = part.chunks["m", "a"]
    assert (chunk.lengths, chunk.begin, chunk.file) == ((0, 3), chunk.end, "index-00001.safetensors")


@pytest.mark.parametrize("begin", [-1, 2**62])
def test_a_chunk_without_bytes_lies_inside_its_part(begin):
    data = forged(a_part(EMPTY), setting("own_chunk_begin", begin))
    with pytest.raises(CorruptCheckpointError):
        parse_part(data, 1, an_index(BYTES), "the part")


@pytest.mark.parametrize("version", ["", "0", "-1", "1.0", "one", "\u0661", "[[1]]", "9" * 5000, "NaN", "\ud800"])
def test_a_version_that_is_no_number_is_damage(version):
    with pytest.raises(CorruptCheckpointError):
        read(an_index(BYTES), lambda _, texts: texts.update(version=version))


def test_a_table_of_a_newer_version_is_not_damaged():
    with pytest.raises(FormatVersionError, match="version 2"):
        read(an_index(BYTES), lambda _, texts: texts.update(version="2"))


@pytest.mark.parametrize(
    "name", ["manifest.json", "index.json", "index.safetensors", "index-00001.safetensors", "Index.json"]
)
def test_no_list_of_files_names_what_is_listed_elsewhere(name):
    """A removal would take it for data, which goes first; and which size and hash of it count would be open."""
    stored = an_index(BYTES)
    with pytest.raises(CorruptCheckpointError, match=name):
        read(stored, lambda _, texts: texts.update(files=texts["files"].replace("m.safetensors", name)))
    plain = replace(stored, files={**stored.files, name: FileRecord(1, "0" * 32)})
    with pytest.raises(CorruptCheckpointError, match=name):
        read(plain, lambda *_: None)


# ------------------------------------------------------------------------------------------------ any numbers at all


def several() -> Index:
    """Two files, three components; of tensors one in two boxes, one with strides, one empty, one of no dimension."""
    a, b = "a.safetensors", "b.safetensors"
    model = {"w": TensorSpec("float32", (2, 3)), "\u00e9": TensorSpec("uint8", (0, 4)), "n": TensorSpec("int64", ())}
    moment = TensorSpec("bfloat16", (2, 3, 1, 2), (1, 2, 7, 6), "cuda:0")
    meta: dict[str, Any] = {
        "params": [["a"], [None, "c"]],
        "shapes": [[[2]], [[], [3, 0]]],
        "devices": [["cpu"], ["cpu", "cuda:0"]],
        "dtypes": [["int8"], ["int8", "bool"]],
    }
    components = {
        "model": Component("module", {}, model),
        "optimizer": Component("optimizer", {}, {"m": moment}, meta),
        "rng": Component("rng", {}, {}),
    }
    chunks = {
        ("model", "w"): (
            Chunk((0, 0), (2, 1), a, 64, 72, "1" * 32),
            Chunk((0, 1), (2, 2), a, 72, 88, "2" * 32),
        ),
        ("model", "\u00e9"): (Chunk((0, 0), (0, 4), a, 88, 88, "3" * 32),),
        ("model", "n"): (Chunk((), (), a, 88, 96, "4" * 32),),
        ("optimizer", "m"): (Chunk((0,) * 4, (2, 3, 1, 2), b, 64, 88, "5" * 32),),
    }
    files = {path: FileRecord(size, "0" * 32, header=(64, "0" * 32)) for path, size in ((a, 96), (b, 88))}
    return Index(components, chunks, files, {1: FileRecord(5, "0" * 32)})


BORDERS = [
    0,
    1,
    2,
    3,
    4,
    63,
    64,
    65,
    72,
    88,
    255,
    2**16 - 1,
    2**31,
    2**32 - 2,
    2**32 - 1,
    2**62,
    2**63 - 1,
    -1,
    -(2**63),
]


def changed(columns: dict[str, Any], luck: Random) -> None:
    """One to three columns get a number at a border, one more or less of it, another length, or another order."""
    for _ in range(luck.randint(1, 3)):
        name = luck.choice(sorted(columns))
        column = columns[name].copy()
        kind = luck.randint(0, 5)
        if not len(column):
            continue
        place = tuple(luck.randrange(size) for size in column.shape)
        if kind <= 1:
            number = luck.choice(BORDERS) if kind == 0 else int(column[place]) + luck.choice((-1, 1))
            bits = 8 * column.itemsize
            column[place] = np.array(number % 2**bits, f"u{column.itemsize}").astype(column.dtype)
        elif kind == 2:
            column = column[:-1]
        elif kind == 3:
            column = np.concatenate([column, column[-1:]])
        elif kind == 4:
            column = column[::-1]
        else:
            other = luck.randrange(len(column))
            column[[place[0], other]] = column[[other, place[0]]]
        columns[name] = np.ascontiguousarray(column)


def check_one_by_one(components: Mapping[str, Component], chunks: Chunks, files: Mapping[str, FileRecord]) -> None:
    """Every promise of an index, with plain loops. Chunks in the table itself are left to the caller."""
    bytes_of: dict[str, list[tuple[int, int]]] = {path: [] for path in files}
    for (component, key), of_tensor in chunks.items():
        spec = components[component].tensors[key]
        counts = np.zeros(spec.shape, int)
        for chunk in of_tensor:
            assert len(chunk.offsets) == len(chunk.lengths) == len(spec.shape)
            assert all(
                start >= 0 and length >= 0 and start + length <= size
                for start, length, size in zip(chunk.offsets, chunk.lengths, spec.shape, strict=True)
            )
            assert chunk.end - chunk.begin == prod(chunk.lengths) * ITEM_SIZES[spec.dtype]
            counts[tuple(slice(s, s + length) for s, length in zip(chunk.offsets, chunk.lengths, strict=True))] += 1
            bytes_of.setdefault(chunk.file, []).append((chunk.begin, chunk.end))
        assert of_tensor
        assert (counts == 1).all()
    assert set().union(*(chunks.files_of(name) for name in components)) <= bytes_of.keys()
    for path, record in files.items():
        position = record.header[0] if record.header else record.size
        for begin, end in sorted(bytes_of[path]):
            assert begin == position
            position = end
        assert position == record.size


@settings(deadline=None, max_examples=300)
@given(st.randoms(use_true_random=False))
def test_columns_with_any_numbers_are_refused_or_keep_every_promise(luck):
    with contextlib.suppress(CorruptCheckpointError):
        found = read(several(), lambda columns, _: changed(columns, luck))
        assert isinstance(found.chunks, Chunks)
        check_one_by_one(found.components, found.chunks, found.files)


@settings(deadline=None, max_examples=200)
@given(st.randoms(use_true_random=False))
def test_columns_of_a_part_with_any_numbers_are_refused_or_keep_every_promise(luck):
    data = forged(a_part(BYTES), lambda columns, _: changed(columns, luck))
    with contextlib.suppress(CorruptCheckpointError):
        found = parse_part(data, 1, an_index(BYTES), "the part")
        assert isinstance(found.chunks, Chunks)
        check_one_by_one(found.components, found.chunks, found.files)
        assert {chunk.file for chunks in found.chunks.values() for chunk in chunks} <= {"index-00001.safetensors"}


def of_so_many_chunks(count: int) -> bytes:
    """A table of one tensor that is cut into slabs, which needs no objects to make."""
    table = index_files(an_index(TensorSpec("uint8", (count, 4))))["index.safetensors"]

    def change(columns: dict[str, Any], texts: dict[str, str]) -> None:
        rows = np.arange(count)
        columns["chunk_tensor"] = columns["chunk_file"] = np.zeros(count, np.uint32)
        columns["chunk_begin"] = 72 + 4 * rows
        columns["chunk_hash"] = np.zeros((count, 16), np.uint8)
        columns["boxed"] = rows.astype(np.uint32)
        columns["box_offsets"] = np.column_stack([rows, np.zeros_like(rows)]).ravel()
        columns["box_lengths"] = np.tile([1, 4], count)

    return forged(table, change)


def test_ten_times_as_many_chunks_take_about_ten_times_as_long():
    text = index_files(an_index(BYTES))["index.json"]
    seconds = []
    for count in (20_000, 200_000):
        table, taken = of_so_many_chunks(count), []
        for _ in range(3):
            began = time.process_time()
            parse_index(text, table, "the index")
            taken.append(time.process_time() - began)
        seconds.append(min(taken))
    assert seconds[1] < 40 * seconds[0]
