"""Which files a checkpoint has, by its index: the manifest names the files of the index alone."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import xxhash

from checkpointer.errors import CorruptCheckpointError, UnreadableCheckpointError
from checkpointer.format import paths
from checkpointer.format.index import FileRecord, Index, RankPart
from checkpointer.format.manifest import Manifest
from checkpointer.storage import ReadFile, Storage, refusals_typed


@dataclass(frozen=True)
class Contents:
    """Everything that the index of a checkpoint says, the parts of all ranks included."""

    index: Index
    parts: Mapping[int, RankPart]
    """By rank."""
    files: Mapping[str, FileRecord]
    """Every file but the manifest."""


def read_contents(storage: Storage, directory: str, manifest: Manifest) -> Contents:
    """Read the index of the checkpoint in ``directory``, and all parts of it.

    Raises:
        CorruptCheckpointError: a file of it is missing, or is not what was written.
        UnreadableCheckpointError: the system does not let it be read.
        FileNotFoundError: the whole checkpoint has vanished.
    """
    index = read_index(storage, directory, manifest)
    parts = {rank: read_part(storage, directory, manifest, index, rank) for rank in index.parts}
    files = {**manifest.index, **index.files}
    for rank, part in parts.items():
        add_files(files, {paths.rank_index(rank): index.parts[rank]}, directory)
        add_files(files, part.files, directory)
    return Contents(index, parts, files)


def add_files(files: dict[str, FileRecord], more: Mapping[str, FileRecord], directory: str) -> None:
    """Add ``more``. Raises CorruptCheckpointError where a file is listed twice."""
    if not files.keys().isdisjoint(more):
        raise CorruptCheckpointError(f"{directory}: two parts of its index list {min(files.keys() & more.keys())!r}")
    files.update(more)


@dataclass(frozen=True)
class Removable:
    """The files of a checkpoint that is being removed, relative to its directory. The index goes after the data."""

    data: tuple[str, ...]
    index: tuple[str, ...]
    damaged: bool = False
    """Whether its list cannot be trusted: then nothing is known to be the library's own."""


def removable(storage: Storage, directory: str, manifest: Manifest) -> Removable:
    """What the index of a checkpoint lists, as far as it is still there.

    Where a file of the index is gone, a removal was interrupted when all data was gone durably: what is left of the
    index is listed, and nothing else.

    Raises:
        UnreadableCheckpointError: the system does not let the index be read.
    """
    try:
        contents = read_contents(storage, directory, manifest)
    except (CorruptCheckpointError, FileNotFoundError):
        there = [path for path in manifest.index if storage.exists(f"{directory}/{manifest.place(path)}")]
        if len(there) == len(manifest.index):
            return Removable((), (), damaged=True)
        folder = f"{directory}/{manifest.data}" if manifest.data else directory
        names = [entry.name for entry in storage.list_directory(folder) if paths.is_of_index(entry.name)]
        return Removable((), tuple(map(manifest.place, names)))
    index = [*map(paths.rank_index, contents.index.parts), *manifest.index]
    data = [path for path in contents.files if path not in set(index)]
    return Removable(tuple(map(manifest.place, data)), tuple(map(manifest.place, index)))


def remove_listed(storage: Storage, directory: str, listed: Removable) -> None:
    """Remove what is listed: data first, then the index, both durably.

    Without its list a file would count as somebody's, and so would the list without the manifest, which goes next.
    """
    for paths_of in (listed.data, listed.index):
        for path in paths_of:
            storage.remove(f"{directory}/{path}")
        folders = {f"{directory}/{path}".rpartition("/")[0] for path in paths_of}
        storage.sync(*filter(storage.exists, sorted(folders)))


def read_index(storage: Storage, directory: str, manifest: Manifest) -> Index:
    """Read what all ranks share of the index. Raises as :func:`read_contents` does."""
    from checkpointer.format.table import parse_index

    text, table = (
        read_whole(storage, directory, manifest, path, manifest.index[path]) for path in (paths.INDEX, paths.TABLE)
    )
    return parse_index(text, table, storage.place(f"{directory}/{manifest.place(paths.INDEX)}"))


def read_part(storage: Storage, directory: str, manifest: Manifest, index: Index, rank: int) -> RankPart:
    """Read the part of one rank, which the index lists. Raises as :func:`read_contents` does."""
    from checkpointer.format.table import parse_part

    path = paths.rank_index(rank)
    data = read_whole(storage, directory, manifest, path, index.parts[rank])
    return parse_part(data, rank, index, storage.place(f"{directory}/{manifest.place(path)}"))


def read_whole(storage: Storage, directory: str, manifest: Manifest, path: str, record: FileRecord) -> bytes:
    """The content of a file of the index, checked against its hash. Raises as :func:`read_contents` does."""
    place = f"{directory}/{manifest.place(path)}"
    if record.size > paths.INDEX_LIMIT:
        raise CorruptCheckpointError(f"{storage.place(place)} is larger than {paths.INDEX_LIMIT} bytes")
    file = open_file(storage, directory, manifest, path, record)
    try:
        data = bytearray(record.size)
        with disk_errors(storage, place):
            file.read_into(0, memoryview(data))
    finally:
        file.close()
    if xxhash.xxh3_128_hexdigest(data) != record.xxh3:
        raise CorruptCheckpointError(f"{storage.place(place)} is damaged: its bytes do not match its hash")
    return bytes(data)


def open_file(storage: Storage, directory: str, manifest: Manifest, path: str, record: FileRecord) -> ReadFile:
    """Open a file of a checkpoint, and compare its size. Raises as :func:`read_contents` does."""
    place = f"{directory}/{manifest.place(path)}"
    try:
        with refusals_typed(storage, place):
            file = storage.open(place)
    except FileNotFoundError as error:
        if not storage.exists(f"{directory}/{paths.MANIFEST}"):
            raise  # the whole checkpoint is gone, not one file of it
        raise CorruptCheckpointError(f"{storage.place(place)} is missing") from error
    if file.size != record.size:
        file.close()
        raise CorruptCheckpointError(f"{storage.place(place)} has {file.size} bytes, {record.size} were written")
    return file


@contextmanager
def disk_errors(storage: Storage, place: str) -> Iterator[None]:
    """A bad sector is damage of the checkpoint; other failures are not."""
    try:
        with refusals_typed(storage, place):
            yield
    except UnreadableCheckpointError as error:
        if error.errno != errno.EIO:
            raise
        raise CorruptCheckpointError(f"{storage.place(place)} cannot be read: {error.__cause__}") from error.__cause__
