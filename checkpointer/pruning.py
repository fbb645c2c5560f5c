"""Carrying out what retention decides."""

from __future__ import annotations

from collections.abc import Callable, Collection
from datetime import datetime, timezone

from checkpointer.repository import Repository
from checkpointer.retention import KeepPolicy, RetentionPlan, plan


def prune(
    repository: Repository,
    policy: KeepPolicy,
    *,
    protect: Collection[str] = (),
    unreturned: Callable[[], Collection[str]] = frozenset,
    dry_run: bool = False,
) -> RetentionPlan:
    """Plan on what is on disk now, and unless ``dry_run`` remove what the plan says, oldest first.

    ``unreturned`` gives the ids of checkpoints that ``on_commit`` has not returned for. It is asked after listing: what
    a save commits meanwhile may be listed, too. Needs the writer's lock unless ``dry_run``. A checkpoint that is pinned
    meanwhile stays.
    """
    listing = repository.list_checkpoints()
    now = datetime.now(timezone.utc)
    decided = plan(listing.checkpoints, policy, now=now, protect=protect, unreturned=unreturned())
    if dry_run:
        return decided
    removed = [(info, reasons) for info, reasons in decided.remove if repository.remove(info)]
    stayed = [(info, ("pinned meanwhile",)) for info, _ in decided.remove if info not in [gone for gone, _ in removed]]
    return RetentionPlan(keep=[*decided.keep, *stayed], remove=removed)
