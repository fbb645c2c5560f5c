"""Boxes against NumPy's slices: views of one in another, and reading one out of a row-major chunk."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpointer.distributed import box_reads
from checkpointer.distributed.box_reads import narrowed, reads_of_box
from checkpointer.format.boxes import Box, overlap
from checkpointer.format.index import Chunk
from checkpointer.repository.checkpoint_reader import ChunkRead
from tests.support.boxes import box_in, numbered, pairs, shapes, slices

ANY = settings(max_examples=200, deadline=None)
BEGIN = 4096
"""Where the chunk lies in its file."""

DTYPES = [torch.float32, torch.complex128, torch.bfloat16, torch.bool, torch.complex64, torch.int64]


@ANY
@given(pairs)
def test_a_box_narrowed_out_of_another_is_a_view_of_the_same_elements(case) -> None:
    shape, outer, other = case
    inner = overlap(outer, other)
    if inner is None:
        return
    everything = torch.from_numpy(numbered(shape))
    local = everything[slices(outer)].clone()
    view = narrowed(local, outer, inner)
    assert torch.equal(view, everything[slices(inner)])
    view.fill_(-1)
    assert int((local == -1).sum()) == inner.numel


# --------------------------------------------------------------------------------------------- reading out of a chunk


def carry_out(reads: Sequence[ChunkRead], data: bytes) -> list[tuple[int, int]]:
    """Read from a file that holds ``data`` from ``BEGIN`` on; where each read begins and ends."""
    places = []
    for _, chunk, target in reads:
        assert BEGIN <= chunk.begin <= chunk.end <= BEGIN + len(data), "a read beside the chunk"
        piece = data[chunk.begin - BEGIN : chunk.end - BEGIN]
        memory = target.memory()
        if memory is not None:
            memory[:] = piece
        else:
            taken = 0
            for block in target.blocks():
                block[:] = piece[taken : taken + len(block)]
                taken += len(block)
            assert taken == len(piece), "a target of another size than the read"
        places.append((chunk.begin - BEGIN, chunk.end - BEGIN))
    return places


@st.composite
def readings(draw: st.DrawFn) -> tuple[torch.Tensor, tuple[int, ...], Box, torch.Tensor]:
    """A row-major chunk, where it begins in its tensor, a box inside it, and memory for that of any layout."""
    shape = draw(shapes)
    dtype = draw(st.sampled_from(DTYPES))
    size = prod(shape) * dtype.itemsize
    luck = torch.from_numpy(np.random.default_rng(draw(st.integers(0, 9))).integers(0, 2, size, np.uint8))
    chunk = luck.view(dtype).reshape(shape)
    offsets = tuple(draw(st.integers(0, 9)) for _ in shape)
    inside = draw(box_in(shape, least=1))
    box = Box(tuple(begin + offset for begin, offset in zip(inside.offsets, offsets, strict=True)), inside.lengths)
    order = draw(st.permutations(range(len(shape))))
    gap = draw(st.integers(1, 2))
    wide = [inside.lengths[dimension] * gap for dimension in order]
    memory = torch.zeros(wide, dtype=dtype)[(slice(None, None, gap),) * len(wide)]
    target = memory.permute([order.index(dimension) for dimension in range(len(order))])
    assert target.shape == inside.lengths
    return chunk, offsets, box, target


@settings(max_examples=400, deadline=None)
@given(readings(), st.integers(1, 200), st.integers(1, 400))
def test_a_box_read_out_of_a_chunk_is_the_slice_of_it_however_the_reads_are_cut(reading, worth_a_read, span) -> None:
    tensor, offsets, box, target = reading
    data = tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else bytes(tensor.untyped_storage())
    chunk = Chunk(offsets, tuple(tensor.shape), "file", BEGIN, BEGIN + len(data), "0" * 32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(box_reads, "WORTH_A_READ", worth_a_read)
        patch.setattr(box_reads, "SPAN", span)
        reads = list(reads_of_box("model.weight", chunk, box, target))
    places = carry_out(reads, data)
    inside = Box(tuple(b - offset for b, offset in zip(box.offsets, offsets, strict=True)), box.lengths)
    assert torch.equal(target, tensor[slices(inside)])
    assert places == sorted(places), "reads that go back in the file"
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(places)), "bytes are read twice"
    assert {read.name for read in reads} == {"model.weight"}
    if box.lengths == chunk.lengths:
        assert [read.chunk.xxh3 for read in reads] == [chunk.xxh3]
    else:
        assert not any(read.chunk.xxh3 for read in reads), "a part has no hash of its own"


@pytest.mark.parametrize("span", [1, 32, 56, 1000])
@pytest.mark.parametrize("worth_a_read", [1, 13, 1000])
def test_every_box_of_a_small_chunk_is_read_right(monkeypatch, worth_a_read, span):
    """Rows of 16 bytes: a read takes a part of a row, one row, some rows, or all."""
    monkeypatch.setattr(box_reads, "WORTH_A_READ", worth_a_read)
    monkeypatch.setattr(box_reads, "SPAN", span)
    tensor = torch.arange(28, dtype=torch.int32).view(7, 4)
    data = tensor.numpy().tobytes()
    chunk = Chunk((0, 0), (7, 4), "file", BEGIN, BEGIN + len(data), "0" * 32)
    for row, column in itertools.product(range(7), range(4)):
        for rows, columns in itertools.product(range(1, 8 - row), range(1, 5 - column)):
            target = torch.zeros(rows, columns, dtype=torch.int32)
            box = Box((row, column), (rows, columns))
            carry_out(list(reads_of_box("model.weight", chunk, box, target)), data)
            assert torch.equal(target, tensor[slices(box)]), box


@settings(max_examples=200, deadline=None)
@given(readings(), st.integers(1, 64), st.integers(64, 400))
def test_what_is_read_only_to_be_dropped_is_bounded(reading, worth_a_read, span) -> None:
    """A read with gaps is short, and none of its rows is worth a read of its own."""
    tensor, offsets, box, target = reading
    chunk = Chunk(offsets, tuple(tensor.shape), "file", BEGIN, BEGIN + tensor.nbytes, "0" * 32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(box_reads, "WORTH_A_READ", worth_a_read)
        patch.setattr(box_reads, "SPAN", span)
        reads = list(reads_of_box("model.weight", chunk, box, target))
    item = 8 if tensor.dtype == torch.complex128 else tensor.element_size()  # read as two integers of 8 bytes
    for read in reads if box.lengths != chunk.lengths else ():
        wanted, taken = item * prod(read.chunk.lengths), read.chunk.end - read.chunk.begin
        assert taken == wanted or wanted < taken <= span


def test_columns_of_a_large_tensor_are_read_in_few_reads_and_rows_in_one():
    """With the sizes of use: 1 KiB out of each row of 4 KiB is not worth a read, and a quarter of the rows is."""
    tensor = torch.arange(2048 * 1024, dtype=torch.int32).view(2048, 1024)
    chunk = Chunk((0, 0), (2048, 1024), "file", 0, tensor.nbytes, "0" * 32)
    rows, columns = Box((512, 0), (512, 1024)), Box((0, 256), (2048, 256))
    assert len(list(reads_of_box("w", chunk, rows, torch.empty(512, 1024, dtype=torch.int32)))) == 1
    reads = list(reads_of_box("w", chunk, columns, torch.empty(2048, 256, dtype=torch.int32)))
    assert len(reads) == -(-tensor.nbytes // box_reads.SPAN)
