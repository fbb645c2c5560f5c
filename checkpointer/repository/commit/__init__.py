"""How a checkpoint becomes visible, and how it goes: by rename where there is one, else by its manifest."""

from __future__ import annotations

from checkpointer.repository.commit.base import (
    STALE_AFTER,
    Attempt,
    CommitProtocol,
    Leftovers,
    clear,
    for_each,
    leftovers,
    obstacle_of,
    read_manifest,
    sorted_out,
    walk,
)
from checkpointer.repository.commit.by_manifest import ManifestCommit, owner_is_dead
from checkpointer.repository.commit.by_rename import RenameCommit
from checkpointer.repository.commit.removal import is_unfinished_record, recorded_removal
from checkpointer.repository.journal import Journal
from checkpointer.repository.lock import WriterLock
from checkpointer.storage import Storage


def protocol_for(storage: Storage, lock: WriterLock, journal: Journal) -> CommitProtocol:
    """The protocol that fits what the storage can do."""
    return RenameCommit(storage, lock, journal) if storage.can_rename else ManifestCommit(storage, lock, journal)


__all__ = [
    "STALE_AFTER",
    "Attempt",
    "CommitProtocol",
    "Leftovers",
    "clear",
    "for_each",
    "is_unfinished_record",
    "leftovers",
    "obstacle_of",
    "owner_is_dead",
    "protocol_for",
    "read_manifest",
    "recorded_removal",
    "sorted_out",
    "walk",
]
