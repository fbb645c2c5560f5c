"""What a rank reports when its files are durable, and what the coordinator makes of all reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from checkpointer.distributed.save_plan import OWN
from checkpointer.format import paths
from checkpointer.format.index import Chunk, Component, FileRecord, Index
from checkpointer.format.table import index_files, parse_index
from checkpointer.format.tensor_files import joined_shard_indexes
from checkpointer.repository.commit import Attempt


@dataclass(frozen=True)
class RankFiles:
    """The files of one rank."""

    files: Mapping[str, FileRecord]
    """Those that the index of all ranks lists."""
    chunks: dict[tuple[str, str], tuple[Chunk, ...]]
    """As in :class:`~checkpointer.format.index.Index`."""
    finite: bool | None
    trainable: bool
    """Whether it holds parameters or moments at all."""
    fsync_seconds: float
    part: FileRecord | None = None
    """The part of the index that this rank has written of what it has otherwise than the coordinator."""
    own_files: Mapping[str, FileRecord] = field(default_factory=dict)
    """The files that only that part lists."""

    @property
    def all_files(self) -> dict[str, FileRecord]:
        """Those that the index lists, and those that only the part does."""
        return {**self.files, **self.own_files}


@dataclass(frozen=True)
class NoRoom:
    """Why files could not be written: the disk is full, or a quota is used up."""

    text: str
    errno: int | None


class RankReport(NamedTuple):
    """What a rank has written, or why it had no room."""

    written: RankFiles | None
    no_room: NoRoom | None = None


def all_finite_over_ranks(parts: Sequence[RankFiles]) -> bool | None:
    """Whether parameters and moments are free of NaN and infinities; ``None`` where not all were looked at."""
    found = [part.finite for part in parts if part.trainable]
    if False in found:
        return False
    return None if None in found or not found else True


def separated(
    chunks: Mapping[tuple[str, str], tuple[Chunk, ...]],
) -> tuple[dict[tuple[str, str], tuple[Chunk, ...]], dict[tuple[str, str], tuple[Chunk, ...]]]:
    """The chunks that belong to the index of all ranks, and those of this rank's own part."""
    own = {(name.removeprefix(OWN), key): found for (name, key), found in chunks.items() if name.startswith(OWN)}
    return {place: found for place, found in chunks.items() if not place[0].startswith(OWN)}, own


def joined_index(components: Mapping[str, Component], ranks: Sequence[RankFiles]) -> Index:
    """The index of all ranks, of ``components`` as a whole."""
    chunks: dict[tuple[str, str], tuple[Chunk, ...]] = {
        (name, key): () for name, component in components.items() for key in component.tensors
    }
    files: dict[str, FileRecord] = {}
    for written in ranks:
        files.update(written.files)
        for place, found in written.chunks.items():
            chunks[place] += found
    parts = {rank: written.part for rank, written in enumerate(ranks) if written.part is not None}
    return Index(dict(components), chunks, files, parts)


def write_index(attempt: Attempt, index: Index, *, joined: bool) -> None:
    """Write the index of a checkpoint of which all other files are recorded.

    ``joined``: others than this process have written some, so that it is checked, and the model gets its index for
    Hugging Face tools only now.

    Raises:
        CorruptCheckpointError: a byte of a tensor is missing, or is there twice.
    """
    if joined:
        for path, content in joined_shard_indexes(index).items():
            attempt.write(path, [content], len(content))
    plain = {path: record for path, record in attempt.files.items() if record.header is None}
    known = {paths.rank_index(rank) for rank in index.parts}
    files = {**{path: record for path, record in plain.items() if path not in known}, **index.files}
    data = index_files(replace(index, files=files))
    if joined:
        parse_index(data[paths.INDEX], data[paths.TABLE], "the index of all ranks")
    for path, content in data.items():
        attempt.write(path, [content], len(content))
