"""Tensor files of an attempt: how a manager and DCP's writer write each of theirs, and the boxes that DCP hands out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import xxhash

from checkpointer.format import tensor_files
from checkpointer.format.boxes import Box
from checkpointer.format.index import Chunk, TensorSpec
from checkpointer.format.tensor_files import FileNaming, TensorFile
from checkpointer.repository.commit import Attempt
from checkpointer.staging.digest import Digest
from checkpointer.staging.stager import LiveTensors, StagedFile
from checkpointer.state.tensors import dtype_name
from checkpointer.storage import Buffer
from checkpointer.system.gc import collector_paused
from checkpointer.system.memory import Ring


def write_file(attempt: Attempt, item: StagedFile, trainable: frozenset[tuple[str, str]] = frozenset()) -> Digest:
    """Write one file; durable when this returns. The digest has the hash of each tensor.

    ``trainable``: which of them are parameters and moments, to be looked at for NaN and infinities.
    """
    digest = Digest(item.file, trainable)
    attempt.write(item.file.path, _pieces(item, digest), item.file.size, steady=item.source.steady)
    return digest


def _pieces(item: StagedFile, digest: Digest) -> Iterator[Buffer]:
    with collector_paused():
        header = item.file.header
    yield header
    yield from item.source.pieces(digest)
    digest.update(memoryview(b""))  # tensors without elements at the end


def header_of(file: TensorFile) -> tuple[int, str]:
    """Length and hash of the header, as the index has them."""
    return len(file.header), xxhash.xxh3_128_hexdigest(file.header)


def chunks_of(file: TensorFile, hashes: Sequence[str], offsets: Iterable[tuple[int, ...]]) -> list[Chunk]:
    """Where each tensor of a file lies; ``offsets`` say where in the whole tensor it begins."""
    start = len(file.header)
    return [
        Chunk(begins, spec.shape, file.path, start + slot.begin, start + slot.end, xxh3)
        for slot, spec, xxh3, begins in zip(file.slots, file.specs, hashes, offsets, strict=True)
    ]


@dataclass(frozen=True)
class Piece:
    """A box of a tensor that is about to be written. There may be several of one tensor."""

    key: str
    box: Box
    tensor: torch.Tensor
    """Just the box: strided, any device."""

    @property
    def spec(self) -> TensorSpec:
        """Of the box."""
        return TensorSpec(dtype_name(self.tensor.dtype), tuple(self.tensor.shape))


class Written(NamedTuple):
    """What has become of pieces."""

    chunks: Sequence[Chunk]
    """In the order of the pieces."""
    headers: dict[str, tuple[int, str]]
    """Of each file, as the index has them."""


def write_pieces(attempt: Attempt, component: str, naming: FileNaming, pieces: Sequence[Piece]) -> Written:
    """Write ``pieces`` to as many files as they need; durable when this returns."""
    shards = shards_of([piece.spec.nbytes for piece in pieces])
    found: dict[int, Chunk] = {}
    headers: dict[str, tuple[int, str]] = {}
    for number, shard in enumerate(shards, start=1):
        order = [shard[place] for place in tensor_files.wide_first([pieces[place].spec for place in shard])]
        ordered = [pieces[place] for place in order]
        names = [(component, piece.key, piece.key) for piece in ordered]
        path = naming.path(component, number, len(shards))
        file = tensor_files.lay_out(path, names, [piece.spec for piece in ordered], {"format": "pt"})
        digest = write_file(attempt, StagedFile(file, LiveTensors([piece.tensor for piece in ordered], Ring())))
        chunks = chunks_of(file, digest.hashes, (piece.box.offsets for piece in ordered))
        found.update(zip(order, chunks, strict=True))
        headers[path] = header_of(file)
    return Written([found[number] for number in range(len(pieces))], headers)


def shards_of(sizes: Sequence[int]) -> list[list[int]]:
    """Which pieces of these sizes share a file."""
    return tensor_files.cut(sizes, tensor_files.SHARD_LIMIT)
