"""From a ``save`` call to a durable commit: the handle, the one background writer, and what follows a commit."""

from __future__ import annotations

import contextvars
import errno
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

from checkpointer.config.settings import Config, Mode
from checkpointer.distributed.save_plan import RankPlan
from checkpointer.errors import CheckpointerError, SaveError
from checkpointer.format.info import CheckpointInfo
from checkpointer.policy.reuse import ReuseSource
from checkpointer.repository.prune import Pruner
from checkpointer.repository.repository import Repository
from checkpointer.save.commit_callbacks import CommitCallbacks
from checkpointer.save.first_saves import FirstSaves
from checkpointer.save.handle import PendingSave
from checkpointer.save.snapshot import Snapshot
from checkpointer.save.space import Space
from checkpointer.save.writer import is_full, write_checkpoint
from checkpointer.staging.live import Stepped
from checkpointer.staging.stager import Reusable, Staged, Stager
from checkpointer.staging.step_hook import StepWatch, WatchedSave
from checkpointer.system import messages
from checkpointer.system.threads import Pool

logger = logging.getLogger("checkpointer")


class _Save(NamedTuple):
    """A save on its way from the training thread to the writer's."""

    snapshot: Snapshot
    handle: PendingSave
    future: Future[CheckpointInfo]
    """That of ``handle``."""
    taken: threading.Lock
    context: contextvars.Context
    """As it is in the call of ``save``: a tracing span, or the fields of a logger, reach ``on_commit``."""

    def begins(self) -> bool:
        """True for the first who asks, and who now has to complete the handle."""
        return self.taken.acquire(blocking=False)


def _say_what_nobody_asked_for(
    pid: int, uncollected: list[PendingSave], errors: list[BaseException], kept_warnings: list[Exception]
) -> None:
    """Where a manager is dropped, or the program ends, without ``close``: the last chance to notice an error."""
    if os.getpid() != pid:  # a forked child
        return
    failed = [handle for handle in uncollected if handle.failed and not (handle.reported or handle.left_out)]
    for error in [*errors, *(handle.error() for handle in failed)]:
        logger.error("nobody has asked whether this was saved (mgr.close() does): %s", error)
    for warning in kept_warnings:
        logger.warning("%s", warning)


class Saver:
    """Stages and writes, one save at a time. All methods but the background work belong to the training thread."""

    def __init__(
        self,
        repository: Repository,
        config: Config,
        on_commit: Callable[[CheckpointInfo], object] | None,
        stepped: Callable[[], Stepped],
    ) -> None:
        self._repository = repository
        self._config = config
        self._kept_warnings: list[Exception] = []
        """Those that the user's filters turn into errors, until ``raise_errors``."""
        self._callbacks: CommitCallbacks | None = None
        if on_commit is not None:
            self._callbacks = CommitCallbacks(on_commit, repository, self._kept_warnings.append)
        self._earlier_callbacks: list[CommitCallbacks] = []
        """Of managers of this run that this one has taken over from."""
        self._spared: frozenset[str] = frozenset()
        """What the last pruning let stay because ``on_commit`` had not returned for it."""
        self._stepped = stepped
        self._space = Space(repository, config)
        self._stager = Stager()
        self._steps = StepWatch()
        if config.write.mode == "lazy":
            self._steps.begin()
        self._first: FirstSaves | None = None
        """Until the first copy in ``async`` mode."""
        self._reuse_from: ReuseSource | None = None
        """The checkpoint before, if this process wrote or verified it."""
        self._pool: Pool | None = None
        self._current: PendingSave | None = None
        self._background: Future[None] | None = None
        self._committed: CheckpointInfo | None = None
        self._errors: list[BaseException] = []
        self._guard = threading.Lock()
        self._uncollected: list[PendingSave] = []
        """The save last begun, until it is collected."""
        last_words = (os.getpid(), self._uncollected, self._errors, self._kept_warnings)
        weakref.finalize(self, _say_what_nobody_asked_for, *last_words)
        self._diverged = False
        self.committed_at: float | None = None
        """When the last save of this manager was committed, by ``time.monotonic()``."""

    def prepare(self, components: Iterable[object]) -> None:
        """Expect saves of ``components``: ``async`` mode wants memory for them."""
        if self._config.write.mode == "async":
            self._first = FirstSaves(self._stager, self._steps, components)

    def nothing_due(self) -> None:
        """A step has passed without a save: time to prepare the first one. Never raises."""
        if self._first is not None:
            self._first.foresee()

    @property
    def in_flight(self) -> PendingSave | None:
        """The save that is being written."""
        current = self._current  # another thread may be waiting for it
        return current if current is not None and not current.done() else None

    @property
    def called_from_on_commit(self) -> bool:
        """Whether the calling thread is inside a call of ``on_commit``."""
        return self._callbacks is not None and self._callbacks.called_here

    def unreturned(self) -> frozenset[str]:
        """The ids of the checkpoints that ``on_commit`` has not returned for."""
        own = () if self._callbacks is None else (self._callbacks,)
        return frozenset().union(*(callbacks.unreturned() for callbacks in (*own, *self._earlier_callbacks)))

    def also_unreturned(self, earlier: list[CommitCallbacks]) -> None:
        """Protect the checkpoints that these have not returned for, too."""
        self._earlier_callbacks = [callbacks for callbacks in earlier if callbacks is not self._callbacks]

    def keeping_warnings(self) -> AbstractContextManager[None]:
        """Within this block a warning that is an error waits for ``raise_errors``: what is being done is done."""
        return messages.kept(self._kept_warnings.append)

    @property
    def pruner(self) -> Pruner:
        """What applies retention after each commit, and knows what it has said already."""
        return self._space.pruner

    def take_commit(self) -> CheckpointInfo | None:
        """What was committed since this was last asked."""
        self._collect()
        info, self._committed = self._committed, None
        return info

    def settle(self) -> None:
        """Wait until no write is in flight; its error, if any, is kept for ``raise_errors``."""
        handle = self.in_flight
        if handle is not None:
            messages.log(logger.info, "waiting for the save of step %d, which is still being written", handle.step)
            handle.error()

    def stage(self, rank_plan: RankPlan, mode: Mode, step: int) -> Staged:
        """Make state ready for writing: by reference in ``sync`` mode, by a copy in ``async`` mode.

        ``lazy`` mode copies what not only a step changes; the rest is copied before a step, unless written by then.

        Raises:
            SaveError: there is no memory for the copy.
        """
        try:
            return self._stage(rank_plan, mode, step)
        except (MemoryError, OSError) as error:
            if isinstance(error, OSError) and error.errno != errno.ENOMEM:
                raise
            raise SaveError(
                f"there is no memory for a copy of the state: {error!r}. Nothing was written. "
                "write: {mode: sync} needs no copy, and keeps training waiting while it writes"
            ) from error

    def _stage(self, rank_plan: RankPlan, mode: Mode, step: int) -> Staged:
        captured = rank_plan.captured
        reusable = Reusable(self._reuse_from, self._config.write.share)
        if mode == "sync":
            return self._stager.live(captured, reusable)
        if mode == "lazy":
            self._steps.save_begins()
            changes = self._stepped() if self._steps.choose() == "lazy" else None
            if changes:
                return self._stager.lazily(captured, changes, reusable, seed=step)
        if self._first is not None:
            self._first.close()
            self._first = None
        return self._stager.copies(captured, reusable)

    def reuse_from(self, source: ReuseSource | None) -> None:
        """Let the next save share files with what was restored."""
        self._reuse_from = source
        if self._first is not None:
            self._first.reusable = Reusable(source, self._config.write.share)

    def staged(self) -> None:
        """Copy whatever a save in flight still has to read from live memory."""
        self._steps.detach()

    def still_full(self) -> bool:
        """Whether the last save was left out for want of space, and there still is not enough."""
        return self._space.still_full()

    def submit(self, snapshot: Snapshot) -> PendingSave | None:
        """Write ``snapshot``: at once where its mode is ``sync``, else in the background.

        ``None`` where it has no room and is left out, as configured, if that shows before this returns.
        """
        self._collect()
        alone = snapshot.rank_plan.ranks.size == 1
        if alone and not self._space.admits(snapshot, self._settle_pruning):
            if snapshot.staged.live is not None:
                snapshot.staged.live.end()
            return None
        future: Future[CheckpointInfo] = Future()
        handle = PendingSave(snapshot.step, snapshot.epoch, snapshot.created, future)
        save = _Save(snapshot, handle, future, threading.Lock(), contextvars.copy_context())
        try:
            self._current = handle
            self._uncollected[:] = [handle]
            self._hand_over(save)
        except BaseException as error:  # Ctrl-C: unless the writer has begun, nobody completes the handle
            if save.begins():
                if snapshot.staged.live is not None:
                    snapshot.staged.live.end()
                future.set_exception(SaveError(f"the save of step {snapshot.step} did not begin: {error!r}"))
            raise
        return None if snapshot.mode == "sync" and handle.left_out else handle

    def _hand_over(self, save: _Save) -> None:
        snapshot = save.snapshot
        if snapshot.mode == "sync":
            self._write(save)
            self._background = self._in_background(self._follow_up, save)
            return
        if snapshot.mode == "lazy":  # first: were this interrupted behind it, a step would change what is being written
            live, size = snapshot.staged.live, sum(file.data_size for file, _ in snapshot.staged.files)
            self._steps.watch(WatchedSave("lazy" if live else "async", live, size, save.future.done))
        self._background = self._in_background(self._write_and_follow_up, save)

    def raise_errors(self, *, begun: bool = False) -> None:
        """Raise, once, the errors of background work that nobody has asked for, else a warning that is an error.

        ``begun``: not yet that of the save that was just begun: whoever gets its handle may ask that.
        """
        if not begun:
            self._collect()
        errors = self._take_errors()
        for extra in errors[1:]:
            messages.log(logger.error, "another error of the background writer: %s", extra, error=extra)
        if errors:
            raise errors[0]

    def _take_errors(self) -> list[BaseException]:
        with self._guard:
            errors = self._errors.copy()
            self._errors.clear()
        while self._kept_warnings:  # other threads append
            errors.append(self._kept_warnings.pop(0))
        return errors

    def wait(self) -> None:
        """Wait for the write in flight and for the pruning after it."""
        self.settle()
        background, self._background = self._background, None
        if background is not None:
            background.result()

    def close(self, patience: Callable[[], float]) -> None:
        """Finish everything and free memory and threads. Errors stay for ``raise_errors``.

        ``patience`` gives the seconds that calls of ``on_commit`` are waited for, once all else is done.
        """
        try:
            self.wait()
            with self.keeping_warnings():
                self._await_callbacks(patience)
        finally:
            self._free()

    def retire(self) -> list[BaseException]:
        """Finish for a new manager what was begun, and free memory and threads; the errors that nobody was told.

        Calls of ``on_commit`` go on.
        """
        self.wait()
        self._free()
        self._collect()
        return self._take_errors()

    def _free(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()  # only then is there nobody who reads the memory that is freed here
            self._pool = None
        if self._first is not None:
            self._first.close()
            self._first = None
        self._steps.close()
        self._stager.close()

    def _await_callbacks(self, patience: Callable[[], float]) -> None:
        if self._callbacks is None:
            return
        left = self._callbacks.close(patience())
        if left is not None:
            messages.warn(f"{left}. The checkpoints are committed")
        if self._repository.lock.held and self._spared - self.unreturned():
            self._prune()

    def _in_background(self, function: Callable[..., None], *arguments: Any) -> Future[None] | None:
        """Let the writer's thread carry it out; in this one where no thread can be started any more."""
        # The interpreter joins an executor's threads at exit, so a script that ends during a save still commits it.
        if self._pool is None:
            self._pool = Pool(1, thread_name_prefix="checkpointer-writer")
        try:
            return self._pool.submit(function, *arguments)
        except RuntimeError:  # for example in an atexit handler
            self._pool.shutdown(wait=False, cancel_futures=True)  # it has no thread, but maybe the task
            self._pool = None
            function(*arguments)
            return None

    def _collect(self) -> None:
        """Take a finished save out of flight: its commit, or its error unless somebody has asked its handle."""
        handle = self._current
        if handle is None or not handle.done():
            return
        self._current = None
        self._uncollected.clear()
        error = handle.error()
        if error is None:
            self._committed = handle.result()
        elif not handle.reported and not handle.left_out:
            with self._guard:
                self._errors.insert(0, error)

    def _write_and_follow_up(self, save: _Save) -> None:
        self._write(save)
        self._follow_up(save)

    def _write(self, save: _Save) -> None:
        """Complete the handle, whatever happens: a writer that died silently would leave the caller waiting."""
        if save.begins():
            with self.keeping_warnings():
                self._carry_out(save)

    def _carry_out(self, save: _Save) -> None:
        snapshot = save.snapshot
        try:
            make_room = partial(self._make_room, snapshot)
            info, self._reuse_from = write_checkpoint(self._repository, snapshot, make_room)
        except BaseException as error:  # noqa: BLE001  handed to whoever waits
            failure = self._as_save_error(snapshot.step, error)
            try:
                save.handle.left_out = self._space.leaves_out(snapshot.step, failure)
            finally:
                save.future.set_exception(failure)
            self._say_who_takes_space(failure)
        else:
            self.committed_at = time.monotonic()
            if self._callbacks is not None and snapshot.rank_plan.coordinator:
                self._callbacks.add(info, save.context)  # before the next commit, after which it may be pruned
            save.future.set_result(info)
            messages.log(logger.info, "saved %s (%d bytes)", info.path, info.size)
        finally:
            if snapshot.staged.live is not None:
                snapshot.staged.live.end()

    def _make_room(self, snapshot: Snapshot) -> bool:
        """Free what may be freed for ``snapshot``, which has no room; whether that was anything. On the coordinator."""
        parent = () if snapshot.parent is None else (snapshot.parent,)
        sync = snapshot.mode == "sync"  # else what prunes is this very thread
        return any([sync and self._settle_pruning(), self._space.make_room(parent, self.unreturned)])

    def _settle_pruning(self) -> bool:
        """Wait for the pruning after the last save; whether there was any. On the training thread."""
        background = self._background
        if background is None or background.done():
            return False
        background.exception()
        return True

    def _as_save_error(self, step: int, error: BaseException) -> BaseException:
        if isinstance(error, CheckpointerError) or not isinstance(error, Exception):  # Ctrl-C stays what it is
            return error
        reason = self._repository.storage.redact(f"{type(error).__name__}: {error}")
        wrapped = SaveError(
            f"the save of step {step} to {self._repository.url} failed: {reason}. "
            "Earlier checkpoints are untouched; the next save tries again"
        )
        wrapped.errno = error.errno if isinstance(error, OSError) else None
        wrapped.__cause__ = error
        return wrapped

    def _say_who_takes_space(self, failure: BaseException) -> None:
        count = len(self.unreturned())
        if count and is_full(failure):
            text = "there was no room, and on_commit has not returned for %d checkpoints: they stay on disk until then"
            messages.log(logger.warning, text, count)

    def _follow_up(self, save: _Save) -> None:
        """After a durable commit, on the coordinator: let the user's callback be called, then prune. Never raises."""
        if save.handle.failed or not save.snapshot.rank_plan.coordinator:
            return
        info = save.future.result()
        with self.keeping_warnings():
            try:
                if self._callbacks is not None:
                    self._callbacks.begin()
                self._warn_of_divergence(info)
                self._prune()
                self._space.committed(info)
                self._repository.keep_known()
            except Exception as error:  # noqa: BLE001  it is saved: training goes on
                messages.log(logger.error, "after the commit of %s", info.path, error=error)
                messages.warn(f"{info.path} is committed, but what follows a commit failed: {error!r}")
            self._repository.journal.flush()

    def _prune(self) -> None:
        self._space.prune(unreturned=self._spare)

    def _spare(self) -> frozenset[str]:
        self._spared = self.unreturned()
        return self._spared

    def _warn_of_divergence(self, info: CheckpointInfo) -> None:
        """Once, until a checkpoint is finite again."""
        diverged = info.finite is False
        if diverged and not self._diverged:
            messages.warn(
                f"{info.path} holds NaN or infinities in parameters or optimizer state. Such checkpoints satisfy no "
                "retention rule, and the newest finite one is kept: mgr.restore_latest(finite=True) goes back to it",
            )
        self._diverged = diverged
