"""What one ``save`` call captured, and how much room it takes on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property

from checkpointer.distributed.exchange import Alone
from checkpointer.distributed.save_plan import RankPlan
from checkpointer.format import paths
from checkpointer.format.index import Json
from checkpointer.format.tensor_files import shard_indexes
from checkpointer.repository.repository import Repository
from checkpointer.staging.stager import ReusedFile, Staged

BLOCK = 4096
"""Bytes that a file takes a multiple of."""

SLACK = 2 * paths.MANIFEST_LIMIT
"""Bytes for the manifest, directories, and plain state in the index, which is measured only once it is written."""

INDEX_ENTRY = 400
"""Bytes that the index spends on one tensor beside its key, which it names twice; about 270 were measured."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Everything that one ``save`` call captured."""

    step: int
    epoch: int | None
    created: datetime
    metrics: Mapping[str, float]
    tags: tuple[str, ...]
    staged: Staged
    attachments: Mapping[str, bytes]
    parent: str | None
    environment: Mapping[str, Json]
    rules: Mapping[str, Json] = field(default_factory=dict)
    """The ``save`` and ``keep`` rules in force, for the manifest."""
    mode: str = "sync"
    rank_plan: RankPlan = field(default_factory=lambda: RankPlan(Alone(), {}, {}, {}))
    """Which part of the save this process writes; all of it where there is one."""
    wait_seconds: float = 0.0
    """How long ``save`` waited for the one before."""
    stall_seconds: float = 0.0
    """How long ``save`` held training from then on, up to here."""

    @cached_property
    def small_files(self) -> dict[str, bytes]:
        """Attachments, and the indexes of sharded components, by path."""
        if not self.rank_plan.coordinator:
            return {}
        attached = {f"{paths.ATTACHMENTS}/{name}": data for name, data in self.attachments.items()}
        if self.rank_plan.ranks.size > 1:  # the shards of all ranks are known only when all have written
            return attached
        return {**shard_indexes([file for file, _ in self.staged.files], self.staged.parts), **attached}


def bytes_to_write(repository: Repository, snapshot: Snapshot) -> int:
    """What a save takes on disk: whole blocks of every file but those shared with a checkpoint that is still there."""
    staged = snapshot.staged
    earlier = {source.earlier.info.id: source.earlier for _, source in staged.files if isinstance(source, ReusedFile)}
    there = {id for id, source in earlier.items() if repository.can_reuse(source)}
    sizes = [
        file.size
        for file, source in staged.files
        if not isinstance(source, ReusedFile) or source.earlier.info.id not in there
    ]
    sizes += map(len, snapshot.small_files.values())
    sizes.append(sum(INDEX_ENTRY + 2 * len(key) for part in staged.components.values() for key in part.tensors))
    return sum(-(-size // BLOCK) * BLOCK for size in sizes) + SLACK
