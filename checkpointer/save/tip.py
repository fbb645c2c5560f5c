"""Where a manager stands in its run: the tip, what it had seen when it restored, and what may be saved next."""

from __future__ import annotations

from datetime import datetime

from checkpointer.errors import RunNotEmptyError, StepOrderError, UnreadableCheckpointError
from checkpointer.format import paths
from checkpointer.format.info import CheckpointInfo
from checkpointer.policy.schedule import RECENT
from checkpointer.repository.repository import Listing, Repository
from checkpointer.repository.strangers import warning_of
from checkpointer.storage import Storage
from checkpointer.system import messages


class Tip:
    """The tip is the last commit or restore of this manager, and so the parent of its next commit."""

    def __init__(self, repository: Repository, *, require_resume: bool) -> None:
        self._repository = repository
        self._require_resume = require_resume
        self._seen: int | None = None
        """Newest sequence when this manager last looked; ``None`` before its first restore or save."""
        self._checked = False
        self._said = False
        self.info: CheckpointInfo | None = None
        self.restored_from: CheckpointInfo | None = None
        """Protected from retention until the first own commit."""
        self._recent: tuple[CheckpointInfo, ...] = ()

    @property
    def recent(self) -> tuple[CheckpointInfo, ...]:
        """The newest commits of the run, as many as the schedule goes by, in commit order."""
        if self._seen is None:
            return tuple(self._repository.list_checkpoints().checkpoints[-RECENT:])
        return self._recent

    @property
    def newest_created(self) -> datetime | None:
        """When the newest commit of the run was captured; ``None`` if there is none."""
        recent = self.recent
        return recent[-1].created if recent else None

    def restored(self, info: CheckpointInfo | None, listing: Listing | None = None) -> None:
        """A restore has ended; ``None``: the run was empty. ``listing``: what it found there, if it has listed all."""
        listing = listing or self._repository.list_checkpoints()
        self._remember(listing)
        self._checked = False
        if info is not None:
            self.info = self.restored_from = info
            self._repository.journal.restored(info, listing.checkpoints[-1] if listing.checkpoints else None)
        self._say_what_is_strange(listing)

    def committed(self, info: CheckpointInfo) -> None:
        """A save of this manager is durable."""
        self.info, self.restored_from = info, None
        self._recent = (*self._recent, info)[-RECENT:]
        self._seen = info.sequence

    def check_first_save(self) -> None:
        """Refuse the first save of somebody who forgot to restore, or whose run was continued by another job.

        Raises:
            RunNotEmptyError: and nothing is saved.
        """
        if self._checked:
            return
        seen, resumed = self._seen, self._seen is not None
        listing = self._repository.list_checkpoints()
        newest = listing.checkpoints[-1] if listing.checkpoints else None
        url = self._repository.url
        if not resumed and not listing.empty and self._require_resume:
            raise RunNotEmptyError(
                f"{url} holds checkpoints (the newest is {newest or 'damaged'}) and this manager restored none: "
                "call mgr.restore_latest() before the loop, choose another root for a new run, "
                "or set require_resume: false to start a new branch here"
            )
        if resumed and newest is not None and newest.sequence != seen:
            raise RunNotEmptyError(
                f"{url} has moved on since this manager restored: its newest is now {newest}, it was sequence {seen}. "
                "Another job has saved to this run; stop it, then restore again"
            )
        if not resumed:
            self._repository.journal.begins_branch("goes on from no checkpoint", newest)
        self._remember(listing)  # not before: what was seen while refusing would let the next call pass
        self._checked = True
        self._say_what_is_strange(listing)

    def check_order(self, step: int, last: int | None) -> None:
        """Refuse a step below ``last``, the step saved or restored last: such a counter would stop saving in silence.

        Raises:
            StepOrderError: and nothing is saved.
        """
        if last is not None and step < last:
            raise StepOrderError(
                f"step {step} is below step {last}, which this manager has saved to, or restored from, "
                f"{self._repository.url}: steps must count up over the whole run, not start again in each epoch. "
                "To go back on purpose, restore the earlier step first"
            )

    def _say_what_is_strange(self, listing: Listing) -> None:
        """Warn, once, of what cannot be restored or counted on: a save may fail for it, hours later."""
        if self._said:
            return
        self._said = True
        storage = self._repository.storage
        try:
            told = [warning_of(storage, listing.strangers, listing.others)]
        except OSError as error:  # looking closer is a courtesy: the run goes on without it
            reason = storage.redact(str(error))
            told = [f"{storage.url} holds names of checkpoints that cannot be looked into: {reason}"]
        told.append(_doubt_about_name(storage, empty=listing.empty))
        told += [
            f"{item.error}. Lists leave it out, and retention neither counts on it nor removes it"
            for item in listing.unreadable
            if isinstance(item.error, UnreadableCheckpointError)
        ]
        if not listing.notes_known:
            told.append(
                f"{storage.place(paths.NOTES)} cannot be listed, so every checkpoint counts as pinned, and retention "
                "removes none: give this user read access to it"
            )
        for text in filter(None, told):
            messages.warn(text)

    def _remember(self, listing: Listing) -> None:
        self._recent = tuple(listing.checkpoints[-RECENT:])
        self._seen = self._recent[-1].sequence if self._recent else 0


def _doubt_about_name(storage: Storage, *, empty: bool) -> str | None:
    """What to say of a run root that holds no run yet, and is called as one checkpoint is; ``None``: nothing."""
    outer, _, name = storage.url.replace("\\", "/").rstrip("/").rpartition("/")
    step = paths.parse_checkpoint_name(name)
    if step is None or not empty:
        return None
    return (
        f"the run root {storage.url} has the name of one checkpoint, and holds none: if checkpoint {step} of a run was "
        f"meant, pass {outer} as the run root, and call mgr.restore({step}); if a new run is to begin here, choose "
        "another name, since tools that rotate checkpoints delete directories of this name"
    )
