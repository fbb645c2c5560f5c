"""Checkpoints that share files with the one before, written through the repository alone.

``succeed(repository, info, step)`` commits what ``info`` holds once more; ``source_of`` is what it shares with.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Literal

from checkpointer.errors import SaveError
from checkpointer.format.info import CheckpointInfo
from checkpointer.format.index import FileRecord
from checkpointer.policy.reuse import ReuseSource
from checkpointer.repository.repository import Repository


def source_of(repository: Repository, info: CheckpointInfo) -> ReuseSource:
    """A committed checkpoint as one to share with."""
    with repository.open(info) as reader:
        return ReuseSource.of(info, reader.manifest, reader.index)


def succeed(
    repository: Repository, info: CheckpointInfo, step: int, share: Collection[str] | Literal["all"] = "all"
) -> CheckpointInfo:
    """Commit what ``info`` holds as ``step``; the files named in ``share`` are shared, the others written."""
    source = source_of(repository, info)
    manifest = repository.manifest(info)
    attempt = repository.begin(step, 0)
    try:
        for path, record in manifest.files.items():
            shared = FileRecord(record.size, record.xxh3, record.origin or info.id, record.turn + 1)
            if share == "all" or path in share:
                if not repository.reuse(attempt, path, source, shared):
                    raise SaveError(f"{path} could not be shared")
            else:
                data = repository.storage.read(f"checkpoint-{info.step}/{manifest.place(path)}", record.size)
                attempt.write(path, [data], len(data))
        new = replace(
            manifest,
            id=attempt.id,
            parent=info.id,
            sequence=repository.next_sequence(),
            step=step,
            data=attempt.data,
            files=dict(attempt.files),
        )
        return repository.commit(attempt, new)
    except BaseException:
        repository.abandon(attempt)
        raise
