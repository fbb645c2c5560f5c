"""Writing one checkpoint: tensor files, small files, index, manifest, commit. Nothing is visible before the last."""

from __future__ import annotations

import contextlib
import errno
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, NamedTuple

from checkpointer.distributed.rank_report import (
    NoRoom,
    RankFiles,
    RankReport,
    all_finite_over_ranks,
    joined_index,
    separated,
    write_index,
)
from checkpointer.distributed.save_plan import OWN, RankPlan
from checkpointer.errors import SaveError
from checkpointer.format import paths
from checkpointer.format.index import Chunk, Component, FileRecord, Index, Json, RankPart
from checkpointer.format.info import CheckpointInfo
from checkpointer.format.manifest import Manifest
from checkpointer.format.table import pack_part
from checkpointer.format.tensor_files import SMALL_COMPONENT, TensorFile
from checkpointer.policy.reuse import ReuseSource
from checkpointer.repository.commit import Attempt
from checkpointer.repository.repository import Repository
from checkpointer.save.snapshot import Snapshot, bytes_to_write
from checkpointer.save.tensor_writer import chunks_of, header_of, write_file
from checkpointer.staging.digest import Digest
from checkpointer.staging.stager import ReusedFile, Staged, StagedFile
from checkpointer.system import messages
from checkpointer.system.gc import collector_paused

logger = logging.getLogger("checkpointer")

_FULL = (errno.ENOSPC, errno.EDQUOT)


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is a lack of space or an exceeded quota."""
    return isinstance(error, OSError) and (error.errno in _FULL or is_full(error.__cause__))


def no_room_is_made() -> bool:
    """For whom nothing may be removed to make room."""
    return False


def write_checkpoint(
    repository: Repository, snapshot: Snapshot, make_room: Callable[[], bool] = no_room_is_made
) -> tuple[CheckpointInfo, ReuseSource]:
    """Write and commit; durable when this returns. On any error nothing is visible and what was written is removed.

    Returns the checkpoint, and what a later one needs to share the files that this rank has written. Every rank calls
    this; each writes its own files, and the coordinator commits once all have. Where any of them has no room the
    coordinator calls ``make_room``, and if that has freed some all ranks write once more.
    """
    began = time.perf_counter()
    done = _Writing(repository, snapshot, make_room, began).carried_out()
    if done is None:
        done = _Writing(repository, snapshot, no_room_is_made, began).carried_out()
    assert done is not None, "only what was made room for is tried again"
    return done


class _Writing:
    """One attempt of all ranks."""

    def __init__(self, repository: Repository, snapshot: Snapshot, make_room: Callable[[], bool], began: float) -> None:
        self._repository = repository
        self._snapshot = snapshot
        self._make_room = make_room
        self._began = began
        self._ranks = snapshot.rank_plan.ranks
        self._what = f"the save of step {snapshot.step} to {repository.url}"
        self._repeatable = False
        """Whether every rank could write its files once more. Known to the coordinator."""
        self._full: OSError | None = None
        """What told this rank that there is no room."""

    def carried_out(self) -> tuple[CheckpointInfo, ReuseSource] | None:
        """The checkpoint, and what may be shared of it; ``None`` where there was no room, and now there is some."""
        attempt = self._begin()
        try:
            with self._ranks.exchange(self._what) as exchange:
                report = self._write(attempt)
                reports = exchange.gather(report, RankReport)
                outcome = exchange.broadcast(None if reports is None else self._finish(attempt, reports), _Outcome)
        except BaseException:
            if self._ranks.rank == 0:
                _abandon(self._repository, attempt)
            raise
        if outcome.no_room is not None:
            raise self._error(outcome.no_room)
        if outcome.commit is None:
            return None
        mine = report.written
        assert mine is not None
        info = outcome.commit.info
        return info, ReuseSource(info, outcome.commit.data, mine.files, mine.chunks)

    def _begin(self) -> Attempt:
        """A new attempt, of which every rank knows."""
        step, live = self._snapshot.step, self._snapshot.staged.live
        attempt = None
        with self._ranks.exchange(self._what) as exchange:
            # What is read from live memory is read once.
            needs = exchange.gather(_Need(bytes_to_write(self._repository, self._snapshot), live is None), _Need)
            if needs is not None:
                self._repeatable = all(need.repeatable for need in needs)
                attempt = self._begun(sum(need.size for need in needs))
            id = exchange.broadcast(None if attempt is None else attempt.id, str)
        return attempt or self._repository.join(step, id)

    def _begun(self, size: int) -> Attempt:
        """On the coordinator."""
        try:
            return self._repository.begin(self._snapshot.step, size)
        except OSError as error:
            if not (is_full(error) and self._make_room()):
                raise
        return self._repository.begin(self._snapshot.step, size)

    def _write(self, attempt: Attempt) -> RankReport:
        try:
            return RankReport(_write_files(self._repository, attempt, self._snapshot))
        except OSError as error:
            return RankReport(None, self._no_room(error))

    def _finish(self, attempt: Attempt, reports: Sequence[RankReport]) -> _Outcome:
        """On the coordinator, once every rank has written, or has no room."""
        lacking = {rank: report.no_room for rank, report in enumerate(reports) if report.no_room is not None}
        if not lacking:
            written = [report.written for report in reports if report.written is not None]
            try:
                return _Outcome(_commit(self._repository, self._snapshot, attempt, written, self._began))
            except OSError as error:
                lacking = {0: self._no_room(error)}
        _abandon(self._repository, attempt)
        if self._make_room() and self._repeatable:  # else there is room for the next save
            return _Outcome()
        told = "; ".join(f"rank {rank} of {self._ranks.size}: {part.text}" for rank, part in lacking.items())
        return _Outcome(no_room=NoRoom(told, next(iter(lacking.values())).errno))

    def _no_room(self, error: OSError) -> NoRoom:
        if not is_full(error):
            raise error
        self._full = error
        return NoRoom(self._repository.storage.redact(f"{type(error).__name__}: {error}"), error.errno)

    def _error(self, lacking: NoRoom) -> OSError:
        """The same on every rank, but for its cause."""
        if self._ranks.size == 1 and self._full is not None:
            return self._full
        error = SaveError(
            f"{self._what} failed, there is no room for it: {lacking.text}. Nothing was committed. "
            "Free some space, or keep fewer checkpoints (keep: in the configuration)"
        )
        error.errno, error.__cause__ = lacking.errno, self._full
        return error


def refuse(rank_plan: RankPlan, what: str, error: BaseException) -> None:
    """Let the other ranks know that this one cannot write its part: they are waiting for it."""
    with contextlib.suppress(BaseException), rank_plan.ranks.exchange(what):
        raise error  # which the caller raises, too


def _write_files(repository: Repository, attempt: Attempt, snapshot: Snapshot) -> RankFiles:
    """All files of this rank but the index of the checkpoint."""
    tensors = _TensorFiles(repository, attempt, snapshot)
    for item in snapshot.staged.files:
        tensors.write(item)
    for path, data in snapshot.small_files.items():
        attempt.write(path, [data], len(data))
    shared, own = separated(tensors.chunks)
    own_paths = {chunk.file for found in own.values() for chunk in found}
    files = {path: record for path, record in attempt.files.items() if path not in own_paths}
    own_files = {path: record for path, record in attempt.files.items() if path in own_paths}
    return RankFiles(
        files=files,
        chunks=shared,
        finite=tensors.finite,
        trainable=bool(snapshot.staged.trainable),
        part=_write_part(attempt, snapshot, RankPart(_own_components(snapshot.staged), own, own_files), tensors.inside),
        own_files=own_files,
        fsync_seconds=attempt.fsync_seconds,
    )


def _own_components(staged: Staged) -> dict[str, Component]:
    """What this rank has otherwise than the coordinator."""
    return {name.removeprefix(OWN): part for name, part in staged.components.items() if name.startswith(OWN)}


def _write_part(attempt: Attempt, snapshot: Snapshot, part: RankPart, inside: bytes) -> FileRecord | None:
    if not part.components:
        return None
    data = pack_part(part, inside)
    return attempt.write(paths.rank_index(snapshot.rank_plan.ranks.rank), [data], len(data))


class _Need(NamedTuple):
    """What a rank wants to write."""

    size: int
    """In bytes."""
    repeatable: bool
    """Whether it could write them once more."""


class _Commit(NamedTuple):
    """What every rank is told of a commit: the fields of its :class:`CheckpointInfo`, and the manifest's ``data``."""

    step: int
    epoch: int | None
    sequence: int
    id: str
    parent: str | None
    created: datetime
    metrics: dict[str, float]
    tags: tuple[str, ...]
    size: int
    finite: bool | None
    path: str
    statistics: dict[str, Any]
    copies: dict[str, int]
    data: str | None

    @classmethod
    def of(cls, info: CheckpointInfo, data: str | None) -> _Commit:
        return cls(**{name: getattr(info, name) for name in cls._fields if name != "data"}, data=data)

    @property
    def info(self) -> CheckpointInfo:
        return CheckpointInfo(**{name: value for name, value in self._asdict().items() if name != "data"})


class _Outcome(NamedTuple):
    """What the coordinator makes of it; neither of both: there is room now, try again."""

    commit: _Commit | None = None
    no_room: NoRoom | None = None


def _commit(
    repository: Repository, snapshot: Snapshot, attempt: Attempt, parts: Sequence[RankFiles], began: float
) -> _Commit:
    """On the coordinator, after every rank has written."""
    index = _index(snapshot, parts)
    for rank, part in enumerate(parts):
        attempt.files.update(part.all_files)
        if part.part is not None:
            attempt.files[paths.rank_index(rank)] = part.part
    write_index(attempt, index, joined=len(parts) > 1)
    seconds = time.perf_counter() - began
    manifest = _manifest(repository, snapshot, attempt, seconds, finite=all_finite_over_ranks(parts), ranks=len(parts))
    return _Commit.of(repository.commit(attempt, manifest), manifest.data)


def _abandon(repository: Repository, attempt: Attempt) -> None:
    """Tidy up after a failure, whose own error matters more than one met here."""
    try:
        repository.abandon(attempt)
    except OSError as error:
        text = "could not remove the unfinished %s; the next writer will"
        messages.log(logger.warning, text, attempt.directory, error=error)


class _TensorFiles:
    """The tensor files of one checkpoint, and what is learned of them while they are written."""

    def __init__(self, repository: Repository, attempt: Attempt, snapshot: Snapshot) -> None:
        self._repository = repository
        self._attempt = attempt
        self._learned = snapshot.staged.trainable
        self._boxes = snapshot.rank_plan.boxes
        self._not_finite: list[str] = []
        self._unseen = False
        self._own_path = paths.shared_tensors(snapshot.rank_plan.ranks.rank, own=True)
        self.chunks: dict[tuple[str, str], tuple[Chunk, ...]] = {}
        self.inside = b""
        """Bytes of tensors that are kept in this rank's part of the index."""

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
        if file.path == self._own_path and file.data_size < SMALL_COMPONENT:
            self._keep_inside(item)
            return
        if isinstance(source, ReusedFile) and self._share(file.path, source):
            hashes = source.hashes
            self._unseen = self._unseen or source.earlier.info.finite is None
        else:
            digest = write_file(self._attempt, item, self._learned)
            hashes = digest.hashes
            self._not_finite += digest.not_finite
        self._attempt.files[file.path] = replace(self._attempt.files[file.path], header=header_of(file))
        with collector_paused():
            chunks = chunks_of(file, hashes, self._offsets(file))
            self.chunks.update({slot[:2]: (chunk,) for slot, chunk in zip(file.slots, chunks, strict=True)})

    def _offsets(self, file: TensorFile) -> Iterator[tuple[int, ...]]:
        """Where in the whole tensor each tensor of a file begins."""
        for slot, spec in zip(file.slots, file.specs, strict=True):
            box = self._boxes.get(slot[:2]) if self._boxes else None
            yield (0,) * len(spec.shape) if box is None else box.offsets

    def _keep_inside(self, item: StagedFile) -> None:
        """Small tensors of this rank alone lie in its part of the index: ten thousand ranks have so many files less."""
        digest = Digest(item.file, self._learned)
        self.inside = b"".join([bytes(block) for block in item.source.pieces(digest)])
        digest.update(memoryview(b""))
        for slot, spec, xxh3 in zip(item.file.slots, item.file.specs, digest.hashes, strict=True):
            begins = (0,) * len(spec.shape)
            self.chunks[slot.component, slot.key] = (Chunk(begins, spec.shape, "", slot.begin, slot.end, xxh3),)

    def _share(self, path: str, source: ReusedFile) -> bool:
        return self._repository.reuse(self._attempt, path, source.earlier, source.record)


def _index(snapshot: Snapshot, parts: Sequence[RankFiles]) -> Index:
    """Of all ranks. Where there is one, as it stands."""
    components = snapshot.rank_plan.components or snapshot.staged.components
    if len(parts) == 1:
        tensor_files = {path: record for path, record in parts[0].files.items() if record.header is not None}
        return Index(dict(components), parts[0].chunks, tensor_files)
    return joined_index(components, parts)


def _manifest(
    repository: Repository, snapshot: Snapshot, attempt: Attempt, seconds: float, *, finite: bool | None, ranks: int
) -> Manifest:
    return Manifest(
        id=attempt.id,
        parent=snapshot.parent,
        sequence=repository.next_sequence(),
        step=snapshot.step,
        epoch=snapshot.epoch,
        created=snapshot.created,
        metrics=snapshot.metrics,
        tags=snapshot.tags,
        finite=finite,
        world_size=ranks,
        data=attempt.data,
        **attempt.totals(),
        rules=snapshot.rules,
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
