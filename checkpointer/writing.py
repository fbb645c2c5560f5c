"""Writing one checkpoint: tensor files, small files, index, manifest, commit. Nothing is visible before the last."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property

import xxhash

from checkpointer import layout, strictjson
from checkpointer.commit import Attempt
from checkpointer.digest import Digest
from checkpointer.distributed.cooperation import OWN, Share
from checkpointer.distributed.ranks import AS_JSON, Alone, Meeting
from checkpointer.distributed.report import Places, RankFiles, RankFilesForm, all_finite_over_ranks, separated
from checkpointer.index import Chunk, Index, Json, parse_index
from checkpointer.info import CheckpointInfo
from checkpointer.manifest import Manifest, parse_manifest
from checkpointer.repository import Repository
from checkpointer.sharing import Source
from checkpointer.staging import SharedFile, Staged, StagedFile
from checkpointer.storage import Buffer
from checkpointer.tensorfile import joined_shard_indexes, shard_indexes

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
    share: Share = field(default_factory=lambda: Share(Alone(), {}, {}, {}))
    """Which part of the save this process writes; all of it where there is one."""
    wait_seconds: float = 0.0
    """How long ``save`` waited for the one before."""
    stall_seconds: float = 0.0
    """How long ``save`` held training from then on, up to here."""

    @cached_property
    def small_files(self) -> dict[str, bytes]:
        """Attachments, and the indexes of sharded components, by path."""
        if not self.share.coordinator:
            return {}
        attached = {f"{layout.ATTACHMENTS}/{name}": data for name, data in self.attachments.items()}
        if self.share.ranks.size > 1:  # the shards of all ranks are known only when all have written
            return attached
        return {**shard_indexes([file for file, _ in self.staged.files], self.staged.parts), **attached}


def write_checkpoint(repository: Repository, snapshot: Snapshot) -> tuple[CheckpointInfo, Source]:
    """Write and commit; durable when this returns. On any error nothing is visible and what was written is removed.

    Returns the checkpoint, and what a later one needs to share the files that this rank has written. Every rank calls
    this; each writes its own files, and the coordinator commits once all have.
    """
    began = time.perf_counter()
    ranks = snapshot.share.ranks
    meeting = Meeting(f"the save of step {snapshot.step} to {repository.url}", RankFilesForm(), _CommittedForm())
    attempt = _begin(repository, snapshot, meeting.what)

    written: list[RankFiles] = []

    def write() -> RankFiles:
        written.append(_write_files(repository, attempt, snapshot))
        return written[0]

    def commit(parts: Sequence[RankFiles]) -> _Committed:
        return _commit(repository, snapshot, attempt, parts, began)

    try:
        done = ranks.meet(meeting, write, commit)
    except BaseException:
        if ranks.rank == 0:
            _abandon(repository, attempt)
        raise
    (mine,) = written
    return done.info, Source(done.info, done.manifest.data, mine.files, mine.headers, mine.chunks)


def refuse(share: Share, what: str, error: BaseException) -> None:
    """Let the other ranks know that this one cannot write its part: they are waiting for it."""

    def fail() -> Json:
        raise error

    def begin(sizes: Sequence[Json]) -> Json:
        raise AssertionError(sizes)

    with contextlib.suppress(BaseException):  # ``error`` itself, which the caller raises
        share.ranks.meet(Meeting(what, AS_JSON, AS_JSON), fail, begin)


def _begin(repository: Repository, snapshot: Snapshot, what: str) -> Attempt:
    """A new attempt, of which every rank knows."""
    begun: list[Attempt] = []

    def begin(sizes: Sequence[Json]) -> Json:
        begun.append(repository.begin(snapshot.step, sum(size for size in sizes if isinstance(size, int))))
        return begun[0].id

    meeting = Meeting(what, AS_JSON, AS_JSON)
    id = snapshot.share.ranks.meet(meeting, lambda: bytes_to_write(repository, snapshot), begin)
    return begun[0] if begun else repository.join(snapshot.step, str(id))


def _write_files(repository: Repository, attempt: Attempt, snapshot: Snapshot) -> RankFiles:
    """All files of this rank but the index of the checkpoint."""
    tensors = _TensorFiles(repository, attempt, snapshot)
    for item in snapshot.staged.files:
        tensors.write(item)
    for path, data in snapshot.small_files.items():
        attempt.write(path, [data], len(data))
    shared, own = separated(tensors.chunks, _headers(snapshot.staged))
    if any(name.startswith(OWN) for name in snapshot.staged.components):
        data = _own_index(snapshot.staged, own).to_bytes()
        attempt.write(layout.rank_index(snapshot.share.ranks.rank), [data], len(data))
    return RankFiles(
        files=dict(attempt.files),
        headers=shared.headers,
        chunks=shared.chunks,
        finite=tensors.finite,
        learned=bool(snapshot.staged.learned),
        fsync_seconds=attempt.fsync_seconds,
    )


@dataclass(frozen=True)
class _Committed:
    info: CheckpointInfo
    manifest: Manifest


class _CommittedForm:
    def pack(self, value: _Committed) -> Json:
        return {"path": value.info.path, "manifest": value.manifest.to_bytes().decode("ascii")}

    def unpack(self, raw: Json) -> _Committed:
        part = strictjson.mapping(raw, "commit")
        manifest = parse_manifest(part["manifest"].encode("ascii"), "the manifest of the coordinator")
        return _Committed(manifest.info(part["path"]), manifest)


def _commit(
    repository: Repository, snapshot: Snapshot, attempt: Attempt, parts: Sequence[RankFiles], began: float
) -> _Committed:
    """On the coordinator, after every rank has written."""
    index = _index(snapshot, parts)
    for part in parts:
        attempt.files.update(part.files)
    data = index.to_bytes()
    if len(parts) > 1:
        sizes = {path: record.size for path, record in attempt.files.items()}
        parse_index(data, sizes, "the index of all ranks")  # every byte of every tensor is there, exactly once
        for path, content in joined_shard_indexes(index).items():
            attempt.write(path, [content], len(content))
    attempt.write(layout.INDEX, [data], len(data))
    seconds = time.perf_counter() - began
    manifest = _manifest(repository, snapshot, attempt, seconds, finite=all_finite_over_ranks(parts), ranks=len(parts))
    return _Committed(repository.commit(attempt, manifest), manifest)


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

    def __init__(self, repository: Repository, attempt: Attempt, snapshot: Snapshot) -> None:
        self._repository = repository
        self._attempt = attempt
        self._learned = snapshot.staged.learned
        self._boxes = snapshot.share.boxes
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
            box = self._boxes.get((slot.component, slot.key))
            offsets = (0,) * len(spec.shape) if box is None else box.offsets
            place = Chunk(offsets, spec.shape, file.path, start + slot.begin, start + slot.end, xxh3)
            self.chunks[slot.component, slot.key] = (place,)

    def _share(self, path: str, source: SharedFile) -> bool:
        return self._repository.share(self._attempt, path, source.earlier, source.record)


def _file_pieces(item: StagedFile, digest: Digest) -> Iterator[Buffer]:
    yield item.file.header
    yield from item.source.pieces(digest)
    digest.update(memoryview(b""))  # tensors without elements at the end


def _headers(staged: Staged) -> dict[str, tuple[int, str]]:
    return {file.path: (len(file.header), xxhash.xxh3_128_hexdigest(file.header)) for file, _ in staged.files}


def _own_index(staged: Staged, own: Places) -> Index:
    """What this rank has otherwise than the coordinator."""
    components = {name.removeprefix(OWN): part for name, part in staged.components.items() if name.startswith(OWN)}
    return Index(components, own.chunks, own.headers)


def _index(snapshot: Snapshot, parts: Sequence[RankFiles]) -> Index:
    """Of all ranks. Where there is one, as it stands."""
    components = snapshot.share.components or snapshot.staged.components
    if len(parts) == 1:
        return Index(dict(components), parts[0].chunks, parts[0].headers)
    chunks: dict[tuple[str, str], tuple[Chunk, ...]] = {
        (name, key): () for name, component in components.items() for key in component.tensors
    }
    headers: dict[str, tuple[int, str]] = {}
    for part in parts:
        headers.update(part.headers)
        for place, found in part.chunks.items():
            chunks[place] += found
    return Index(dict(components), chunks, headers)


def _manifest(
    repository: Repository, snapshot: Snapshot, attempt: Attempt, seconds: float, *, finite: bool | None, ranks: int
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
        world_size=ranks,
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
