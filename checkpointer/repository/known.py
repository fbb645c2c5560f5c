"""What the holder of the writer's lock has read already: manifests are immutable, so one look at each is enough.

This is no mirror of the disk. Each listing starts with the names that are there now, and asks the storage whether each
manifest is still the file that was read (:meth:`Storage.stamps`); what is new or changed is read again. Where only
reading would tell, on object stores, a name stands for its manifest while the lock is held, until this writer itself
touches it. Everything is forgotten with the lock.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from checkpointer.format import paths
from checkpointer.format.info import CheckpointInfo
from checkpointer.repository.lock import WriterLock
from checkpointer.storage import Storage

_BY_NAME = "by name"
"""The stamp of a manifest whose storage has no cheap ones."""


@dataclass(frozen=True)
class Look:
    """One look at the manifests of a run, from before the first of them is read."""

    generation: int
    stamps: dict[str, object]
    """Of each directory's manifest; those that cannot be told are left out, and are not remembered."""
    known: dict[str, CheckpointInfo] = field(default_factory=dict)
    """By the name of their directory, without their notes: what need not be read."""


class KnownManifests:
    """Empty unless the lock is held. Safe to call from several threads."""

    def __init__(self, storage: Storage, lock: WriterLock) -> None:
        self._storage = storage
        self._lock = lock
        self._guard = threading.Lock()
        self._tenure: object | None = None
        self._generation = 0
        """Counts what this writer changes: a look that began before is not to be remembered."""
        self._found: dict[str, tuple[object, CheckpointInfo]] = {}

    def look(self, names: Sequence[str]) -> Look:
        """What is known of the directories ``names``, which were listed just now; forgets all others."""
        with self._guard:
            tenure = self._lock.tenure
            if tenure is None or tenure is not self._tenure:
                self._forget_all()
                self._tenure = tenure
            if tenure is None:
                return Look(self._generation, {})
            generation = self._generation
        stamps = self._stamps(names)  # before anything is read: what changes meanwhile has another stamp afterwards
        with self._guard:
            if generation != self._generation:
                return Look(generation, {})
            self._found = {name: seen for name, seen in self._found.items() if stamps.get(name) == seen[0]}
            return Look(generation, stamps, {name: info for name, (_, info) in self._found.items()})

    def remember(self, look: Look, name: str, info: CheckpointInfo) -> None:
        """``info`` was read from directory ``name`` after ``look``, and is what its manifest says."""
        with self._guard:
            if name in look.stamps and look.generation == self._generation:
                self._found[name] = (look.stamps[name], info)

    def forget(self) -> None:
        """This writer changes, or has changed, what is committed in a way that names alone may not show."""
        with self._guard:
            self._forget_all()

    def forget_one(self, name: str) -> None:
        """This writer commits, replaces or removes ``name``."""
        with self._guard:
            self._generation += 1
            self._found.pop(name, None)

    def _forget_all(self) -> None:
        self._generation += 1
        self._found = {}

    def _stamps(self, names: Sequence[str]) -> dict[str, object]:
        stamps = self._storage.stamps([f"{name}/{paths.MANIFEST}" for name in names])
        if stamps is None:
            return dict.fromkeys(names, _BY_NAME)
        return {name: stamp for name, stamp in zip(names, stamps, strict=True) if stamp is not None}
