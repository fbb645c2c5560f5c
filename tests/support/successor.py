"""Checkpoints that share files with the one before, written through the repository alone.

``succeed(repository, info, step)`` commits what ``info`` holds once more; ``source_of`` is what it shares with.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Literal

from checkpointer.errors import SaveError
from checkpointer.format.index import FileRecord
from checkpointer.format.info import CheckpointInfo
from checkpointer.format.table import index_files
from checkpointer.policy.reuse import ReuseSource
from checkpointer.repository.contents import read_contents, read_index
from checkpointer.repository.repository import Repository, name_of


def source_of(repository: Repository, info: CheckpointInfo) -> ReuseSource:
    """A committed checkpoint as one to share with."""
    with repository.open(info) as reader:
        stored = {path for path, record in reader.files.items() if record.header is not None}
        return ReuseSource.of(info, reader.manifest.data, reader.files, reader.chunks_by_tensor, stored)


def files_in(repository: Repository, info: CheckpointInfo) -> dict[str, FileRecord]:
    """Every file of a checkpoint but the manifest, as its index lists it."""
    return dict(read_contents(repository.storage, name_of(info), repository.manifest(info)).files)


def succeed(
    repository: Repository, info: CheckpointInfo, step: int, share: Collection[str] | Literal["all"] = "all"
) -> CheckpointInfo:
    """Commit what ``info`` holds as ``step``; the files named in ``share`` are shared, the others written.

    The index is never shared: it says which files are.
    """
    source = source_of(repository, info)
    manifest = repository.manifest(info)
    attempt = repository.begin(step, 0)
    try:
        for path, record in files_in(repository, info).items():
            if path in manifest.index:
                continue
            shared = replace(record, origin=record.origin or info.id, turn=record.turn + 1)
            if share == "all" or path in share:
                if not repository.reuse(attempt, path, source, shared):
                    raise SaveError(f"{path} could not be shared")
            else:
                data = repository.storage.read(f"checkpoint-{info.step}/{manifest.place(path)}", record.size)
                attempt.files[path] = replace(attempt.write(path, [data], len(data)), header=record.header)
        index = replace(read_index(repository.storage, name_of(info), manifest), files=dict(attempt.files))
        for path, data in index_files(index).items():
            attempt.write(path, [data], len(data))
        new = replace(
            manifest,
            id=attempt.id,
            parent=info.id,
            sequence=repository.next_sequence(),
            step=step,
            data=attempt.data,
            **attempt.totals(),
        )
        return repository.commit(attempt, new)
    except BaseException:
        repository.abandon(attempt)
        raise
