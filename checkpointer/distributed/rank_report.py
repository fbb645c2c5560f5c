"""What a rank reports when its files are durable, and what the coordinator makes of all reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from checkpointer.distributed.save_plan import OWN
from checkpointer.format import paths, strict_json
from checkpointer.format.index import Chunk, Component, Index, Json, parse_index
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


class PartForm:
    """What a rank has written, or why it had no room, as JSON."""

    def pack(self, value: RankFiles | NoRoom) -> Json:
        return no_room_to_json(value) if isinstance(value, NoRoom) else RankFilesForm().pack(value)

    def unpack(self, raw: Json) -> RankFiles | NoRoom:
        return no_room_from_json(raw) or RankFilesForm().unpack(raw)


def no_room_to_json(value: NoRoom) -> Json:
    """As an object that no other report looks like."""
    return {"no_room": value.text, "errno": value.errno}


def no_room_from_json(raw: Json) -> NoRoom | None:
    """The inverse of :func:`no_room_to_json`; ``None`` where this is another report."""
    part = strict_json.mapping(raw, "report")
    return NoRoom(part["no_room"], part["errno"]) if "no_room" in part else None


class RankFilesForm:
    """As JSON."""

    def pack(self, value: RankFiles) -> Json:
        chunks: dict[str, Json] = {}
        for (name, key), found in value.chunks.items():
            part: Any = chunks.setdefault(name, {})
            part[key] = [[list(c.offsets), list(c.lengths), c.file, c.begin, c.end, c.xxh3] for c in found]
        return {
            "files": {path: [file.size, file.xxh3, file.origin, file.turn] for path, file in value.files.items()},
            "headers": {path: list(header) for path, header in value.headers.items()},
            "chunks": chunks,
            "finite": value.finite,
            "learned": value.trainable,
            "fsync_seconds": value.fsync_seconds,
        }

    def unpack(self, raw: Json) -> RankFiles:
        part = strict_json.mapping(raw, "report")
        chunks = {
            (name, key): tuple(Chunk(tuple(item[0]), tuple(item[1]), *item[2:]) for item in found)
            for name, tensors in part["chunks"].items()
            for key, found in tensors.items()
        }
        return RankFiles(
            files={path: FileRecord(*values) for path, values in part["files"].items()},
            headers={path: (header[0], header[1]) for path, header in part["headers"].items()},
            chunks=chunks,
            finite=part["finite"],
            trainable=part["learned"],
            fsync_seconds=part["fsync_seconds"],
        )


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
