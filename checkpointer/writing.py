"""Writing one checkpoint: tensor files, small files, index, manifest, commit. Nothing is visible before the last."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime

import xxhash

from checkpointer import layout
from checkpointer.commit import Attempt
from checkpointer.index import Chunk, Index, Json
from checkpointer.info import CheckpointInfo
from checkpointer.manifest import Manifest
from checkpointer.repository import Repository
from checkpointer.sharing import Source
from checkpointer.staging import SharedFile, Staged, StagedFile
from checkpointer.storage import Buffer
from checkpointer.tensorfile import shard_indexes

logger = logging.getLogger("checkpointer")


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


def write_checkpoint(repository: Repository, snapshot: Snapshot) -> tuple[CheckpointInfo, Source]:
    """Write and commit; durable when this returns. On any error nothing is visible and what was written is removed.

    Returns the checkpoint, and what a later one needs to share its files.
    """
    began = time.perf_counter()
    files = snapshot.staged.files
    small = _small_files(snapshot)
    size = sum(file.size for file, source in files if not isinstance(source, SharedFile))
    attempt = repository.begin(snapshot.step, size + sum(map(len, small.values())))
    try:
        chunks: dict[tuple[str, str], tuple[Chunk, ...]] = {}
        for item in files:
            chunks.update(_write_tensors(repository, attempt, item))
        for path, data in small.items():
            attempt.write(path, [data], len(data))
        index = _index(snapshot.staged, chunks)
        data = index.to_bytes()
        attempt.write(layout.INDEX, [data], len(data))
        manifest = _manifest(repository, snapshot, attempt, time.perf_counter() - began)
        info = repository.commit(attempt, manifest)
    except BaseException:
        _abandon(repository, attempt)
        raise
    return info, Source.of(info, manifest, index)


def _abandon(repository: Repository, attempt: Attempt) -> None:
    """Tidy up after a failure, whose own error matters more than one met here."""
    try:
        repository.abandon(attempt)
    except OSError:
        logger.warning("could not remove the unfinished %s; the next writer will", attempt.directory, exc_info=True)


def _small_files(snapshot: Snapshot) -> dict[str, bytes]:
    attached = {f"{layout.ATTACHMENTS}/{name}": data for name, data in snapshot.attachments.items()}
    staged = snapshot.staged
    return {**shard_indexes([file for file, _ in staged.files], staged.parts), **attached}


def _write_tensors(
    repository: Repository, attempt: Attempt, item: StagedFile
) -> dict[tuple[str, str], tuple[Chunk, ...]]:
    """Write one tensor file; returns the chunks that it holds."""
    file, source = item
    hashes: list[str] = []
    if isinstance(source, SharedFile) and repository.share(attempt, file.path, source.earlier, source.record):
        hashes += source.hashes
    else:
        attempt.write(file.path, _file_pieces(item, hashes), file.size, steady=source.steady)
    start = len(file.header)
    return {
        (slot.component, slot.key): (
            Chunk((0,) * len(spec.shape), spec.shape, file.path, start + slot.begin, start + slot.end, xxh3),
        )
        for slot, spec, xxh3 in zip(file.slots, file.specs, hashes, strict=True)
    }


def _file_pieces(item: StagedFile, hashes: list[str]) -> Iterator[Buffer]:
    yield item.file.header
    yield from item.source.pieces(hashes)


def _index(staged: Staged, chunks: Mapping[tuple[str, str], tuple[Chunk, ...]]) -> Index:
    headers = {file.path: (len(file.header), xxhash.xxh3_128_hexdigest(file.header)) for file, _ in staged.files}
    return Index(dict(staged.components), chunks, headers)


def _manifest(repository: Repository, snapshot: Snapshot, attempt: Attempt, seconds: float) -> Manifest:
    return Manifest(
        id=attempt.id,
        parent=snapshot.parent,
        sequence=repository.list_checkpoints().next_sequence,
        step=snapshot.step,
        epoch=snapshot.epoch,
        created=snapshot.created,
        metrics=snapshot.metrics,
        tags=snapshot.tags,
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
