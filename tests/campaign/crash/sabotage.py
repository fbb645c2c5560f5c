"""Ways to break the library, each of which a campaign of kills has to notice."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

from checkpointer.format import paths
from checkpointer.format.manifest import Manifest, parse_manifest
from checkpointer.repository.commit import Attempt
from checkpointer.repository.commit.by_rename import RenameCommit
from checkpointer.repository.lock import WriterLock
from checkpointer.staging.stager import Stager
from checkpointer.state import RngState

PAUSE = 0.005
"""Seconds between two halves of what should be one step, so that a kill comes in between sooner."""


def _swap(kind: type[Any], name: str, function: Callable[..., Any]) -> None:
    setattr(kind, name, function)


def delete_before_commit() -> None:
    """All that was there goes before the new one is visible."""
    commit, remove = RenameCommit.commit, RenameCommit.remove

    def commit_last(self: RenameCommit, attempt: Attempt, manifest: Manifest) -> str:
        for entry in self._storage.list_directory(""):
            if paths.parse_checkpoint_name(entry.name) is not None:
                old = self._storage.read(f"{entry.name}/{paths.MANIFEST}", paths.MANIFEST_LIMIT)
                remove(self, entry.name, parse_manifest(old, entry.name))
        time.sleep(PAUSE)
        return commit(self, attempt, manifest)

    _swap(RenameCommit, "commit", commit_last)


def write_in_place() -> None:
    """Files go where readers look, and the manifest follows: there is no step that makes them visible at once."""
    begin = RenameCommit.begin

    def begin_in_place(self: RenameCommit, step: int) -> Attempt:
        attempt = begin(self, step)
        attempt.directory = paths.checkpoint_name(step)
        return attempt

    def commit_in_place(self: RenameCommit, attempt: Attempt, manifest: Manifest) -> str:
        data = manifest.to_bytes()
        self._storage.write(f"{attempt.directory}/{paths.MANIFEST}", [data], len(data))
        return attempt.directory

    _swap(RenameCommit, "begin", begin_in_place)
    _swap(RenameCommit, "commit", commit_in_place)


def acknowledge_early() -> None:
    """A save is called durable while its commit is still to come."""
    commit = RenameCommit.commit

    def commit_later(self: RenameCommit, attempt: Attempt, manifest: Manifest) -> str:
        threading.Timer(PAUSE, commit, (self, attempt, manifest)).start()
        return paths.checkpoint_name(attempt.step)

    _swap(RenameCommit, "commit", commit_later)


def forget_random_numbers() -> None:
    """A restore leaves the global generators as they are."""
    _swap(RngState, "_set", lambda self, value, counts: None)


def alias_instead_of_copy() -> None:
    """What is being written in the background is what training changes."""
    _swap(Stager, "copies", Stager.live)


def leave_leftovers() -> None:
    """The next writer clears nothing away."""
    _swap(RenameCommit, "recover", lambda self: None)


def stage_outside() -> None:
    """Every attempt leaves a file in the system's temporary directory."""
    begin = RenameCommit.begin

    def begin_outside(self: RenameCommit, step: int) -> Attempt:
        os.close(tempfile.mkstemp()[0])
        return begin(self, step)

    _swap(RenameCommit, "begin", begin_outside)


def lock_by_a_child() -> None:
    """The lock is held by a process that outlives its owner."""
    acquire = WriterLock.acquire

    def acquire_and_fork(self: WriterLock) -> None:
        acquire(self)
        assert self._lock is not None
        held = os.dup(self._lock._context.lock_file_fd or 0)
        if os.fork() == 0:
            time.sleep(1)
            os._exit(0)
        os.close(held)

    _swap(WriterLock, "acquire", acquire_and_fork)


def never_prune() -> None:
    """Nothing is ever removed."""
    _swap(RenameCommit, "remove", lambda self, name, manifest: True)


SABOTAGES: dict[str, Callable[[], None]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        delete_before_commit, write_in_place, acknowledge_early, forget_random_numbers, alias_instead_of_copy,
        leave_leftovers, stage_outside, lock_by_a_child, never_prune,
    )
}  # fmt: skip
