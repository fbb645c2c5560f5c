"""Writing one checkpoint: tensor files, small files, index, manifest, commit. Nothing is visible before the last."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property

import xxhash

from checkpointer import layout
from checkpointer.commit import Attempt
from checkpointer.digest import Digest
from checkpointer.index import Chunk, Index, Json
from checkpointer.info import CheckpointInfo
from checkpointer.manifest import Manifest
from checkpointer.repository import Repository
from checkpointer.sharing import Source
from checkpointer.staging import SharedFile, Staged, StagedFile
from checkpointer.storage import Buffer
from checkpointer.tensorfile import shard_indexes

logger = logging.getLogger("checkpointer")

BLOCK = 4096
"""Bytes that a file takes a multiple of."""

SLACK = 2 * layout.MANIFEST_LIMIT
"""Bytes for the manifest, directories, and plain state in the index, which is measured only once it is written."""

INDEX_ENTRY = 400
"""Bytes that the index spends on one tensor beside its key, which it names twice; about 270 were measured."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Everything that one ``save`` call captured."""

    step: int
    epoch: int | None
    created: datetime
    metrics: Mapping[str, float]
    tags: tuple[str, ...]
    staged: Staged
    attachments: Mapping[str, bytes]
    parent: str | None
    environment: Mapping[str, Json]
    mode: str = "sync"
    wait_seconds: float = 0.0
    """How long ``save`` waited for the one before."""
    stall_seconds: float = 0.0
    """How long ``save`` held training from then on, up to here."""

    @cached_property
    def small_files(self) -> dict[str, bytes]:
        """Attachments, and the indexes of sharded components, by path."""
        attached = {f"{layout.ATTACHMENTS}/{name}": data for name, data in self.attachments.items()}
        return {**shard_indexes([file for file, _ in self.staged.files], self.staged.parts), **attached}


def write_checkpoint(repository: Repository, snapshot: Snapshot) -> tuple[CheckpointInfo, Source]:
    """Write and commit; durable when this returns. On any error nothing is visible and what was written is removed.

    Returns the checkpoint, and what a later one needs to share its files.
    """
    began = time.perf_counter()
    files = snapshot.staged.files
    attempt = repository.begin(snapshot.step, bytes_to_write(repository, snapshot))
    try:
        tensors = _TensorFiles(repository, attempt, snapshot.staged.learned)
        for item in files:
            tensors.write(item)
        for path, data in snapshot.small_files.items():
            attempt.write(path, [data], len(data))
        index = _index(snapshot.staged, tensors.chunks)
        data = index.to_bytes()
        attempt.write(layout.INDEX, [data], len(data))
        manifest = _manifest(repository, snapshot, attempt, time.perf_counter() - began, finite=tensors.finite)
        info = repository.commit(attempt, manifest)
    except BaseException:
        _abandon(repository, attempt)
        raise
    return info, Source.of(info, manifest, index)


def bytes_to_write(repository: Repository, snapshot: Snapshot) -> int:
    """What a save takes on disk: whole blocks of every file but those shared with a checkpoint that is still there."""
    staged = snapshot.staged
    earlier = {source.earlier.info.id: source.earlier for _, source in staged.files if isinstance(source, SharedFile)}
    there = {id for id, source in earlier.items() if repository.can_share(source)}
    sizes = [
        file.size
        for file, source in staged.files
        if not isinstance(source, SharedFile) or source.earlier.info.id not in there
    ]
    sizes += map(len, snapshot.small_files.values())
    sizes.append(sum(INDEX_ENTRY + 2 * len(key) for part in staged.components.values() for key in part.tensors))
    return sum(-(-size // BLOCK) * BLOCK for size in sizes) + SLACK


def _abandon(repository: Repository, attempt: Attempt) -> None:
    """Tidy up after a failure, whose own error matters more than one met here."""
    try:
        repository.abandon(attempt)
    except OSError:
        logger.warning("could not remove the unfinished %s; the next writer will", attempt.directory, exc_info=True)


class _TensorFiles:
    """The tensor files of one checkpoint, and what is learned of them while they are written."""

    def __init__(self, repository: Repository, attempt: Attempt, learned: frozenset[tuple[str, str]]) -> None:
        self._repository = repository
        self._attempt = attempt
        self._learned = learned
        self._not_finite: list[str] = []
        self._unseen = False
        self.chunks: dict[tuple[str, str], tuple[Chunk, ...]] = {}

    @property
    def finite(self) -> bool | None:
        """Whether parameters and moments are free of NaN and infinities; ``None`` where nobody has looked at all."""
        if self._not_finite:
            return False
        return None if self._unseen or not self._learned else True

    def write(self, item: StagedFile) -> None:
        """Write one file, or share it with an earlier checkpoint."""
        file, source = item
        hashes: Sequence[str]
        if isinstance(source, SharedFile) and self._share(file.path, source):
            hashes = source.hashes
            self._unseen = self._unseen or source.earlier.info.finite is None
        else:
            digest = Digest(file, self._learned)
            self._attempt.write(file.path, _file_pieces(item, digest), file.size, steady=source.steady)
            hashes = digest.hashes
            self._not_finite += digest.not_finite
        start = len(file.header)
        for slot, spec, xxh3 in zip(file.slots, file.specs, hashes, strict=True):
            place = Chunk((0,) * len(spec.shape), spec.shape, file.path, start + slot.begin, start + slot.end, xxh3)
            self.chunks[slot.component, slot.key] = (place,)

    def _share(self, path: str, source: SharedFile) -> bool:
        return self._repository.share(self._attempt, path, source.earlier, source.record)


def _file_pieces(item: StagedFile, digest: Digest) -> Iterator[Buffer]:
    yield item.file.header
    yield from item.source.pieces(digest)
    digest.update(memoryview(b""))  # tensors without elements at the end


def _index(staged: Staged, chunks: Mapping[tuple[str, str], tuple[Chunk, ...]]) -> Index:
    headers = {file.path: (len(file.header), xxhash.xxh3_128_hexdigest(file.header)) for file, _ in staged.files}
    return Index(dict(staged.components), chunks, headers)


def _manifest(
    repository: Repository, snapshot: Snapshot, attempt: Attempt, seconds: float, *, finite: bool | None
) -> Manifest:
    return Manifest(
        id=attempt.id,
        parent=snapshot.parent,
        sequence=repository.list_checkpoints().next_sequence,
        step=snapshot.step,
        epoch=snapshot.epoch,
        created=snapshot.created,
        metrics=snapshot.metrics,
        tags=snapshot.tags,
        finite=finite,
        data=attempt.data,
        files=dict(attempt.files),
        environment=snapshot.environment,
        statistics=_statistics(snapshot, attempt, seconds),
    )


def _statistics(snapshot: Snapshot, attempt: Attempt, seconds: float) -> dict[str, Json]:
    """What the save has cost; where it is written before ``save`` returns, that holds training too."""
    held = seconds if snapshot.mode == "sync" else 0.0
    return {
        "mode": snapshot.mode,
        "wait_seconds": round(snapshot.wait_seconds, 6),
        "stall_seconds": round(snapshot.stall_seconds + held, 6),
        "write_seconds": round(seconds, 6),
        "fsync_seconds": round(attempt.fsync_seconds, 6),
        "bytes_written": sum(record.size for record in attempt.files.values()) - attempt.bytes_shared,
        "bytes_shared": attempt.bytes_shared,
    }
