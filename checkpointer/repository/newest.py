"""What the newest manifests say of the whole run: its id, and the rules that were in force."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING

from checkpointer.errors import (
    CheckpointerError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    FormatVersionError,
)
from checkpointer.format.info import CheckpointInfo
from checkpointer.format.manifest import Manifest

if TYPE_CHECKING:
    from checkpointer.repository.repository import Repository


def newest_manifest(repository: Repository, checkpoints: Sequence[CheckpointInfo]) -> Manifest | None:
    """That of the last of ``checkpoints`` which is still there and whole; ``None`` where none is."""
    for info in reversed(checkpoints):
        try:
            return repository.manifest(info)
        except (CheckpointNotFoundError, CorruptCheckpointError, FormatVersionError):  # changed since it was listed
            continue
    return None


class RunId:
    """The id that all checkpoints of a run root have. It is looked up once for as long as the writer's lock is held."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._tenure: object | None = None
        self._id: str | None = None

    def get(self) -> str | None:
        """That of the newest checkpoint that has one, else a new one.

        ``None`` where a checkpoint that cannot be read now may have one: a second id would make two runs of one.
        """
        tenure = self._repository.lock.tenure
        if self._id is None or tenure is None or tenure is not self._tenure:
            self._tenure, self._id = tenure, self._look_up()
        return self._id

    def _look_up(self) -> str | None:
        listing = self._repository.list_checkpoints()
        unsure = any(item.may_return or isinstance(item.error, FormatVersionError) for item in listing.unreadable)
        for info in reversed(listing.checkpoints):
            try:
                run = self._repository.manifest(info).run
            except CheckpointNotFoundError:
                continue
            except (CheckpointerError, OSError):  # it was readable a moment ago, and whoever needs it says so
                unsure = True
                continue
            if run is not None:
                return run
        return None if unsure else secrets.token_hex(16)
