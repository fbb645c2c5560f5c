"""Which files of a new checkpoint may share the bytes of the one before, and why not. Pure.

Sharing saves writing what has not changed, and shares fate: one rotten block damages every checkpoint that lies on it.
So bytes are shared only where their hashes say that they are equal, only from a checkpoint that this process has
written or verified itself, and by a bounded number of consecutive checkpoints.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import xxhash

from checkpointer.format.index import Chunk, FileRecord
from checkpointer.format.info import CheckpointInfo
from checkpointer.format.tensor_files import TensorFile


@dataclass(frozen=True)
class ReuseSource:
    """A committed checkpoint whose files may be shared: this process wrote it, or has verified every byte of them."""

    info: CheckpointInfo
    data: str | None
    """The manifest's ``data``."""
    files: Mapping[str, FileRecord]
    """Those that may be shared."""
    chunks: Mapping[tuple[str, str], tuple[Chunk, ...]]
    """As in :class:`~checkpointer.format.index.Index`."""

    @classmethod
    def of(
        cls,
        info: CheckpointInfo,
        data: str | None,
        files: Mapping[str, FileRecord],
        chunks: Mapping[tuple[str, str], tuple[Chunk, ...]],
        verified: Collection[str],
    ) -> ReuseSource:
        """A checkpoint of which every byte of the files ``verified`` was checked."""
        return cls(info, data, {path: files[path] for path in verified}, chunks)

    def place(self, path: str) -> str:
        """Where file ``path`` lies, relative to the checkpoint's directory."""
        return f"{self.data}/{path}" if self.data else path


@dataclass(frozen=True)
class Candidate:
    """A planned file, compared with the same file of an earlier checkpoint as far as that goes without its bytes."""

    reason: str
    """Why it may be shared, or why not."""
    record: FileRecord | None = None
    """What the new manifest will say of the file if it is shared; ``None``: it is written."""
    hashes: tuple[str, ...] = ()
    """xxh3-128 of the bytes of each slot's tensor in the earlier checkpoint."""

    def confirmed(self, hashes: Sequence[str]) -> Candidate:
        """The decision, now that the hash of each slot's tensor is known."""
        if self.record is None or tuple(hashes) == self.hashes:
            return self
        changed = sum(new != old for new, old in zip(hashes, self.hashes, strict=True))
        return Candidate(f"{changed} of {len(self.hashes)} tensors have changed")


def candidate(file: TensorFile, source: ReuseSource | None, limit: int | Literal[False]) -> Candidate:
    """Whether it is worth hashing the tensors of ``file`` to share it; ``limit`` is ``write: {share}``."""
    if limit is False:
        return Candidate("sharing is switched off")
    if not file.frozen:
        return Candidate("it holds tensors that are trained")
    if source is None:
        return Candidate("there is no checkpoint before it that this process has written or verified")
    return _compared(file, source, limit)


def _compared(file: TensorFile, source: ReuseSource, limit: int) -> Candidate:
    if source.info.damaged is not None:
        return Candidate(f"{source.info} is damaged: {source.info.damaged}")
    if source.info.finite is False:
        return Candidate(f"{source.info} holds NaN or infinities: whether this file does is looked at anew")
    record = source.files.get(file.path)
    if record is None:
        return Candidate(f"{source.info} has no such file that was verified")
    if record.turn >= limit:
        return Candidate(f"its bytes serve {record.turn} checkpoints in a row already")
    hashes = _hashes(file, source)
    if record.size != file.size or hashes is None:
        return Candidate(f"{source.info} has other tensors in it")
    shared = replace(record, origin=record.origin or source.info.id, turn=record.turn + 1)
    return Candidate(f"the same as in {source.info}", shared, hashes)


def _hashes(file: TensorFile, source: ReuseSource) -> tuple[str, ...] | None:
    """The hash of each tensor in the source's file; ``None`` where that is not laid out as the new one."""
    header = file.header
    if source.files[file.path].header != (len(header), xxhash.xxh3_128_hexdigest(header)):
        return None
    hashes = []
    for slot in file.slots:
        chunks = source.chunks.get((slot.component, slot.key), ())  # several where other ranks hold parts of it
        where = (file.path, len(header) + slot.begin, len(header) + slot.end)
        found = [chunk.xxh3 for chunk in chunks if (chunk.file, chunk.begin, chunk.end) == where]
        if len(found) != 1:
            return None
        hashes += found
    return tuple(hashes)


__all__ = ["Candidate", "ReuseSource", "candidate"]
