"""What a rank reads of a checkpoint: whole tensors, or its boxes of them out of chunks of any layout."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from checkpointer.distributed.box_reads import narrowed, reads_of_box
from checkpointer.format.boxes import Box, overlap
from checkpointer.format.index import Chunk
from checkpointer.repository.checkpoint_reader import CheckpointReader, ChunkRead
from checkpointer.staging.read_targets import TensorTarget
from checkpointer.state.dtensor import is_sharded, local_box, local_part
from checkpointer.state.protocol import RestorePlan


@dataclass(frozen=True)
class Reads:
    """The reads of one restore."""

    whole: Sequence[ChunkRead]
    """Chunks that are read from end to end, and can be checked on the way."""
    parts: Sequence[ChunkRead]
    """Parts of others, which have no hash of their own."""
    sharded: frozenset[tuple[str, str]] = frozenset()
    """Component and key of tensors of which this rank reads what it holds."""

    @property
    def partial(self) -> bool:
        """Whether some of what is read cannot be checked by itself."""
        return bool(self.parts)

    @classmethod
    def of(cls, reader: CheckpointReader, plans: Mapping[str, RestorePlan]) -> Reads:
        """What fills the destinations of ``plans``."""
        places = [(name, key, tensor) for name, plan in plans.items() for key, tensor in plan.reads.items()]
        found = cls.split(itertools.chain.from_iterable(_reads(reader, *place) for place in places))
        return replace(found, sharded=frozenset((name, key) for name, key, tensor in places if is_sharded(tensor)))

    @property
    def checked(self) -> set[Chunk]:
        """The chunks of ``sharded`` tensors that are read as a whole."""
        names = {f"{name}.{key}" for name, key in self.sharded}
        return {read.chunk for read in self.whole if read.name in names}

    @classmethod
    def split(cls, reads: Iterable[ChunkRead]) -> Reads:
        """What reads whole chunks, and what reads parts."""
        found = list(reads)
        return cls([read for read in found if read.chunk.xxh3], [read for read in found if not read.chunk.xxh3])

    def carry_out(self, reader: CheckpointReader, *, verify: bool) -> None:
        """Read everything."""
        reader.read(self.whole, verify=verify)
        if self.parts:
            reader.read(self.parts, verify=False)


def needed_chunks(reader: CheckpointReader, name: str, key: str, tensor: torch.Tensor) -> Sequence[Chunk]:
    """The chunks that hold what this rank has of ``tensor``."""
    if not is_sharded(tensor):
        return reader.chunks(name, key)
    found = local_box(tensor)
    if found is None:
        return ()
    mine = Box(*found)
    chunks = reader.chunks(name, key, mine)
    return [chunk for chunk in chunks if overlap(Box(chunk.offsets, chunk.lengths), mine) is not None]


def _reads(reader: CheckpointReader, name: str, key: str, tensor: torch.Tensor) -> Iterable[ChunkRead]:
    if not is_sharded(tensor):
        what = f"{name}.{key}"
        return [ChunkRead(what, chunk, TensorTarget(tensor, chunk)) for chunk in reader.chunks(name, key)]
    return _reads_of_box(reader, name, key, tensor)


def _reads_of_box(reader: CheckpointReader, name: str, key: str, tensor: torch.Tensor) -> Iterator[ChunkRead]:
    found = local_box(tensor)
    if found is None:
        return
    mine, local = Box(*found), local_part(tensor)
    for chunk in needed_chunks(reader, name, key, tensor):
        common = overlap(Box(chunk.offsets, chunk.lengths), mine)
        assert common is not None, "only such chunks are needed"
        yield from reads_of_box(f"{name}.{key}", chunk, common, narrowed(local, mine, common))
