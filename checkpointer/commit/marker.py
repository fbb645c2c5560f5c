"""Commit by manifest: object stores, and every file system whose directories cannot be renamed atomically.

Data goes to ``checkpoint-<step>/<id>/``, where nobody looks until ``checkpoint-<step>/manifest.json`` names that id:
one small put. A small record per unfinished attempt or removal lets the next writer tidy up.
"""

from __future__ import annotations

import contextlib
import os
import socket
import warnings
from typing import Any

from checkpointer import layout, strictjson
from checkpointer.commit.base import (
    STALE_AFTER,
    Attempt,
    is_pinned,
    new_id,
    occupant,
    own_manifest,
    remove_empty_directories,
    walk,
)
from checkpointer.errors import CheckpointerWarning, CorruptCheckpointError, RunLockedError
from checkpointer.lock import WriterLock
from checkpointer.manifest import Manifest, parse_manifest
from checkpointer.notes import remove_notes
from checkpointer.storage import Storage

RECORD_LIMIT = 2 * layout.MANIFEST_LIMIT
"""Bytes."""


class MarkerCommit:
    """The protocol for :class:`~checkpointer.storage.remote.FsspecStorage`."""

    def __init__(self, storage: Storage, lock: WriterLock) -> None:
        self._storage = storage
        self._lock = lock
        self._warned = False

    def begin(self, step: int) -> Attempt:
        id = new_id()
        record = {"step": step, "host": socket.gethostname(), "pid": os.getpid()}
        self._storage.put(f"{layout.TMP}/{id}.json", strictjson.seal(record))
        return Attempt(self._storage, step, id, f"{layout.checkpoint_name(step)}/{id}", data=id)

    def commit(self, attempt: Attempt, manifest: Manifest) -> str:
        self._warn_without_conditional_put()
        self._lock.check()
        name = layout.checkpoint_name(attempt.step)
        there = occupant(self._storage, name)
        data = manifest.to_bytes()
        if there is not None and there.keep:
            return self._commit_beside(attempt, data)
        marker = f"{name}/{layout.MANIFEST}"
        try:
            if there is None or (there.manifest is None and not there.damaged):
                self._storage.create(marker, data)
            else:
                self._replace(name, data, None if there.damaged else there.manifest)
        except FileExistsError as error:
            raise RunLockedError(
                f"{self._storage.place(marker)} was written by another job meanwhile: two jobs save to this run. "
                "Stop one of them; this save was not committed"
            ) from error
        self._storage.remove(f"{layout.TMP}/{attempt.id}.json")
        return name

    def abandon(self, attempt: Attempt) -> None:
        self._delete_data(layout.checkpoint_name(attempt.step), attempt.id)
        self._storage.remove(f"{layout.TMP}/{attempt.id}.json")

    def remove(self, name: str, manifest: Manifest) -> bool:
        if is_pinned(self._storage, manifest):
            return False
        self._record_removal(name, manifest.to_bytes(), manifest.id)
        self._storage.remove(f"{name}/{layout.MANIFEST}")
        if is_pinned(self._storage, manifest):  # somebody pinned it between the plan and the removal
            self._storage.create(f"{name}/{layout.MANIFEST}", manifest.to_bytes())
            self._storage.remove(f"{layout.TRASH}/{manifest.id}.json")
            return False
        self._finish_removal(name, manifest)
        return True

    def recover(self) -> None:
        for entry in self._storage.list_directory(layout.TMP):
            if entry.is_file and entry.name.endswith(".json"):
                self._recover_attempt(entry.name.removesuffix(".json"))
        for entry in self._storage.list_directory(layout.TRASH):
            if entry.is_file and entry.name.endswith(".json"):
                self._recover_removal(f"{layout.TRASH}/{entry.name}")

    def _commit_beside(self, attempt: Attempt, data: bytes) -> str:
        """The plain name is pinned: commit under the second name, whose files are copied there by the server."""
        name = layout.checkpoint_name(attempt.step, attempt.id)
        for path, record in attempt.files.items():
            source = self._storage.open(f"{attempt.directory}/{path}")
            self._storage.write(f"{name}/{attempt.id}/{path}", _read_in_pieces(source, record.size), record.size)
        self._storage.create(f"{name}/{layout.MANIFEST}", data)
        self.abandon(attempt)
        return name

    def _replace(self, name: str, data: bytes, old: Manifest | None) -> None:
        marker = f"{name}/{layout.MANIFEST}"
        if old is None:  # damaged: its manifest is kept for inspection, its data stays where it is
            damaged = self._storage.read(marker, 64 * layout.MANIFEST_LIMIT)
            self._storage.put(f"{layout.QUARANTINE}/{name}-{new_id()[:8]}/{layout.MANIFEST}", damaged)
            self._storage.put(marker, data)
            return
        expected = self._storage.read(marker, layout.MANIFEST_LIMIT)
        self._record_removal(name, expected, old.id)
        self._storage.replace(marker, data, expected)
        self._finish_removal(name, old)

    def _record_removal(self, name: str, manifest: bytes, id: str) -> None:
        record = {"name": name, "manifest": manifest.decode("utf-8")}
        self._storage.put(f"{layout.TRASH}/{id}.json", strictjson.seal(record))

    def _finish_removal(self, name: str, manifest: Manifest) -> None:
        for path in manifest.files:
            self._storage.remove(f"{name}/{manifest.place(path)}")
        if manifest.data:
            remove_empty_directories(self._storage, f"{name}/{manifest.data}")
        self._warn_of_foreign_files(name)
        remove_notes(self._storage, manifest.id)
        self._storage.remove(f"{layout.TRASH}/{manifest.id}.json")

    def _warn_of_foreign_files(self, name: str) -> None:
        if self._storage.exists(f"{name}/{layout.MANIFEST}"):
            return
        left = sorted(walk(self._storage, name))
        if not left:
            remove_empty_directories(self._storage, name)
            return
        warnings.warn(
            f"{self._storage.place(name)} was removed, but {len(left)} files that this library did not write are "
            f"left there: {', '.join(left[:5])}",
            CheckpointerWarning,
            stacklevel=2,
        )

    def _recover_attempt(self, id: str) -> None:
        path = f"{layout.TMP}/{id}.json"
        record = self._read_record(path)
        if record is None or not layout.is_id(id):
            return
        for name in (layout.checkpoint_name(record["step"]), layout.checkpoint_name(record["step"], id)):
            manifest = own_manifest(self._storage, name)
            if manifest is not None and manifest.id == id:
                self._storage.remove(path)  # it was committed
                return
        if not self._is_abandoned(path, record):
            return
        for name in (layout.checkpoint_name(record["step"]), layout.checkpoint_name(record["step"], id)):
            self._delete_data(name, id)
        self._storage.remove(path)

    def _recover_removal(self, path: str) -> None:
        record = self._read_record(path)
        if record is None:
            return
        name = str(record.get("name"))
        manifest = parse_manifest(str(record.get("manifest")).encode(), self._storage.place(path))
        current = own_manifest(self._storage, name)
        if current is not None and current.id == manifest.id:
            self._storage.remove(path)  # it died before anything was removed
        else:
            self._finish_removal(name, manifest)

    def _read_record(self, path: str) -> dict[str, Any] | None:
        """A record, or ``None`` if it is gone or not one: then nothing is touched."""
        with contextlib.suppress(FileNotFoundError, CorruptCheckpointError):
            return strictjson.unseal(self._storage.read(path, RECORD_LIMIT), path)
        return None

    def _is_abandoned(self, path: str, record: dict[str, Any]) -> bool:
        if self._lock.proven:
            return True
        if record.get("host") == socket.gethostname() and not _alive(record.get("pid")):
            return True
        age = self._storage.age(path)
        return age is not None and age > STALE_AFTER

    def _delete_data(self, name: str, id: str) -> None:
        directory = f"{name}/{id}"
        for path in list(walk(self._storage, directory)):
            self._storage.remove(f"{directory}/{path}")
        remove_empty_directories(self._storage, directory)

    def _warn_without_conditional_put(self) -> None:
        if self._warned or self._storage.exclusive:
            return
        self._warned = True
        warnings.warn(
            f"{self._storage.url} does not honour conditional writes: two jobs on different hosts that save to this "
            "run at the same time would not notice each other; make sure that only one does",
            CheckpointerWarning,
            stacklevel=2,
        )


def _alive(pid: object) -> bool:
    """Whether a process of this host is alive; unknown counts as alive."""
    if not isinstance(pid, int) or pid <= 0:
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _read_in_pieces(source: Any, size: int, block: int = 16 << 20) -> Any:
    for start in range(0, size, block):
        piece = bytearray(min(block, size - start))
        source.read_into(start, memoryview(piece))
        yield piece
