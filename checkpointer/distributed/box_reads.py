"""Reading a box of a tensor out of a chunk that holds more of it. A chunk is a box that lies, row-major, in a file."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from checkpointer.format.boxes import Box
from checkpointer.format.index import Chunk
from checkpointer.repository.checkpoint_reader import ChunkRead
from checkpointer.staging.read_targets import TensorTarget
from checkpointer.state.modes import writing_to
from checkpointer.state.tensors import contiguous_strides, host_bytes, raw

WORTH_A_READ = 64 << 10
"""Bytes in a row from which on a read of their own is cheaper than to read, and drop, what lies between them."""

SPAN = 4 << 20
"""Bytes that one read takes at most of which a part is dropped."""


def narrowed(tensor: torch.Tensor, outer: Box, inner: Box) -> torch.Tensor:
    """The view of ``inner`` in a tensor that holds just the box ``outer``."""
    view = tensor.detach()
    for dimension, (start, length) in enumerate(zip(inner.offsets, inner.lengths, strict=True)):
        if length != view.shape[dimension]:
            view = view.narrow(dimension, start - outer.offsets[dimension], length)
    return view


def reads_of_box(name: str, chunk: Chunk, box: Box, target: torch.Tensor) -> Iterator[ChunkRead]:
    """What to read of ``chunk`` to fill ``target`` with ``box``, which lies inside the chunk.

    ``target`` has the chunk's dtype and the box's shape; its device and strides may be any. A read of the whole chunk
    carries the chunk's hash, and so can be checked. A part has no hash of its own: ``xxh3`` is empty.
    """
    if box.lengths == chunk.lengths:
        yield ChunkRead(name, chunk, TensorTarget(target, chunk._replace(offsets=(0,) * len(chunk.offsets))))
        return
    carrier = raw(target)
    more = carrier.ndim - target.ndim  # complex128, which has no integer of its size, is two for each element
    lengths = (*chunk.lengths, *carrier.shape[target.ndim :])
    inner = (*(start - begin for start, begin in zip(box.offsets, chunk.offsets, strict=True)), *(0,) * more)
    item = carrier.element_size()
    strides = contiguous_strides(lengths)
    for start, part in _runs(lengths, strides, inner, carrier, 0, item=item):
        inside = strides[len(strides) - part.ndim :]
        span = _span(inside, tuple(part.shape))
        begin = chunk.begin + start * item
        place = chunk._replace(begin=begin, end=begin + span * item, lengths=tuple(part.shape), xxh3="")
        yield ChunkRead(
            name, place, TensorTarget(part, place) if span == part.numel() else _SparseTarget(part, inside, span)
        )


def _span(strides: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """Elements from the first to the last of a box."""
    return 1 + sum(stride * (size - 1) for stride, size in zip(strides, shape, strict=True))


def _runs(
    lengths: tuple[int, ...],
    strides: tuple[int, ...],
    inner: tuple[int, ...],
    target: torch.Tensor,
    start: int,
    *,
    item: int,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Cut a box into parts that one read can bring: (first element in the chunk, the view of the target).

    The arguments describe the last dimensions of the chunk, from element ``start`` on.
    """
    shape = tuple(target.shape)
    first = start + sum(stride * offset for stride, offset in zip(strides, inner, strict=True))
    span = _span(strides, shape)
    run = _run_length(lengths, shape)
    if span == target.numel() or (run * item < WORTH_A_READ and span * item <= SPAN):
        yield first, target
        return
    rows = 1 if run * item >= WORTH_A_READ else max(SPAN // (strides[0] * item), 1)
    for row in range(0, shape[0], rows):
        begin = start + strides[0] * (inner[0] + row)
        if rows > 1:
            yield from _runs(lengths, strides, (0, *inner[1:]), target[row : row + rows], begin, item=item)
        else:
            yield from _runs(lengths[1:], strides[1:], inner[1:], target[row], begin, item=item)


def _run_length(lengths: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """Elements of a box that lie in a row in the chunk."""
    run = 1
    for length, size in zip(reversed(lengths), reversed(shape), strict=True):
        run *= size
        if size != length:
            break
    return run


class _SparseTarget:
    """A read of which only some elements are wanted."""

    def __init__(self, target: torch.Tensor, strides: tuple[int, ...], span: int) -> None:
        self._target = target
        self._strides = strides
        self._span = span

    def memory(self) -> memoryview | None:
        return None

    def blocks(self) -> Iterator[memoryview]:
        buffer = torch.empty(self._span, dtype=self._target.dtype, device="cpu")
        yield host_bytes(buffer)
        with writing_to(self._target):
            self._target.copy_(buffer.as_strided(self._target.shape, self._strides))
