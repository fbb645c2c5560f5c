"""What a rank reports when its files are durable, and what the coordinator makes of all reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from checkpointer.distributed.save_plan import OWN
from checkpointer.format import paths
from checkpointer.format.index import Chunk, Component, Index, parse_index
from checkpointer.format.manifest import FileRecord
from checkpointer.format.tensor_files import joined_shard_indexes
from checkpointer.repository.commit import Attempt


@dataclass(frozen=True)
class RankFiles:
    """The files of one rank."""

    files: Mapping[str, FileRecord]
    headers: Mapping[str, tuple[int, str]]
    """As in :class:`~checkpointer.format.index.Index`; ``chunks`` too."""
    chunks: dict[tuple[str, str], tuple[Chunk, ...]]
    finite: bool | None
    trainable: bool
    """Whether it holds parameters or moments at all."""
    fsync_seconds: float


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


class IndexParts(NamedTuple):
    """Where tensors lie, as an index has it."""

    chunks: dict[tuple[str, str], tuple[Chunk, ...]]
    headers: dict[str, tuple[int, str]]


def separated(
    chunks: Mapping[tuple[str, str], tuple[Chunk, ...]], headers: Mapping[str, tuple[int, str]]
) -> tuple[IndexParts, IndexParts]:
    """What belongs to the index of all ranks, and what to this rank's own."""
    own = {(name.removeprefix(OWN), key): found for (name, key), found in chunks.items() if name.startswith(OWN)}
    shared = {place: found for place, found in chunks.items() if not place[0].startswith(OWN)}
    files = {chunk.file for found in own.values() for chunk in found}
    return (
        IndexParts(shared, {path: header for path, header in headers.items() if path not in files}),
        IndexParts(own, {path: header for path, header in headers.items() if path in files}),
    )


def joined_index(components: Mapping[str, Component], parts: Sequence[RankFiles]) -> Index:
    """The index of all ranks, of ``components`` as a whole."""
    chunks: dict[tuple[str, str], tuple[Chunk, ...]] = {
        (name, key): () for name, component in components.items() for key in component.tensors
    }
    headers: dict[str, tuple[int, str]] = {}
    for part in parts:
        headers.update(part.headers)
        for place, found in part.chunks.items():
            chunks[place] += found
    return Index(dict(components), chunks, headers)


def write_index(attempt: Attempt, index: Index, *, joined: bool) -> None:
    """Write the index of a checkpoint of which all files are recorded.

    ``joined``: others than this process have written some, so that it is checked, and the model gets its index for
    Hugging Face tools only now.

    Raises:
        CorruptCheckpointError: a byte of a tensor is missing, or is there twice.
    """
    data = index.to_bytes()
    if joined:
        parse_index(data, {path: record.size for path, record in attempt.files.items()}, "the index of all ranks")
        for path, content in joined_shard_indexes(index).items():
            attempt.write(path, [content], len(content))
    attempt.write(paths.INDEX, [data], len(data))
