"""Which checkpoints lie on the same bytes, by what is on disk.

A manifest says whose bytes a file was made to share. Where a run root has been copied by something that knows no hard
links (``cp -r``, zip, rsync without ``-H``) they are two files now, and a budget that counts them once is overrun.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

from checkpointer.format.info import CheckpointInfo
from checkpointer.repository.repository import name_of
from checkpointer.storage import Storage


def on_disk(storage: Storage, checkpoints: Iterable[CheckpointInfo]) -> list[CheckpointInfo]:
    """``checkpoints``, their ``copies`` corrected: a file that shares no bytes any more is a copy of its own.

    Asks once for each file that is shared by what the manifests say. Where a storage cannot tell (an object store; a
    file that is gone, or that this user cannot reach), the manifests count.
    """
    checkpoints = list(checkpoints)
    holders: dict[str, list[CheckpointInfo]] = defaultdict(list)
    for info in checkpoints:
        for copy in info.copies:
            holders[copy].append(info)
    renamed: dict[str, dict[str, str]] = defaultdict(dict)
    for copy, infos in holders.items():
        first: str | None = None
        for info in infos if len(infos) > 1 else ():
            identity = storage.identity(f"{name_of(info)}/{_path(copy)}")
            first = first or identity
            if identity != first and identity is not None:
                renamed[info.id][copy] = f"{copy}:{identity}"
    return [_with_copies(info, renamed[info.id]) if info.id in renamed else info for info in checkpoints]


def copies_by_file(info: CheckpointInfo) -> dict[str, str]:
    """The name of the physical copy that each file lies on, by its path."""
    return {_path(copy): copy for copy in info.copies}


def _path(copy: str) -> str:
    """Of the file: what the manifest calls a copy is an id and a path, and no path holds a colon."""
    return copy.partition("/")[2].partition(":")[0]


def _with_copies(info: CheckpointInfo, renamed: dict[str, str]) -> CheckpointInfo:
    return replace(info, copies={renamed.get(copy, copy): size for copy, size in info.copies.items()})
