"""Which checkpoints lie on the same bytes, by what is on disk.

A manifest says how many bytes were made to share those of which checkpoint. Where a run root has been copied by
something that knows no hard links (``cp -r``, zip, rsync without ``-H``) they are there twice now, and a budget that
counts them once is overrun.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from checkpointer.format.info import CheckpointInfo
from checkpointer.repository.repository import name_of
from checkpointer.storage import Storage

SharedFiles = Callable[[CheckpointInfo], Mapping[str, tuple[str, int]]]
"""Gives the files of a checkpoint that share another one's bytes, see :meth:`Repository.shared_files`."""


def on_disk(storage: Storage, checkpoints: Iterable[CheckpointInfo], shared_files: SharedFiles) -> list[CheckpointInfo]:
    """``checkpoints``, their ``copies`` corrected: bytes that are there once more count for the first that has them.

    Reads the index of those that share, and asks once for each file that is shared by what it says. Where a storage
    cannot tell (an object store; a file that is gone, or that this user cannot reach), the manifests count.
    """
    checkpoints = list(checkpoints)
    shared = {info.id: shared_files(info) for info in checkpoints}
    by_bytes = _holders(storage, checkpoints, shared)
    first: dict[tuple[str, str, int], str] = {}
    for (path, id), (origin, number) in by_bytes.items():
        first.setdefault((path, origin, number), origin if number == 0 else id)
    corrected: list[CheckpointInfo] = []
    for info in checkpoints:
        copies = dict(info.copies)
        for path, (origin, size) in shared.get(info.id, {}).items():
            holder = first[(path, *by_bytes[path, info.id])]
            if holder != origin:
                copies[origin] -= size
                copies[holder] = copies.get(holder, 0) + size
        corrected.append(replace(info, copies={copy: size for copy, size in copies.items() if size}))
    return corrected


def holders(
    storage: Storage, checkpoints: Iterable[CheckpointInfo], shared_files: SharedFiles
) -> dict[tuple[str, str], tuple[str, int]]:
    """For each file that is shared by what indexes say, by path and id of the checkpoint: the bytes that it lies on.

    They are named by the id of the checkpoint whose save wrote them, and the number of the copy: 0 is the one that the
    first of them lies on, in commit order.
    """
    checkpoints = list(checkpoints)
    shared = {info.id: shared_files(info) for info in checkpoints}
    return _holders(storage, checkpoints, shared)


def _holders(
    storage: Storage, checkpoints: Iterable[CheckpointInfo], shared: Mapping[str, Mapping[str, tuple[str, int]]]
) -> dict[tuple[str, str], tuple[str, int]]:
    sharing: dict[tuple[str, str], list[CheckpointInfo]] = defaultdict(list)
    by_id = {info.id: info for info in checkpoints}
    for info in by_id.values():
        for path, (origin, _) in shared.get(info.id, {}).items():
            if not sharing[origin, path] and origin in by_id:
                sharing[origin, path].append(by_id[origin])
            sharing[origin, path].append(info)
    found: dict[tuple[str, str], tuple[str, int]] = {}
    for (origin, path), infos in sharing.items():
        identities: list[str] = []
        for info in infos:
            identity = storage.identity(f"{name_of(info)}/{path}")
            if identity is not None and identity not in identities:
                identities.append(identity)
            found[path, info.id] = (origin, 0 if identity is None else identities.index(identity))
    return found
