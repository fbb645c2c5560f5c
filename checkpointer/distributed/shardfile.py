"""One safetensors file of one rank: boxes of tensors, written with a hash for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
import xxhash

from checkpointer.commit import Attempt
from checkpointer.digest import Digest
from checkpointer.distributed.boxes import Box
from checkpointer.index import ITEM_SIZES, Chunk, TensorSpec
from checkpointer.manifest import FileRecord
from checkpointer.memory import Ring
from checkpointer.staging import parts_of
from checkpointer.state.tensors import dtype_name
from checkpointer.storage import Buffer
from checkpointer.tensorfile import Slot, TensorFile


@dataclass(frozen=True)
class Piece:
    """A box of a tensor that is about to be written."""

    key: str
    box: Box
    tensor: torch.Tensor
    """Just the box: strided, any device."""

    @property
    def spec(self) -> TensorSpec:
        """Of the box."""
        return TensorSpec(dtype_name(self.tensor.dtype), tuple(self.tensor.shape))


class WrittenFile(NamedTuple):
    """A file that is durable, and where each piece lies in it."""

    path: str
    record: FileRecord
    header: tuple[int, str]
    """Length and hash, as the index has them."""
    chunks: tuple[Chunk, ...]
    """In the order of the pieces."""


def write_pieces(attempt: Attempt, path: str, component: str, pieces: Sequence[Piece]) -> WrittenFile:
    """Write ``pieces`` to one safetensors file of an attempt; durable when this returns."""
    order = sorted(range(len(pieces)), key=lambda number: -ITEM_SIZES[pieces[number].spec.dtype])
    ordered = [pieces[number] for number in order]
    file = _plan(path, component, ordered)
    digest = Digest(file)
    record = attempt.write(path, _bytes(file, ordered, digest), file.size, steady=True)
    start = len(file.header)
    found = {
        number: Chunk(*piece.box, path, start + slot.begin, start + slot.end, xxh3)
        for number, piece, slot, xxh3 in zip(order, ordered, file.slots, digest.hashes, strict=True)
    }
    header = (start, xxhash.xxh3_128_hexdigest(file.header))
    return WrittenFile(path, record, header, tuple(found[number] for number in range(len(pieces))))


def _plan(path: str, component: str, pieces: Sequence[Piece]) -> TensorFile:
    specs = tuple(piece.spec for piece in pieces)
    ends = accumulate((spec.nbytes for spec in specs), initial=0)
    slots = tuple(Slot(component, piece.key, *span) for piece, span in zip(pieces, pairwise(ends), strict=True))
    names = tuple(piece.key for piece in pieces)
    return TensorFile(path, slots, names, specs, {"format": "pt"}, frozen=False)


def _bytes(file: TensorFile, pieces: Sequence[Piece], digest: Digest) -> Iterator[Buffer]:
    yield file.header
    for block in Ring().gather(part for piece in pieces for part in parts_of(piece.tensor)):
        digest.update(block)
        yield block
    digest.update(memoryview(b""))  # tensors without elements at the end
