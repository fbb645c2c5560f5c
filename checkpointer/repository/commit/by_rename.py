"""Commit by rename: file systems with an atomic directory rename and a lock that proves its owner alive.

Everything is written under ``.checkpointer/tmp/<id>``, made durable, and renamed. Removal is a rename to
``.checkpointer/trash/<id>`` followed by the deletion there. So a name in the root is always a whole checkpoint, and a
directory that cannot be moved is one up to the moment that its manifest is gone.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from checkpointer.errors import SaveError, UnreadableCheckpointError
from checkpointer.format import paths
from checkpointer.format.manifest import Manifest
from checkpointer.repository.commit.base import (
    FINISHED,
    REPLACED,
    STALE_AFTER,
    Attempt,
    clear,
    delete_everything,
    existing_at,
    for_each,
    is_pinned,
    leftovers,
    new_id,
    obstacle_of,
    own_manifest,
    remove_empty_directories,
)
from checkpointer.repository.commit.removal import (
    is_unfinished_record,
    log_open,
    record_path,
    recover_in_place,
    remove_in_place,
)
from checkpointer.repository.contents import Removable, removable, remove_listed
from checkpointer.repository.journal import Journal
from checkpointer.repository.lock import WriterLock
from checkpointer.repository.notes import remove_notes
from checkpointer.storage import Entry, Storage
from checkpointer.system import messages

logger = logging.getLogger("checkpointer")

ROOT = ""

_T = TypeVar("_T")

_IMMOVABLE = (errno.EXDEV, errno.EBUSY, errno.EPERM, errno.EACCES)
"""Of a rename: this very directory cannot be moved. It lies in a lower layer of overlayfs, is a mount or a subvolume,
is immutable, or belongs to somebody else in a sticky directory."""


class RenameCommit:
    """The protocol for :class:`~checkpointer.storage.LocalStorage`."""

    def __init__(self, storage: Storage, lock: WriterLock, journal: Journal) -> None:
        self._storage = storage
        self._lock = lock
        self._journal = journal
        self.waiting: set[str] = set()

    def begin(self, step: int) -> Attempt:
        attempt = self.join(step, new_id())
        self._storage.make_directory(attempt.directory)
        return attempt

    def join(self, step: int, id: str) -> Attempt:
        return Attempt(self._storage, step, id, f"{paths.TMP}/{id}", data=None)

    def commit(self, attempt: Attempt, manifest: Manifest) -> str:
        data = manifest.to_bytes()
        self._storage.write(f"{attempt.directory}/{paths.MANIFEST}", [data], len(data))
        self._storage.sync(*_directories_bottom_up(attempt))
        self._lock.check()
        name = paths.checkpoint_name(attempt.step)
        there = existing_at(self._storage, name)
        if there is None:
            return self._publish(attempt, name)
        if there.keep:
            return self._publish(attempt, paths.checkpoint_name(attempt.step, attempt.id))
        if there.damaged:
            return self._publish_beside_damage(attempt, name)
        if there.manifest is None:
            raise self._in_the_way(name)
        return self._replace(attempt, name, there.manifest)

    def _in_the_way(self, name: str) -> SaveError:
        """What to say of a name that is taken by something that is no checkpoint, and that is nobody's to move."""
        there = next((entry for entry in self._storage.list_directory(ROOT) if entry.name == name), None)
        link = there.link if there else None
        why = f"it has no {paths.MANIFEST}" if link is None else f"it is a link to {link}, and links are not followed"
        left = leftovers(self._storage, name)
        worthless = there is not None and there.is_dir and not (left.open or left.foreign)
        cure = f"'checkpointer doctor {self._storage.url} --fix' removes it" if worthless else "move it away"
        cure += ", then save again"
        if link is not None:
            cure = (
                f"move the directory {link} itself back to this name if it is a checkpoint of this run, or else {cure}"
            )
        return SaveError(
            f"{self._storage.place(name)} exists but is not a checkpoint ({why}); nothing in it was touched: {cure}"
        )

    def abandon(self, attempt: Attempt) -> None:
        there = own_manifest(self._storage, attempt.directory)
        if there is None or there.id == attempt.id:  # else the commit failed after an exchange: it is the old one
            delete_everything(self._storage, attempt.directory)

    def remove(self, name: str, manifest: Manifest) -> bool:
        try:
            self._to_trash(name, manifest)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            return self._in_place(manifest.id, lambda: remove_in_place(self._storage, name, manifest))
        return self._dispose(f"{paths.TRASH}/{manifest.id}")

    def finish_removal(self, id: str) -> None:
        record, directory = record_path(id), f"{paths.TRASH}/{id}"
        if self._storage.exists(record):
            recover_in_place(self._storage, record)
        if self._storage.exists(directory):
            self._dispose(directory)
        if not any(map(self._storage.exists, (record, directory))):
            self.waiting.discard(id)

    def _in_place(self, id: str, work: Callable[[], _T]) -> _T:
        """A removal where it lies; its record is left where a file is still open."""
        result = work()
        if self._storage.exists(record_path(id)):
            self.waiting.add(id)
        return result

    def recover(self) -> None:
        self._settle()
        parts = ((paths.TMP, self._recover_in_tmp), (paths.TRASH, self._recover_in_trash))
        steps: list[Callable[[], None]] = [partial(self._recover_in, *part) for part in parts]
        for_each([*steps, self._recover_names], lambda step: step())

    def _recover_in(self, folder: str, work: Callable[[Entry], None]) -> None:
        for_each(self._storage.list_directory(folder), work)

    def _recover_in_tmp(self, entry: Entry) -> None:
        path = f"{paths.TMP}/{entry.name}"
        if _is_ours(entry) and self._is_abandoned(path):
            self._dispose(path)

    def _recover_in_trash(self, entry: Entry) -> None:
        path = f"{paths.TRASH}/{entry.name}"
        if _is_ours(entry):
            manifest = own_manifest(self._storage, path)
            if self._dispose(path) and manifest is not None:
                self._journal.add("removal", manifest.info(path), reason=FINISHED)
        elif entry.is_file and path == record_path(entry.name.removesuffix(".json")):
            self._in_place(entry.name.removesuffix(".json"), lambda: recover_in_place(self._storage, path))
        elif entry.is_file and is_unfinished_record(entry.name):
            self._storage.remove(path)

    def _recover_names(self) -> None:
        names = [entry.name for entry in self._storage.list_directory(ROOT) if entry.is_dir]
        for_each(filter(paths.is_second_name, names), self._take_free_name)

    def quarantine(self, directory: str) -> str:
        """Move something that is in the way, or not ours, to where nothing is ever deleted."""
        self._storage.make_directory(paths.QUARANTINE)
        place = f"{paths.QUARANTINE}/{directory.rpartition('/')[2]}-{new_id()[:8]}"
        self._move(directory, place)
        self._journal.add("quarantine", step=paths.parse_checkpoint_name(directory), reason=f"moved to {place}")
        messages.warn(
            f"moved {self._storage.place(directory)} to {self._storage.place(place)}: it is damaged, or holds files "
            "that this library did not write. Nothing there is ever deleted: look at it, then remove it by hand",
        )
        return place

    def _settle(self) -> None:
        """Make durable what a dead writer has renamed: its next step was to be that, and ours builds upon it."""
        self._storage.sync(*(folder for folder in (ROOT, paths.TMP, paths.TRASH) if self._storage.exists(folder)))

    def _is_abandoned(self, directory: str) -> bool:
        """Holding the OS lock proves every other attempt's owner dead; without it only time tells."""
        if self._lock.proven:
            return True
        age = self._storage.age(directory)
        return age is not None and age > STALE_AFTER

    def _move(self, old: str, new: str) -> None:
        self._storage.rename(old, new)
        self._storage.sync(new.rpartition("/")[0], old.rpartition("/")[0])

    def _publish(self, attempt: Attempt, name: str) -> str:
        """Give the attempt a name that is free: **the commit**."""
        try:
            self._move(attempt.directory, name)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            across = SaveError(
                f"{self._storage.place(attempt.directory)} cannot be renamed to {self._storage.place(name)}: "
                f"{paths.PRIVATE} and the run root lie on different file systems (one of them, or a directory in "
                "them, is a mount, a link or a subvolume). They have to be on one; nothing was committed"
            )
            across.errno = errno.EXDEV
            raise across from error
        return name

    def _publish_beside_damage(self, attempt: Attempt, name: str) -> str:
        """Commit where a damaged checkpoint is in the way: that moves, or where it cannot be moved, keeps its name."""
        try:
            self.quarantine(name)
        except OSError as error:
            if error.errno not in _IMMOVABLE:
                raise
            return self._publish(attempt, paths.checkpoint_name(attempt.step, attempt.id))
        return self._publish(attempt, name)

    def _replace(self, attempt: Attempt, name: str, old: Manifest) -> str:
        """Put the attempt in the place of a committed checkpoint: at every instant one of the two is there."""
        if self._exchange(attempt, name):
            self._storage.sync(ROOT, paths.TMP)
            self._journal.add("removal", old.info(name), reason=REPLACED)
            self._tidy(lambda: self._dispose(attempt.directory))
            return name
        second = self._publish(attempt, paths.checkpoint_name(attempt.step, attempt.id))
        self._journal.add("removal", old.info(name), reason=REPLACED)
        self._tidy(lambda: self._make_way(name, second))
        return second if self._storage.exists(second) else name

    def _exchange(self, attempt: Attempt, name: str) -> bool:
        """Whether the two were swapped; ``False``, and nothing done, where the old one cannot be moved."""
        try:
            return self._storage.exchange(attempt.directory, name)
        except OSError as error:
            there = own_manifest(self._storage, name)
            if error.errno not in _IMMOVABLE or there is None or there.id == attempt.id:
                raise
            return False

    def _tidy(self, work: Callable[[], object]) -> None:
        """What follows the commit point cannot fail the save any more: the next writer will do it."""
        try:
            work()
        except OSError as error:
            text = f"could not clear away leftovers in {self._storage.url}; the next writer tries again: {error}"
            obstacle = obstacle_of(self._storage, error)
            if obstacle is None:
                messages.log(logger.warning, "%s", text)
            else:  # nothing will have changed by then, unless somebody is told
                messages.warn(f"{text} ({obstacle})")

    def _to_trash(self, directory: str, manifest: Manifest) -> None:
        self._storage.make_directory(paths.TRASH)
        self._move(directory, f"{paths.TRASH}/{manifest.id}")

    def _dispose(self, directory: str) -> bool:
        """Delete a directory in tmp or trash, but nothing pinned, and no file of somebody's that no checkpoint lists.

        What systems leave there goes, too. Where a process has a file open it waits in trash, without its manifest.
        """
        manifest = own_manifest(self._storage, directory)
        never_committed = directory.startswith(paths.TMP) and (
            manifest is None or directory == f"{paths.TMP}/{manifest.id}"
        )
        if never_committed:
            delete_everything(self._storage, directory)
            return True
        if manifest is not None:
            if is_pinned(self._storage, manifest):
                self._bring_back(directory, manifest)
                return False
            listed = removable(self._storage, directory, manifest)
            if listed.damaged:  # nobody can tell what is ours: all of it is kept, with what is left of its description
                self.quarantine(directory)
                remove_notes(self._storage, manifest.id)
                return True
            self._delete_listed(directory, listed)
        left = leftovers(self._storage, directory, () if manifest is None else (paths.MANIFEST,))
        if left.foreign:
            directory = self.quarantine(directory)  # before the manifest goes: without one, all in tmp would be ours
        elif left.open and manifest is not None and directory.startswith(paths.TMP):
            self._to_trash(directory, manifest)  # for the same reason
            directory = f"{paths.TRASH}/{manifest.id}"
        if manifest is not None:
            self._storage.remove(f"{directory}/{paths.MANIFEST}")
            remove_notes(self._storage, manifest.id)
        elif left.foreign:  # nobody can tell what it listed, so all of it stays
            remove_empty_directories(self._storage, directory)
            return True
        self._clear(directory, waits=not left.foreign)
        return True

    def _clear(self, directory: str, *, waits: bool) -> None:
        """Remove what systems leave. ``waits``: in trash, where a file still open keeps it for the next time."""
        left = clear(self._storage, directory)
        if waits and left.open:
            self.waiting.add(directory.rpartition("/")[2])
            log_open(self._storage, directory, left.open)

    def _delete_listed(self, directory: str, listed: Removable) -> None:
        remove_listed(self._storage, directory, listed)

    def _bring_back(self, directory: str, manifest: Manifest) -> None:
        name = paths.checkpoint_name(manifest.step)
        if self._storage.exists(name):
            name = paths.checkpoint_name(manifest.step, manifest.id)
        self._move(directory, name)

    def _make_way(self, name: str, second: str) -> None:
        """Finish a replacement without exchange: the old one goes, the new one takes its name."""
        old = own_manifest(self._storage, name)
        if old is not None:
            self.remove(name, old)
        self._take_free_name(second)

    def _take_free_name(self, second: str) -> None:
        """Give a checkpoint with a second name the plain one if it is free; else both stay, for retention to judge."""
        try:
            manifest = own_manifest(self._storage, second)
        except UnreadableCheckpointError:
            return  # it can be restored under this name, once it can be read
        if manifest is not None and not self._storage.exists(paths.checkpoint_name(manifest.step)):
            self._move(second, paths.checkpoint_name(manifest.step))


def _is_ours(entry: Entry) -> bool:
    """Whether this is a directory that this library made in tmp or trash: whatever else lies there is left alone."""
    return entry.is_dir and paths.is_id(entry.name)


def _directories_bottom_up(attempt: Attempt) -> list[str]:
    """Every directory that the attempt's files made, inner ones first, the attempt's own last."""
    inner = {parent for path in attempt.files for parent in paths.parents(path)}
    ordered = sorted(inner, key=lambda path: (-path.count("/"), path))
    return [*(f"{attempt.directory}/{path}" for path in ordered), attempt.directory]
