"""How a checkpoint becomes visible, and how it goes: by rename where there is one, else by its manifest."""

from __future__ import annotations

from ..lock import WriterLock
from ..storage import Storage
from .base import Attempt, CommitProtocol, read_manifest, walk
from .marker import MarkerCommit
from .rename import RenameCommit


def protocol_for(storage: Storage, lock: WriterLock) -> CommitProtocol:
    """The protocol that fits what the storage can do."""
    return RenameCommit(storage, lock) if storage.can_rename else MarkerCommit(storage, lock)


__all__ = ["Attempt", "CommitProtocol", "protocol_for", "read_manifest", "walk"]
