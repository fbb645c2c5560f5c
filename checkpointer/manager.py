"""The manager: the two calls of a training loop, and everything around them."""

from __future__ import annotations

import os
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime, timezone
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from checkpointer.config.arguments import (
    Attachments,
    Extras,
    Given,
    check_component_names,
    check_given,
    check_seconds,
    check_step,
    check_tags,
)
from checkpointer.config.metrics import check_metrics
from checkpointer.config.rules import rules_of, saved_keep
from checkpointer.config.settings import Config, Mode, load_config
from checkpointer.distributed.job import Job
from checkpointer.environment import begin_git_lookup, environment
from checkpointer.errors import (
    CheckpointerError,
    CheckpointerWarning,
    CheckpointNotFoundError,
    SaveError,
    UnsupportedStateError,
)
from checkpointer.format.event import Event
from checkpointer.format.info import CheckpointInfo
from checkpointer.policy.monitoring import Mode as MetricMode
from checkpointer.policy.monitoring import listed, nearest_name
from checkpointer.policy.retention import BestRule, KeepPolicy, RetentionPlan, best_rule, rank
from checkpointer.repository.notes import Note
from checkpointer.repository.prune import Pruner
from checkpointer.repository.repository import Listing, Repository
from checkpointer.repository.verify import VerifyReport
from checkpointer.repository.watch import watch
from checkpointer.restore.report import Restored
from checkpointer.restore.request import RestoreRequest, restore_request
from checkpointer.restore.restorer import RNG, Restorer
from checkpointer.save.commit_callbacks import PATIENCE
from checkpointer.save.due import DueSaves
from checkpointer.save.handle import PendingSave, finished
from checkpointer.save.preemption import Preemption
from checkpointer.save.saver import Saver
from checkpointer.save.snapshot import Snapshot
from checkpointer.save.tenure import Tenure
from checkpointer.save.tip import Tip
from checkpointer.save.unsaved_steps import UnsavedSteps
from checkpointer.save.waits import Waits
from checkpointer.save.writer import refuse
from checkpointer.staging.live import stepped
from checkpointer.state import (
    Adapter,
    Captured,
    RngState,
    Unregistered,
    adapter_for,
    capture_all,
    modules_of,
    optimizers_of,
)
from checkpointer.state.modes import outside_inference_mode
from checkpointer.state.protocol import Adapt, MapLocation, Rename
from checkpointer.storage import open_storage
from checkpointer.system import messages
from checkpointer.system.gc import collector_paused

if TYPE_CHECKING:
    from typing_extensions import Self

StepOrInfo: TypeAlias = int | CheckpointInfo


class CheckpointManager:
    """Saves and restores one training run.

    ```python
    mgr = CheckpointManager("runs/gpt", model=model, optimizer=optimizer)
    restored = mgr.restore_latest()
    start = restored.step + 1 if restored else 0
    with mgr:
        for step in range(start, total_steps):
            loss = train_step(step)
            mgr.save(step, metrics={"loss": loss})
    ```

    A writable manager takes the single-writer lock of the run at its first restore or save, and holds it until
    ``close``, or until a newer manager of the same process and thread takes an idle one's place. It belongs to the
    process that made it: forked children cannot use it, and it is neither copied nor pickled. Threads that call it at
    the same time take turns.
    """

    __module__ = "checkpointer"

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        config: str | os.PathLike[str] | Mapping[str, Any] | Config | None = None,
        storage_options: Mapping[str, Any] | None = None,
        read_only: bool = False,
        on_commit: Callable[[CheckpointInfo], object] | None = None,
        **components: object,
    ) -> None:
        """Prepare; nothing is read or written yet.

        Args:
            root: directory or fsspec URL (``s3://bucket/run``) that holds this run's checkpoints.
            config: path of a YAML file, a mapping, a :class:`Config`, or ``None`` for the defaults.
            storage_options: handed to fsspec; their secrets never reach a manifest, a log line or an error message.
            read_only: for evaluators and notebooks: never locks, never writes checkpoints. A root that is not there is
                an error of every call but ``watch``, which waits for it.
            on_commit: called with the :class:`CheckpointInfo` after a commit is durable, on rank 0: on a thread of its
                own, one call at a time, in commit order. It never delays or fails a save: an exception in it is logged,
                with a warning. Its checkpoint stays until it has returned. Of this manager it may use ``pin``,
                ``unpin``, ``annotate``, ``verify``, ``watch``, and what there is (``checkpoints``, ``latest``, …).
            **components: what to save, by name: modules, optimizers, schedulers, any :class:`Stateful`, dicts, lists,
                sets, arrays, generators. The global random generators are added as ``rng``.

        Raises:
            ConfigError: the configuration, the root or a component's name makes no sense; the root is a file, one
                checkpoint, a mistyped URL, or a variable that no shell has replaced.
            UnsupportedStateError: a component whose state cannot be captured or restored in place.
        """
        self._config = load_config(config)
        check_component_names(components, reserved={RNG})
        modules = modules_of(components)
        adapters: dict[str, Adapter] = {name: adapter_for(name, part, modules) for name, part in components.items()}
        adapters[RNG] = RngState()
        self._adapters = adapters
        self._unregistered = Unregistered(components)
        self._read_only = read_only
        self._request = partial(restore_request, configured=self._config.restore.verify, read_only=read_only)
        write = self._config.write
        storage = open_storage(root, storage_options, durable=write.durable, threads=write.threads)
        self._repository = Repository(storage, must_exist=read_only)
        changes = partial(stepped, optimizers_of(components), list(modules.values()))
        self._saver = Saver(self._repository, self._config, on_commit, changes)
        self._job = Job(storage, self._config.write.wait, ",".join(adapters))
        self._restorer = Restorer(self._repository, adapters, self._job)
        self._tip = Tip(self._repository, require_resume=self._config.require_resume)
        self._waits = Waits()
        self._unsaved = UnsavedSteps()
        self._closed = False
        self._warned_of_epoch = False
        self._pid = os.getpid()
        self._preemption = Preemption(self._config.save)
        self._tenure = Tenure(self._repository, self._saver, self._preemption)
        self._due = DueSaves(
            self._config.save,
            [rule.monitor for rule in self._config.keep.best],
            self._tip,
            self._job,
            self._preemption,
        )
        if not read_only:
            self._preemption.install()
            weakref.finalize(self, self._preemption.restore)  # a manager that is dropped catches no signals for ever
            self._saver.prepare(components.values())
            begin_git_lookup()

    # ------------------------------------------------------------------------------------------------ saving

    def save(
        self,
        step: int,
        *,
        epoch: int | None = None,
        metrics: Mapping[str, Any] | None = None,
        tags: Iterable[str] = (),
        files: Attachments | None = None,
        force: bool = False,
        overwrite: bool = False,
    ) -> PendingSave | None:
        """Save the state as it is now, if the save policy says that a save is due; cheap if not.

        Args:
            step: training step just finished; restoring continues at ``step + 1``.
            epoch: recorded, and used by ``every_n_epochs``.
            metrics: numbers that retention and ``restore_best`` can go by, by name; ``None`` is "not reported". A
                tensor or array with one element is a number too. They are checked at every call by type and shape
                alone, and read only where a save is due, so that no other call waits for a GPU. Of several ranks,
                those of rank 0.
            tags: words to find the checkpoint by.
            files: small files to attach, by name: bytes, or a path to read now.
            force: save even if nothing is due (the usual last save after the loop).
            overwrite: replace the checkpoint of this very step atomically.

        Returns:
            ``None`` if nothing was due, if there is no room and ``write: {on_full: skip}`` says to go without, or if it
            would not be durable before the ``deadline`` that follows a signal; else a handle that is done at the
            durable commit. After a signal that is before this returns, in every mode; where only a save that was in
            flight could be finished before the deadline, the handle is that one's.

        Raises:
            ConfigError: an argument makes no sense, due or not; nothing was saved.
            RunLockedError: another job writes to this run.
            RunNotEmptyError: the run holds checkpoints that were not restored (see ``require_resume``).
            StepOrderError: ``step`` is below the tip.
            UnsupportedStateError: a component holds a value that cannot be stored; nothing was written.
            SaveError: this save failed, or (after this one was performed) an earlier one in the background.
        """
        step = check_step(step)
        epoch = None if epoch is None else check_step(epoch, "epoch")
        given = check_given(metrics, tags, files)
        with self._turn():
            if given.fault is not None and self._job.ranks.size == 1:
                raise given.fault
            with self._saver.keeping_warnings():
                handle, begun = self._save(step, epoch, given, force=force, overwrite=overwrite)
            self._saver.raise_errors(begun=begun)
            if given.fault is not None:  # no save was begun that would have told the other ranks
                raise given.fault
        return handle

    def _save(
        self,
        step: int,
        epoch: int | None,
        given: Given,
        *,
        force: bool,
        overwrite: bool,
    ) -> tuple[PendingSave | None, bool]:
        """Also returns whether the handle is that of a save which has been begun here."""
        self._open_for_saving()
        self._check_epoch_given(epoch)
        self._due.call(step, given.metrics)
        begin = partial(self._begin_save, step, epoch, given, scheduled=not (force or overwrite))
        last = self._last_of_all(step)
        self._tip.check_order(step, last.step if last else None)
        preempted = self._due.stop_agreed(step, epoch, last)
        if preempted:
            self._preemption.record(self._repository.journal, step)
        if last is not None and step == last.step and not overwrite:
            handle = last if force or preempted else None
            self._due.say_what_is_lost(step, last)
            self._unsaved.none()
        elif preempted:
            handle = self._save_in_time(begin)
        elif force or overwrite or self._due.is_due(step, epoch, last):
            left_out = self._saver.still_full() and not (force or overwrite)
            handle = None if left_out else begin(mode=self._config.write.mode)
        else:
            handle = None
            self._due.say_what_is_lost(step, last)
            self._unsaved.not_due(step, last)
            self._saver.nothing_due()
        if preempted and handle is not None:
            handle = self._made_durable(handle)
            self._preemption.saved = handle is not None
        begun = handle is not None and handle is not last
        if handle is not None:
            self._unsaved.none()
        if begun and not force:  # the forced one after a loop is seldom given metrics
            self._due.begun(step)
        return handle, begun

    def should_save(self, step: int, *, epoch: int | None = None) -> bool:
        """Whether ``save`` would find a save due at this step. Does nothing, and knows no metrics (``on_metric``)."""
        self._check_usable()
        step = check_step(step)
        epoch = None if epoch is None else check_step(epoch, "epoch")
        with self._turn():
            self._due.call(step)
            due = self._due.is_due(step, epoch, self._last())
            if not due:
                self._saver.nothing_due()
        return due

    def wait(self) -> None:
        """Wait until every save begun is durable, and raise the error of one that failed, once.

        Not for ``on_commit`` to return: ``close`` does that.
        """
        self._check_usable()
        self._saver.settle()
        with self._turn():
            self._saver.raise_errors()

    def staged(self) -> None:
        """Wait until the save in flight needs live memory no more: then parameters may be changed by hand.

        Only ``lazy`` mode reads live memory after ``save`` has returned, and only until the next ``Optimizer.step``.
        """
        self._check_usable()
        with self._turn():
            self._saver.staged()

    def stop_requested(self) -> bool:
        """Whether one of the ``on_signal`` signals has come, to this rank or, as far as it knows, to another."""
        return self._preemption.requested or self._job.stop

    def should_stop(self) -> bool:
        """Whether a signal has come and a save begun after it is durable: leave the loop.

        With a ``deadline`` also where a save that was in flight is durable, and a new one would not be in time.
        """
        return self.stop_requested() and self._preemption.saved

    # ---------------------------------------------------------------------------------------------- restoring

    def restore_latest(
        self,
        *,
        finite: bool = False,
        strict: bool = True,
        components: Iterable[str] | None = None,
        ignore_keys: Iterable[str] = (),
        rename: Rename | None = None,
        adapt: Adapt | None = None,
        map_location: MapLocation = None,
        verify: str | None = None,
    ) -> Restored | None:
        """Restore the newest checkpoint that is whole; ``None`` if the run has none (``read_only``: but is there).

        Damaged ones are skipped with a warning and listed in ``Restored.skipped``.

        Args:
            finite: pass over checkpoints whose parameters or optimizer state hold NaN or infinities: back to before
                the run diverged.
            strict, components, ignore_keys, rename, adapt, map_location, verify: as for ``restore``.

        Raises:
            CheckpointNotFoundError: ``finite``, and every checkpoint holds some.
            CorruptCheckpointError: there are checkpoints, and all are damaged.
            UnreadableCheckpointError: the system does not let one be read, so what is newest cannot be known.
            IncompatibleStateError: the newest does not fit the live objects, which stay as they are.
            RunLockedError: another job writes to this run.
        """
        request = self._request(
            strict=strict,
            components=components,
            ignore_keys=ignore_keys,
            rename=rename,
            adapt=adapt,
            map_location=map_location,
            verify=verify,
        )
        with self._turn():
            self._open_for_restoring()
            restored = self._restorer.latest(request, finite=finite)
            self._note_restored(restored.checkpoint if restored else None, self._restorer.listing)
        return restored

    def restore(
        self,
        step: int,
        *,
        strict: bool = True,
        components: Iterable[str] | None = None,
        ignore_keys: Iterable[str] = (),
        rename: Rename | None = None,
        adapt: Adapt | None = None,
        map_location: MapLocation = None,
        verify: str | None = None,
    ) -> Restored:
        """Restore the checkpoint of ``step``.

        Args:
            step: a step that was saved.
            strict: whatever the checkpoint has too much or too little is an error; else it is reported.
            components: names of those to restore, ``rng`` among them only if it is named; ``None``: all.
            ignore_keys: globs over keys, or over ``component.key``: what matches stays as it is. So do settings:
                ``optimizer.param_groups.*.lr``, ``scheduler.total_steps``.
            rename: saved key to live key, a mapping or a function; a mapping also renames the class of an optimizer or
                scheduler.
            adapt: ``(key, saved_tensor, target_tensor) -> tensor``, for shapes that do not fit.
            map_location: device of tensors that are made anew.
            verify: ``stream``, ``before`` or ``off`` in place of the configured one.

        Raises:
            CheckpointNotFoundError: there is none of this step.
            CorruptCheckpointError: it is damaged.
            IncompatibleStateError: it does not fit the live objects, which stay as they are.
        """
        request = self._request(
            strict=strict,
            components=components,
            ignore_keys=ignore_keys,
            rename=rename,
            adapt=adapt,
            map_location=map_location,
            verify=verify,
        )
        with self._turn():
            self._open_for_restoring()
            return self._restore_one(self._repository.find(check_step(step)), request)

    def restore_best(
        self,
        monitor: str | None = None,
        *,
        mode: MetricMode | None = None,
        strict: bool = True,
        components: Iterable[str] | None = None,
        ignore_keys: Iterable[str] = (),
        rename: Rename | None = None,
        adapt: Adapt | None = None,
        map_location: MapLocation = None,
        verify: str | None = None,
    ) -> Restored:
        """Restore the best checkpoint by ``monitor``, or by the first configured metric.

        ``monitor`` and ``mode`` as for ``best``, the other options as for ``restore``.

        Raises:
            CheckpointNotFoundError: no checkpoint has reported the metric.
            ConfigError: nothing says whether lower or higher is better.
        """
        request = self._request(
            strict=strict,
            components=components,
            ignore_keys=ignore_keys,
            rename=rename,
            adapt=adapt,
            map_location=map_location,
            verify=verify,
        )
        with self._turn():
            self._open_for_restoring()
            rule = best_rule(self._config.keep.best, monitor, mode, lambda: self._saved_keep().best)
            info = self._best(rule)
            if info is None:
                raise CheckpointNotFoundError(f"no checkpoint in {self._repository.url} has a finite {rule.monitor}")
            return self._restore_one(info, request)

    # ------------------------------------------------------------------------------------------- what there is

    def checkpoints(self) -> list[CheckpointInfo]:
        """Committed checkpoints, in commit order."""
        return list(self._repository.list_checkpoints().checkpoints)

    def latest(self) -> CheckpointInfo | None:
        """The checkpoint committed last."""
        return next(reversed(self.checkpoints()), None)

    def best(self, monitor: str | None = None, *, mode: MetricMode | None = None) -> CheckpointInfo | None:
        """The best checkpoint by ``monitor``, or by the first metric under ``keep: best``.

        Without such rules in the configuration, those count that the newest checkpoint was saved with.

        NaN never wins; ties go to the later commit. Warns if the metric was never reported.

        Args:
            monitor: name of a metric.
            mode: ``"min"`` where lower is better, ``"max"`` where higher is. Default: the configured one, else that of
                the rules that the newest checkpoint was saved with, else what the name says (``val_loss``,
                ``eval/accuracy``).

        Raises:
            ConfigError: nothing says whether lower or higher is better.
        """
        return self._best(best_rule(self._config.keep.best, monitor, mode, lambda: self._saved_keep().best))

    def history(self) -> list[Event]:
        """What has happened to the run, in order: commits with their cost, removals with their reasons, restores,
        branches, damage, quarantine, signals.

        Read from a journal of bounded length, which the run's writers keep in passing: the oldest events go, and those
        of the last moments before a crash may be missing. Pins and annotations are not in it. Warns of records that
        cannot be read. Needs no lock.
        """
        return self._repository.history()

    def watch(
        self,
        *,
        since: CheckpointInfo | None = None,
        poll: float = 10.0,
        timeout: float | None = None,
        stop: Callable[[], object] | None = None,
    ) -> Iterator[CheckpointInfo]:
        """Each checkpoint once, in commit order, as they are committed: for evaluators beside the training job.

        ```python
        with CheckpointManager("runs/gpt", read_only=True, model=model) as mgr:
            for info in mgr.watch(timeout=3600):
                try:
                    mgr.restore(info.step, components=["model"])
                except CheckpointNotFoundError:
                    continue                                   # retention was faster
                mgr.annotate(info, metrics={"accuracy": evaluate(model)})
        ```

        What retention has removed before its turn, and what is known to be damaged, is passed over. A checkpoint that
        was replaced under its own name counts as a new one, and may be noticed some looks later than others. Once the
        first look has succeeded, one that fails is logged, and the next one tries again.

        Args:
            since: begin after this checkpoint; ``mgr.latest()`` leaves out all that are there. Default: begin with
                them.
            poll: seconds between looks. A look is one listing where nothing is new.
            timeout: end after so many seconds without a new checkpoint; 0: after the first look.
            stop: asked often; end when it says something true (``threading.Event().is_set``). A signal handler may be
                what makes it so. ``close`` ends every watch, too.
        """
        self._check_usable(on_commit_may=True)
        poll = check_seconds(poll, "poll", least=0.01)
        timeout = None if timeout is None else check_seconds(timeout, "timeout", least=0)
        return watch(
            self._repository,
            since=since,
            poll=poll,
            timeout=timeout,
            stopped=lambda: self._closed or (stop is not None and stop()),
        )

    def pin(self, x: StepOrInfo) -> None:
        """Protect a checkpoint from retention until ``unpin``. From any process, without the writer's lock."""
        self._note(x, Note(pinned=True))

    def unpin(self, x: StepOrInfo) -> None:
        """Take a pin back."""
        self._note(x, Note(pinned=False))

    def annotate(
        self,
        x: StepOrInfo,
        *,
        metrics: Mapping[str, Any] | None = None,
        tags: Iterable[str] | None = None,
        note: str | None = None,
    ) -> None:
        """Add metrics, tags or a note to a checkpoint, for example the score of an evaluation that ended later."""
        self._note(x, Note(metrics=check_metrics(metrics), tags=check_tags(tags), text=note))

    def verify(self, step: int | None = None) -> VerifyReport:
        """Read every byte of one checkpoint, or of all, and check every hash.

        Damage is noted beside the checkpoint where this user may write, so that retention, in any process, does not
        count on it; a check that passes takes that back.
        """
        if step is None:
            return self._repository.verify_all()
        return VerifyReport((self._repository.verify(self._repository.find(check_step(step))),))

    def prune(self, *, dry_run: bool = False) -> RetentionPlan:
        """Apply retention now; ``dry_run`` only says what it would do, and why. Every rank calls it; one removes.

        A ``read_only`` manager without ``keep`` rules goes by those that the newest checkpoint was saved with.
        """
        self._check_usable(on_commit_may=dry_run)
        restored_from = self._tip.restored_from
        protect = {restored_from.id} if restored_from else set()
        rules_are_saved = dry_run and self._read_only and self._config.keep.is_empty
        pruner = Pruner(self._repository, self._saved_keep()) if rules_are_saved else self._saver.pruner
        plan = partial(pruner.prune, protect=protect, unreturned=self._saver.unreturned)
        if dry_run:
            return plan(dry_run=True)
        with self._turn():
            self._check_usable()  # another thread may have closed it meanwhile
            self._check_writable()
            self._saver.wait()
            self._lock()
            with self._saver.keeping_warnings():  # raised by the next save, wait or close
                return self._job.once(f"pruning {self._repository.url}", act=plan, look=partial(plan, dry_run=True))

    # ---------------------------------------------------------------------------------------------- life cycle

    def close(self) -> None:
        """Wait for pending saves and for pruning, free the lock, the memory and the signal handlers.

        ``on_commit`` is waited for as well: for 60 s, or after a signal for what is left of ``save: {deadline}``; then
        a warning names the checkpoints that it has not returned for. Raises the error of a background save that
        nobody has asked for. Closing twice does nothing.

        After a loop without error a warning says which steps at its end no save was due for:
        ``mgr.save(step, force=True)`` after the loop saves them.
        """
        self._check_not_in_on_commit()
        if self._pid != os.getpid():
            return
        with self._tenure:
            if self._closed:
                return
            self._closed = True
            if self._preemption.requested:
                self._preemption.record(self._repository.journal)
            try:
                self._saver.close(partial(self._preemption.time_left, PATIENCE))
                self._repository.keep_known(least=1)
            finally:
                self._preemption.restore()
                self._tenure.close()
                self._repository.release()
            ended_well = sys.exc_info()[0] is None and not self.stop_requested()
            if self._unsaved and ended_well and self._job.ranks.rank == 0:
                self._unsaved.say(self._repository.url)
            self._saver.raise_errors()

    def __enter__(self) -> Self:
        self._check_usable()
        self._tenure.blocks += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._tenure.blocks -= 1
        if error is None:
            self.close()
            return
        self._unsaved.none()  # what is lost is lost by that error, which says so itself
        try:
            self.close()
        except (CheckpointerError, CheckpointerWarning) as failure:  # the loop's own goes on, and carries this one
            _chain(error, failure)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise UnsupportedStateError(
            "a CheckpointManager cannot be copied or pickled, for it holds the lock of its run, threads and live "
            f"objects: where it is needed (in a process of multiprocessing, too), make one of {self._repository.url}, "
            "with read_only=True if it only reads, and keep it out of what is copied or sent"
        )

    def __repr__(self) -> str:
        return f"<CheckpointManager {self._repository.url} components={', '.join(self._adapters)}>"

    # ------------------------------------------------------------------------------------------------ private

    def _save_in_time(self, begin: Callable[..., PendingSave | None]) -> PendingSave | None:
        """After a signal: the save of ``begin``, in the mode that is durable first, unless it would be too late.

        Then the save that was in flight when the signal came; ``None`` if there was none.
        """
        self._saver.settle()
        last = self._last()
        recent = self._tip.recent
        allowed = self._preemption.allows(recent)
        counts = self._preemption.counts(self._saver.committed_at)
        allowed, counts = self._job.agreed(allowed, counts)
        if allowed:
            return begin(mode="sync")  # nothing is copied before it is written
        self._preemption.says_why(recent, self._tip.info, counts=counts)
        return last if counts else None

    def _begin_save(
        self, step: int, epoch: int | None, given: Given, *, scheduled: bool, mode: Mode
    ) -> PendingSave | None:
        """Capture and stage everything, then hand it to the writer."""
        began = time.perf_counter()
        self._saver.settle()
        settled = time.perf_counter()
        in_background = scheduled and mode != "sync"
        self._waits.begins(began, settled, scheduled=in_background, says=self._job.ranks.rank == 0)
        created = datetime.now(timezone.utc)
        self._last()
        extras: list[Extras] = []

        def capture() -> dict[str, Captured]:
            # The coordinator's files alone are saved: those of other hosts need not be there.
            extras.append(given.read(attachments=self._job.ranks.rank == 0))
            captured = capture_all(self._adapters)
            self._unregistered.warn(captured)
            return captured

        with collector_paused(), outside_inference_mode():
            rank_plan = self._job.save_planner.plan(step, capture)
            try:
                staged = self._saver.stage(rank_plan, mode, step)
            except BaseException as error:
                refuse(rank_plan, f"the save of step {step}", error)
                raise
        snapshot = Snapshot(
            step=step,
            epoch=epoch,
            created=created,
            staged=staged,
            **extras[0]._asdict(),
            parent=self._tip.info.id if self._tip.info else None,
            environment=environment(),
            rules=rules_of(self._config),
            mode=mode,
            rank_plan=rank_plan,
            wait_seconds=settled - began,
            stall_seconds=time.perf_counter() - settled,
        )
        handle = self._saver.submit(snapshot)
        if handle is not None and mode == "sync":
            handle.result()
        return handle

    def _made_durable(self, handle: PendingSave) -> PendingSave | None:
        """Wait for the commit; ``None`` if the save was left out for want of space."""
        handle.error()
        if handle.left_out:
            return None
        handle.result()
        return handle

    def _last_of_all(self, step: int) -> PendingSave | None:
        """As ``_last``, and the same on every rank where it decides something: what is in flight here may have failed
        on a rank that has noticed already.
        """
        last = self._last()
        if last is not None and self._job.ranks.size > 1 and step == last.step and not last.done():
            self._saver.settle()
            last = self._last()
        return last

    def _last(self) -> PendingSave | None:
        """The save in flight, else the tip. Moves the tip to the last save once it is committed."""
        writing = self._saver.in_flight
        if writing is not None:
            return writing
        committed = self._saver.take_commit()
        if committed is not None:
            self._tip.committed(committed)
        return finished(self._tip.info) if self._tip.info else None

    def _restore_one(self, info: CheckpointInfo, request: RestoreRequest) -> Restored:
        restored = self._restorer.one(info, request)
        self._note_restored(restored.checkpoint)
        return restored

    def _note_restored(self, info: CheckpointInfo | None, listing: Listing | None = None) -> None:
        self._tip.restored(info, listing)
        self._saver.reuse_from(self._restorer.source if info else None)

    def _open_for_saving(self) -> None:
        self._check_usable()
        self._check_writable()
        self._lock()
        self._tip.check_first_save()

    def _open_for_restoring(self) -> None:
        self._check_usable()
        if not self._read_only:
            self._saver.settle()
            self._last()
            self._lock()

    def _lock(self) -> None:
        """Become the run's only writer, and clear away what a dead one left half done."""
        self._tenure.check()
        self._job.open(self._take_lock)
        with self._saver.keeping_warnings():  # it has happened: raised by the next save, wait or close
            self._tenure.opened()

    def _turn(self) -> Tenure:
        """For one call: threads wait for each other, but none for the one that is waited for, nor for a parent's."""
        self._check_owner()
        self._check_not_in_on_commit()
        return self._tenure

    def _take_lock(self) -> None:
        if self._repository.lock.held:
            return
        self._tenure.take_lock()
        self._repository.recover()

    def _check_epoch_given(self, epoch: int | None) -> None:
        """Warn, once, that an epoch rule never fires when ``save`` is not told the epoch."""
        if epoch is None and self._config.save.every_n_epochs is not None and not self._warned_of_epoch:
            self._warned_of_epoch = True
            messages.warn(
                "save: every_n_epochs has no effect unless save() is told the epoch: mgr.save(step, epoch=epoch)",
            )

    def _check_usable(self, *, on_commit_may: bool = False) -> None:
        """``on_commit_may``: it is no matter of the training thread, and works until ``on_commit`` has returned."""
        self._check_owner()
        if on_commit_may and self._saver.called_from_on_commit:
            return
        self._check_not_in_on_commit()
        if self._closed:
            raise SaveError(f"this CheckpointManager of {self._repository.url} is closed")

    def _check_owner(self) -> None:
        if self._pid != os.getpid():
            raise SaveError(
                f"this CheckpointManager belongs to process {self._pid}, not to its forked child {os.getpid()}: "
                "make one of its own here, with read_only=True if it only reads"
            )

    def _check_not_in_on_commit(self) -> None:
        if self._saver.called_from_on_commit:
            raise SaveError(
                f"on_commit has called a method of its CheckpointManager of {self._repository.url} that belongs to the "
                "training thread. It may call pin, unpin, annotate, verify, watch, checkpoints, latest, best and "
                "prune(dry_run=True)"
            )

    def _check_writable(self) -> None:
        if self._read_only:
            raise SaveError(f"this CheckpointManager of {self._repository.url} was made with read_only=True")

    def _note(self, x: StepOrInfo, note: Note) -> None:
        """Append a note, then make sure that its checkpoint is still there."""
        self._check_usable(on_commit_may=True)
        writing = self._saver.in_flight
        if writing is not None and writing.step == x:
            writing.error()  # it becomes visible with its commit
        info = x if isinstance(x, CheckpointInfo) else self._repository.find(check_step(x))
        self._repository.manifest(info)
        self._repository.note(info, note)
        self._repository.manifest(info)

    def _saved_keep(self) -> KeepPolicy:
        """The rules that the newest checkpoint was saved with; none where it holds none, or none that can be used."""
        manifest = self._repository.newest_manifest()
        saved = None if manifest is None else saved_keep(manifest.rules, f"the checkpoint of step {manifest.step}")
        if saved is not None and saved.problem is not None:
            messages.warn(f"{saved.problem}. They are ignored; for rules, give this manager a configuration")
        return (saved and saved.keep) or KeepPolicy()

    def _best(self, rule: BestRule) -> CheckpointInfo | None:
        checkpoints = self.checkpoints()
        ranked = rank(checkpoints, rule)
        if not ranked and checkpoints:
            known = {name for info in checkpoints for name in info.metrics}
            nearest = nearest_name(rule.monitor, known - {rule.monitor})
            messages.warn(
                f"no checkpoint in {self._repository.url} has a finite metric {rule.monitor!r}; "
                f"reported were {listed(known)}{f'; did you mean {nearest}?' if nearest else ''}",
            )
        return ranked[0] if ranked else None


def _chain(error: BaseException, failure: CheckpointerError | CheckpointerWarning) -> None:
    """Append ``failure`` to the chain of errors that led to ``error``, so that the traceback shows both."""
    last = error
    while last.__context__ is not None and last.__context__ is not failure:
        last = last.__context__
    last.__context__ = failure
