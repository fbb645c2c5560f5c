"""The storage writer: each rank writes one safetensors file into one attempt, and the coordinator commits it."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from checkpointer.dcp.checkpoint_id import CheckpointId, is_checkpoint_id, parse_checkpoint_id
from checkpointer.dcp.rank_writer import RankPart, RankTask, index_of, namings, size_of
from checkpointer.distributed.rank_report import write_index
from checkpointer.environment import environment
from checkpointer.errors import ConfigError, SaveError
from checkpointer.format.manifest import Manifest
from checkpointer.repository.commit import Attempt
from checkpointer.repository.commit.base import existing_at
from checkpointer.repository.repository import Repository
from checkpointer.state.modes import refuse_to_save
from checkpointer.storage import open_storage


class SafetensorsWriter(StorageWriter):
    """Writes what DCP saves as a checkpoint of this library's format: see :mod:`checkpointer.dcp`.

    For one save at a time. The coordinator holds the run's writer lock from planning to the commit, and waits for
    nobody else: a run root that a :class:`~checkpointer.CheckpointManager` is writing to is refused.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        storage_options: Mapping[str, object] | None = None,
        durable: bool = True,
        threads: int = 2,
        epoch: int | None = None,
        metrics: Mapping[str, float] | None = None,
        tags: Iterable[str] = (),
    ) -> None:
        """Prepare; nothing is read or written yet.

        Args:
            path: ``<run root>/checkpoint-<step>``, path or fsspec URL; or leave it to ``dcp.save(checkpoint_id=…)``.
            storage_options: handed to fsspec.
            durable: fsync; false only for throw-away runs.
            threads: that write one large file.
            epoch: recorded in the manifest, as are ``metrics`` and ``tags``.
            metrics: numbers that retention can go by.
            tags: words to find the checkpoint by.

        Raises:
            ConfigError: the path has another form.
        """
        super().__init__()
        self._options = dict(storage_options or {})
        self._durable, self._threads = durable, threads
        self._epoch, self._metrics, self._tags = epoch, dict(metrics or {}), tuple(tags)
        self._place: CheckpointId | None = None if path is None else parse_checkpoint_id(path)
        self.checkpoint_id: str | os.PathLike[str] | None = path
        """The directory, as it was given."""
        self._session = _Session.of(self)

    def __getstate__(self) -> dict[str, Any]:
        """For the process in which DCP can save asynchronously: a writer that has begun nothing."""
        return {name: value for name, value in self.__dict__.items() if name != "_session"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._session = _Session.of(self)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a new save, to ``checkpoint_id`` if one is given. DCP calls this."""
        self._session.give_up()
        if checkpoint_id is not None:
            self._place, self.checkpoint_id = parse_checkpoint_id(checkpoint_id), checkpoint_id

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:  # noqa: FBT001
        """Open the run root; the coordinator takes the writer's lock. DCP calls this on every rank."""
        del args
        if not kwargs.get("use_collectives", True):
            raise ConfigError("use_collectives=False leaves no one to commit for all ranks: leave it out")
        self._session.give_up()
        place = self._known_place()
        storage = open_storage(place.root, self._options, durable=self._durable, threads=self._threads)
        repository = self._session.begin(Repository(storage))
        if is_coordinator:
            repository.lock.acquire("a save of checkpointer.dcp")
            repository.recover()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Leave the plan as it is. DCP calls this."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Begin the attempt, and name each rank's file. DCP calls this on the coordinator."""
        place, session = self._known_place(), self._session
        if not all(plan.usable for plan in plans):
            raise ConfigError("enable_plan_caching repeats the names of an earlier save's files: leave it out")
        assert session.repository is not None
        held = existing_at(session.repository.storage, place.name)
        if held is not None and held.keep:
            raise SaveError(
                f"{self.checkpoint_id} is pinned, of a newer format, or not to be read by this user, and is not "
                "replaced: choose another step, or run 'checkpointer unpin' first"
            )
        attempt = session.attempt = session.repository.begin(place.step, sum(map(size_of, plans)))
        return [
            replace(plan, storage_data=RankTask(place.step, attempt.id, naming))
            for plan, naming in zip(plans, namings(plans), strict=True)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's items, durably. DCP calls this."""
        refuse_to_save()
        part, repository = plan.storage_data, self._session.repository
        assert isinstance(part, RankTask)
        assert repository is not None
        attempt = self._session.attempt or repository.join(part.step, part.id)
        if attempt.id != part.id:
            raise ConfigError("this planner repeats an earlier save's plan, which names files that exist: do without")
        done: Future[list[WriteResult]] = Future()
        done.set_result(RankPart(attempt, part, plan.items, planner).write())
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Check that every byte is there, and commit. DCP calls this on the coordinator, after all have written."""
        session = self._session
        repository, attempt = session.repository, session.attempt
        assert repository is not None
        assert attempt is not None
        reports = [(result.index, result.storage_data) for rank in results for result in rank]
        for _, stored in reports:
            attempt.files.update({} if stored.rank is None else stored.rank.files)
        write_index(attempt, index_of(metadata, reports), joined=True)
        repository.commit(attempt, self._manifest(repository, attempt, len(results)))
        session.attempt = None
        session.give_up()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether ``checkpoint_id`` is a directory that this writer can write."""
        return is_checkpoint_id(checkpoint_id)

    @contextmanager
    def given_up_on_error(self) -> Iterator[None]:
        """Remove what a save has written, and free the lock, if it fails: DCP tells the writer nothing of that."""
        try:
            yield
        except BaseException:
            self._session.give_up()
            raise

    def _known_place(self) -> CheckpointId:
        if self._place is None:
            raise ConfigError("no directory was given: SafetensorsWriter('runs/gpt/checkpoint-500')")
        return self._place

    def _manifest(self, repository: Repository, attempt: Attempt, ranks: int) -> Manifest:
        listing = repository.list_checkpoints()
        parent = listing.checkpoints[-1].id if listing.checkpoints else None
        return Manifest(
            id=attempt.id,
            parent=parent,
            sequence=repository.next_sequence(),
            step=attempt.step,
            epoch=self._epoch,
            created=datetime.now(timezone.utc),
            metrics=self._metrics,
            tags=self._tags,
            world_size=ranks,
            data=attempt.data,
            **attempt.totals(),
            environment=environment(),
        )


class _Session:
    """What one save holds on to. Apart from the writer, so that it can be given up when that is collected."""

    def __init__(self) -> None:
        self.repository: Repository | None = None
        self.attempt: Attempt | None = None
        self._thread = threading.current_thread()

    @classmethod
    def of(cls, writer: SafetensorsWriter) -> _Session:
        """For ``writer``, and no longer than it is there."""
        session = cls()
        weakref.finalize(writer, session.give_up)
        return session

    def begin(self, repository: Repository) -> Repository:
        """Begin a save, and give up those that have failed.

        DCP tells a writer nothing of what fails on other ranks, and a program may keep it. But a thread makes one save
        at a time: an earlier one of this thread, or of one that has ended, is over.
        """
        self._thread = threading.current_thread()
        for other in tuple(_begun):
            if other is not self and other.over:
                other.give_up()
        self.repository = repository
        _begun.add(self)
        return repository

    @property
    def over(self) -> bool:
        """Whether its save cannot be running any more."""
        return self._thread is threading.current_thread() or not self._thread.is_alive()

    def give_up(self) -> None:
        """Remove what was written and not committed, and free the lock."""
        _begun.discard(self)
        repository, attempt = self.repository, self.attempt
        self.repository = self.attempt = None
        if repository is None or not repository.lock.held:
            return
        try:
            if attempt is not None:
                repository.abandon(attempt)
        finally:
            repository.release()


_begun: set[_Session] = set()
"""The saves of this process that are neither committed nor given up."""
