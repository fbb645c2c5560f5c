"""Carrying out what retention decides."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial

from checkpointer.errors import CheckpointerError, CheckpointNotFoundError
from checkpointer.format.info import CheckpointInfo
from checkpointer.policy.retention import KeepPolicy, RetentionPlan, doubts, plan
from checkpointer.repository.copies import on_disk
from checkpointer.repository.repository import Repository
from checkpointer.system import messages

logger = logging.getLogger("checkpointer")

OUTAGE = 3
"""Removals that fail in a row, and not for want of a permission: then the storage is not there, and each further one
could take minutes."""

_MOST_NAMED = 5


@dataclass
class _Outcome:
    """What became of the checkpoints that were to go."""

    removed: set[str] = field(default_factory=set)
    """Their ids."""
    stayed: dict[str, str] = field(default_factory=dict)
    """Why the others are still there, by id."""
    stuck: dict[str, str] = field(default_factory=dict)
    """Of these the ones that it was not possible to remove."""
    complaints: list[tuple[str, str]] = field(default_factory=list)
    """The id, and what could not be removed and why: of these, and of those whose files are left in ``trash``."""


class Pruner:
    """Applies retention, again and again. What it warns of it says once, and again only when that changes."""

    def __init__(self, repository: Repository, policy: KeepPolicy) -> None:
        self._repository = repository
        self._policy = policy
        self._stuck: dict[str, str] = {}
        """Why the last attempt to remove these failed, by id."""
        self._said: set[tuple[str, str]] = set()
        self._silent_since: dict[str, int] = {}
        """By monitor, the sequence of the last commit seen to report it, or of the first seen at all: what reported
        it may be removed by the next time."""

    def prune(
        self,
        *,
        protect: Collection[str] = (),
        unreturned: Callable[[], Collection[str]] = frozenset,
        dry_run: bool = False,
    ) -> RetentionPlan:
        """Plan on what is on disk now, and unless ``dry_run`` remove what the plan says, oldest first.

        ``unreturned`` gives the ids of checkpoints that ``on_commit`` has not returned for. It is asked after listing:
        what a save commits meanwhile may be listed, too. Needs the writer's lock unless ``dry_run``. A checkpoint that
        is pinned meanwhile stays. What a restore or ``verify`` of this process could not read counts for nothing, and
        stays, as does one that cannot be removed, with a warning: the others go, and the next call
        tries it again.
        """
        repository = self._repository
        listed = on_disk(repository.storage, repository.list_checkpoints().checkpoints, repository.shared_files)
        refused = {info.id: self._repository.refused[info.id] for info in listed if info.id in self._repository.refused}
        checkpoints = [info for info in listed if info.id not in refused]
        now = datetime.now(timezone.utc)
        decide = partial(plan, checkpoints, self._policy, now=now, protect=protect, unreturned=unreturned())
        decided = decide(stuck=self._stuck)
        kept_unread = {id: (f"cannot be read, so neither counted nor removed: {why}",) for id, why in refused.items()}
        if dry_run:
            known = {info.id: reasons for info, reasons in decided.keep} | kept_unread
            return replace(decided, keep=[(info, known[info.id]) for info in listed if info.id in known])
        leaving = {info.id: reasons for info, reasons in decided.remove}
        leaving |= {info.id: reasons for info, reasons in decide().remove if info.id in self._stuck}
        self._note_reports(checkpoints)
        self._say_doubts(checkpoints, removing=bool(leaving))
        self._repository.retry_removals()
        outcome = self._remove([(info, leaving[info.id]) for info in checkpoints if info.id in leaving])
        self._stuck = outcome.stuck
        self._say_stuck(outcome.complaints)
        staying = {info.id: reasons for info, reasons in decided.keep}
        staying |= {id: (reason,) for id, reason in outcome.stayed.items()} | kept_unread
        return RetentionPlan(
            keep=[(info, staying[info.id]) for info in listed if info.id not in outcome.removed],
            remove=[(info, leaving[info.id]) for info in checkpoints if info.id in outcome.removed],
        )

    def _remove(self, decisions: Sequence[tuple[CheckpointInfo, Sequence[str]]]) -> _Outcome:
        outcome = _Outcome()
        in_a_row = 0
        for info, reasons in decisions:
            if in_a_row == OUTAGE:
                outcome.stayed[info.id] = "not tried: the storage refuses all removals"
                continue
            try:
                if self._repository.remove(info):
                    outcome.removed.add(info.id)
                else:
                    outcome.stayed[info.id] = "pinned meanwhile"
                in_a_row = 0
            except (OSError, CheckpointerError) as error:
                self._note_failure(info, error, outcome)
                in_a_row = 0 if isinstance(error, PermissionError) else in_a_row + 1
            if info.id in outcome.removed:
                self._repository.journal.add("removal", info, reason="; ".join(reasons))
        return outcome

    def _note_failure(self, info: CheckpointInfo, error: Exception, outcome: _Outcome) -> None:
        """Find out whether what could not be removed is still a checkpoint, or only leftovers."""
        reason = self._repository.why_stuck(info, error)
        gone = False
        try:
            self._repository.manifest(info)
        except CheckpointNotFoundError:
            gone = True
        except (OSError, CheckpointerError) as failure:
            logger.debug("whether %s is still there does not show: %s", info.path, failure)
        if gone:
            outcome.removed.add(info.id)
            outcome.complaints.append((info.id, f"what is left of {info.path}: {reason}"))
        else:
            outcome.stuck[info.id] = reason
            outcome.stayed[info.id] = f"cannot be removed: {reason}"
            outcome.complaints.append((info.id, f"{info.path}: {reason}"))

    def _say_stuck(self, complaints: Sequence[tuple[str, str]]) -> None:
        new = [text for id, text in complaints if (id, text) not in self._said]
        self._said.update(complaints)
        if not new:
            return
        more = f"; and {len(new) - _MOST_NAMED} more" if len(new) > _MOST_NAMED else ""
        messages.warn(
            f"could not prune all that retention lets go. Not removed: {'; '.join(new[:_MOST_NAMED])}{more}. The "
            f"others go, and this is tried again each time; 'checkpointer doctor {self._repository.url}' says more",
        )

    def _note_reports(self, checkpoints: Sequence[CheckpointInfo]) -> None:
        newest = max((info.sequence for info in checkpoints), default=0)
        for rule in self._policy.best:
            reported = [info.sequence for info in checkpoints if rule.monitor in info.metrics]
            known = self._silent_since.get(rule.monitor, newest - 1)
            self._silent_since[rule.monitor] = max(known, *reported, 0)

    def _say_doubts(self, checkpoints: Sequence[CheckpointInfo], *, removing: bool) -> None:
        """Before the first removal, or where one is withheld for want of a metric."""
        if not self._policy.best or not (removing or len(checkpoints) > 1):
            return
        for doubt in doubts(checkpoints, self._policy, silent_since=self._silent_since):
            if (doubt.monitor, doubt.kind) in self._said or not (removing or doubt.withholds):
                continue
            self._said.add((doubt.monitor, doubt.kind))
            messages.warn(doubt.message)


def prune(
    repository: Repository,
    policy: KeepPolicy,
    *,
    protect: Collection[str] = (),
    unreturned: Callable[[], Collection[str]] = frozenset,
    dry_run: bool = False,
) -> RetentionPlan:
    """Apply retention once; see :meth:`Pruner.prune`."""
    return Pruner(repository, policy).prune(protect=protect, unreturned=unreturned, dry_run=dry_run)
