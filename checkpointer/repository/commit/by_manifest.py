"""Commit by manifest: object stores, and every file system whose directories cannot be renamed atomically.

Data goes to ``checkpoint-<step>/<id>/``, where nobody looks until ``checkpoint-<step>/manifest.json`` names that id:
one small put. A small record per unfinished attempt or removal lets the next writer tidy up.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from checkpointer.errors import CorruptCheckpointError, FormatVersionError, RunLockedError
from checkpointer.format import paths, strict_json
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
    new_id,
    own_manifest,
    read_manifest,
    walk,
)
from checkpointer.repository.commit.removal import (
    clear_rest,
    damaged_list,
    read_record,
    record_path,
    record_removal,
    recorded_removal,
)
from checkpointer.repository.contents import removable, remove_listed
from checkpointer.repository.journal import Journal
from checkpointer.repository.lock import WriterLock
from checkpointer.repository.notes import remove_notes
from checkpointer.storage import Entry, Storage
from checkpointer.system import messages
from checkpointer.system.host import host_name

logger = logging.getLogger("checkpointer")


class ManifestCommit:
    """The protocol for :class:`~checkpointer.storage.remote.FsspecStorage`."""

    def __init__(self, storage: Storage, lock: WriterLock, journal: Journal) -> None:
        self._storage = storage
        self._lock = lock
        self._journal = journal
        self.waiting: set[str] = set()
        self._warned = False
        self._untidied: list[Callable[[], object]] = []
        """What could not be cleared away after a commit, or after one that the store has not answered for."""
        self._unanswered: set[str] = set()
        """Attempts whose manifest may or may not have been written: the store has not said."""

    def begin(self, step: int) -> Attempt:
        untidied, self._untidied = self._untidied, []
        for work in untidied:
            self._tidy(work)
        id = new_id()
        record = {"step": step, "host": host_name(), "pid": os.getpid()}
        self._storage.put(f"{paths.TMP}/{id}.json", strict_json.seal(record))
        return self.join(step, id)

    def join(self, step: int, id: str) -> Attempt:
        return Attempt(self._storage, step, id, f"{paths.checkpoint_name(step)}/{id}", data=id)

    def commit(self, attempt: Attempt, manifest: Manifest) -> str:
        self._warn_without_conditional_put()
        self._lock.check()
        name = paths.checkpoint_name(attempt.step)
        there = existing_at(self._storage, name)
        data = manifest.to_bytes()
        if there is not None and there.keep:
            second = paths.checkpoint_name(attempt.step, attempt.id)
            self._copy(name, second, attempt.id)
            self._put_marker(attempt, second, lambda marker: self._storage.create(marker, data))
            self._tidy(lambda: self._delete_attempt(attempt.id, attempt.step))
            return second
        if there is None or (there.manifest is None and not there.damaged):
            self._put_marker(attempt, name, lambda marker: self._storage.create(marker, data))
        else:
            self._replace(attempt, name, data, None if there.damaged else there.manifest)
        self._tidy(lambda: self._storage.remove(f"{paths.TMP}/{attempt.id}.json"))
        return name

    def abandon(self, attempt: Attempt) -> None:
        if attempt.id in self._unanswered:  # its marker may appear any moment: looked for before the next save
            self._unanswered.remove(attempt.id)
            self._untidied.append(partial(self._delete_attempt, attempt.id, attempt.step))
            return
        self._delete_attempt(attempt.id, attempt.step)

    def remove(self, name: str, manifest: Manifest) -> bool:
        if is_pinned(self._storage, manifest):
            return False
        if manifest.data is None and removable(self._storage, name, manifest).damaged:
            raise damaged_list(self._storage, name)
        record_removal(self._storage, name, manifest.to_bytes(), manifest.id)
        self._storage.remove(f"{name}/{paths.MANIFEST}")
        return self._finish_removal(name, manifest)

    def finish_removal(self, id: str) -> None:
        self._recover_removal(record_path(id))

    def recover(self) -> None:
        for_each(self._storage.list_directory(paths.TMP), self._recover_in_tmp)
        for_each(self._storage.list_directory(paths.TRASH), self._recover_in_trash)

    def _recover_in_tmp(self, entry: Entry) -> None:
        path = f"{paths.TMP}/{entry.name}"
        if entry.is_file and entry.name.endswith(".json"):
            self._recover_attempt(entry.name.removesuffix(".json"))
        elif entry.is_file and entry.name.startswith("probe-") and (self._storage.age(path) or 0) > STALE_AFTER:
            self._storage.remove(path)

    def _recover_in_trash(self, entry: Entry) -> None:
        if entry.is_file and entry.name.endswith(".json"):
            removed = self._recover_removal(f"{paths.TRASH}/{entry.name}")
            if removed is not None:
                self._journal.add("removal", removed.info(entry.name), reason=FINISHED)

    def quarantine(self, name: str) -> str | None:  # noqa: ARG002  the seam names it
        return None  # data can only be copied, and the copy of what is damaged serves nobody

    def _put_marker(self, attempt: Attempt, name: str, put: Callable[[str], None]) -> None:
        """The commit point. An answer that was lost, or a repeated request that met its own result, is no failure."""
        marker = f"{name}/{paths.MANIFEST}"
        try:
            put(marker)
        except OSError as error:
            self._unanswered.add(attempt.id)
            manifest = own_manifest(self._storage, name)
            if manifest is not None and manifest.id == attempt.id:
                return
            if not isinstance(error, FileExistsError):
                raise
            self._unanswered.remove(attempt.id)
            raise RunLockedError(
                f"{self._storage.place(marker)} was written by another job meanwhile: two jobs save to this run. "
                "Stop one of them; this save was not committed"
            ) from error

    def _replace(self, attempt: Attempt, name: str, data: bytes, old: Manifest | None) -> None:
        marker = f"{name}/{paths.MANIFEST}"
        if old is None:  # damaged: its manifest is kept for inspection, its data stays where it is
            damaged = self._storage.read(marker, 64 * paths.MANIFEST_LIMIT)
            kept = f"{paths.QUARANTINE}/{name}-{new_id()[:8]}"
            self._storage.put(f"{kept}/{paths.MANIFEST}", damaged)
            self._journal.add("quarantine", step=attempt.step, reason=f"its manifest was copied to {kept}")
            self._put_marker(attempt, name, lambda marker: self._storage.put(marker, data))
            return
        expected = self._storage.read(marker, paths.MANIFEST_LIMIT)
        record_removal(self._storage, name, expected, old.id)
        self._put_marker(attempt, name, lambda marker: self._storage.replace(marker, data, expected))
        self._journal.add("removal", old.info(name), reason=REPLACED)
        self._tidy(lambda: self._finish_removal(name, old))

    def _tidy(self, work: Callable[[], object]) -> None:
        """What follows the commit point cannot fail the save any more: the next attempt, or writer, does it."""
        try:
            work()
        except OSError as error:
            self._untidied.append(work)
            reason = self._storage.redact(str(error))
            text = "could not clear away leftovers in %s; the next writer will: %s"
            messages.log(logger.warning, text, self._storage.url, reason)

    def _finish_removal(self, name: str, manifest: Manifest) -> bool:
        """Delete what an unlinked manifest lists; ``False`` if somebody pinned it meanwhile, and it is back."""
        pinned = is_pinned(self._storage, manifest)
        if pinned:
            self._bring_back(name, manifest)
        else:
            left_open = self._delete_files(name, manifest)
            left_open |= clear_rest(self._storage, name)
            remove_notes(self._storage, manifest.id)
            if left_open:
                self.waiting.add(manifest.id)
                return True  # the record stays: by it the directory is found again
        self.waiting.discard(manifest.id)
        self._storage.remove(record_path(manifest.id))
        return not pinned

    def _bring_back(self, name: str, manifest: Manifest) -> None:
        if not self._storage.exists(f"{name}/{paths.MANIFEST}"):
            self._storage.create(f"{name}/{paths.MANIFEST}", manifest.to_bytes())
            return
        second = paths.checkpoint_name(manifest.step, manifest.id)
        if manifest.data is None or own_manifest(self._storage, second) is not None:
            return
        self._copy(name, second, manifest.data)
        self._storage.create(f"{second}/{paths.MANIFEST}", manifest.to_bytes())
        self._delete_files(name, manifest)

    def _copy(self, name: str, second: str, id: str) -> None:
        for path in list(walk(self._storage, f"{name}/{id}")):
            source = self._storage.open(f"{name}/{id}/{path}")
            self._storage.write(f"{second}/{id}/{path}", _read_in_pieces(source, source.size), source.size)

    def _delete_files(self, name: str, manifest: Manifest) -> bool:
        """Whether one of them is still open somewhere."""
        if manifest.data is None:  # made where directories can be renamed, and brought here
            remove_listed(self._storage, name, removable(self._storage, name, manifest))
            return False
        prefix = f"{name}/{manifest.data}"  # nothing in it is anybody else's
        delete_everything(self._storage, prefix)
        return bool(clear(self._storage, prefix).open)

    def _recover_attempt(self, id: str) -> None:
        path = f"{paths.TMP}/{id}.json"
        record = read_record(self._storage, path)
        if record is None or not paths.is_id(id) or paths.parse_checkpoint_name(_name(record)) is None:
            return
        if self._is_abandoned(path, record):
            self._delete_attempt(id, record["step"])

    def _delete_attempt(self, id: str, step: int) -> None:
        """Delete an attempt's files wherever they are not those of a committed checkpoint, then its record."""
        for name in (paths.checkpoint_name(step), paths.checkpoint_name(step, id)):
            with contextlib.suppress(CorruptCheckpointError, FormatVersionError):  # such a manifest may list them
                manifest = read_manifest(self._storage, name)
                if manifest is None or manifest.data != id:
                    self._delete_data(name, id)
        self._storage.remove(f"{paths.TMP}/{id}.json")

    def _recover_removal(self, path: str) -> Manifest | None:
        """Finish the removal that a record tells of; which checkpoint that has removed."""
        recorded = recorded_removal(self._storage, path)
        if recorded is None:
            self.waiting -= {path.rpartition("/")[2].removesuffix(".json")}
            return None
        name, manifest = recorded
        current = own_manifest(self._storage, name)
        if current is not None and current.id == manifest.id:
            self._storage.remove(path)  # it died before anything was removed
            return None
        return manifest if self._finish_removal(name, manifest) else None

    def _is_abandoned(self, path: str, record: dict[str, Any]) -> bool:
        if self._lock.proven:
            return True
        if owner_is_dead(record):
            return True
        age = self._storage.age(path)
        return age is not None and age > STALE_AFTER

    def _delete_data(self, name: str, id: str) -> None:
        delete_everything(self._storage, f"{name}/{id}")

    def _warn_without_conditional_put(self) -> None:
        if self._warned or self._storage.exclusive:
            return
        self._warned = True
        messages.warn(
            f"{self._storage.url} does not honour conditional writes: two jobs on different hosts that save to this "
            "run at the same time would not notice each other; make sure that only one does",
        )


def owner_is_dead(record: Mapping[str, object]) -> bool:
    """Whether the process that an attempt's record names was one of this host, and is no more."""
    return record.get("host") == host_name() and not _alive(record.get("pid"))


def _name(record: Mapping[str, object]) -> str:
    """The directory that an attempt's record speaks of; empty if it makes no sense."""
    step = record.get("step")
    return paths.checkpoint_name(step) if type(step) is int else ""


def _alive(pid: object) -> bool:
    """Whether a process of this host is alive; unknown counts as alive."""
    if not isinstance(pid, int) or pid <= 0:
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _read_in_pieces(source: Any, size: int, block: int = 16 << 20) -> Any:
    for start in range(0, size, block):
        piece = bytearray(min(block, size - start))
        source.read_into(start, memoryview(piece))
        yield piece
