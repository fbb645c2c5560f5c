"""What both commit protocols share."""

from __future__ import annotations

import errno
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import xxhash

from checkpointer.errors import (
    CheckpointerError,
    CorruptCheckpointError,
    FormatVersionError,
    UnreadableCheckpointError,
)
from checkpointer.format import paths
from checkpointer.format.index import FileRecord
from checkpointer.format.manifest import Manifest, Totals, parse_manifest
from checkpointer.repository.notes import annotated, read_notes
from checkpointer.storage import Buffer, Entry, Storage, refusals_typed

_T = TypeVar("_T")

REPLACED = "replaced by a later save of the same step"
"""Why a checkpoint goes whose name is needed."""

FINISHED = "a writer that died had begun to remove it"
"""Why a checkpoint goes that lies in ``trash`` when a writer begins."""

STALE_AFTER = 24 * 3600.0
"""Seconds without a sign of life after which another writer's attempt counts as abandoned where no lock proves it."""


def new_id() -> str:
    """A new checkpoint's (and its attempt's) id: 32 random hexadecimal digits."""
    return secrets.token_hex(16)


@dataclass
class Attempt:
    """A checkpoint while it is being written: invisible to every reader."""

    storage: Storage
    step: int
    id: str
    directory: str
    """Where its files go."""
    data: str | None
    """The manifest's ``data``."""
    files: dict[str, FileRecord] = field(default_factory=dict)
    fsync_seconds: float = 0.0
    """Spent so far in making its files durable."""

    def write(self, path: str, pieces: Iterable[Buffer], size: int, *, steady: bool = False) -> FileRecord:
        """Write one durable file of ``size`` bytes and record its hash; ``steady`` as for :meth:`Storage.write`."""
        hasher = xxhash.xxh3_128()
        hashed = _hashed(pieces, hasher)
        self.fsync_seconds += self.storage.write(f"{self.directory}/{path}", hashed, size, steady=steady)
        record = self.files[path] = FileRecord(size, hasher.hexdigest())
        return record

    def reuse(self, path: str, source: str, record: FileRecord) -> bool:
        """Let ``path`` be what ``source`` is, a file of a committed checkpoint, instead of writing it.

        ``source`` is relative to the run root, ``record`` what the manifest will say. ``False``, and nothing done,
        where that cannot be: it is gone, or has another size, or the file system has no links.
        """
        target = f"{self.directory}/{path}"
        try:
            if not self.storage.link(source, target):
                return False
            file = self.storage.open(target)
        except (FileNotFoundError, CorruptCheckpointError):
            return False
        file.close()
        if file.size != record.size:
            self.storage.remove(target)
            return False
        self.files[path] = record
        return True

    def totals(self) -> Totals:
        """What the manifest says of its files, once all of them are recorded."""
        shared: dict[str, int] = {}
        for record in self.files.values():
            if record.origin is not None:
                shared[record.origin] = shared.get(record.origin, 0) + record.size
        return {
            "index": {path: self.files[path] for path in (paths.INDEX, paths.TABLE)},
            "files": len(self.files),
            "size": sum(record.size for record in self.files.values()),
            "shared": shared,
        }

    @property
    def bytes_shared(self) -> int:
        """Of its files so far."""
        return sum(record.size for record in self.files.values() if record.origin is not None)


def _hashed(pieces: Iterable[Buffer], hasher: xxhash.xxh3_128) -> Iterator[Buffer]:
    for piece in pieces:
        hasher.update(piece)
        yield piece


class CommitProtocol(Protocol):
    """One way to commit and remove. ``recover`` finishes or undoes whatever a dead writer left half done."""

    def begin(self, step: int) -> Attempt: ...

    def join(self, step: int, id: str) -> Attempt:
        """The attempt that another rank of this job has begun: to write files of it, never to commit or abandon."""

    def commit(self, attempt: Attempt, manifest: Manifest) -> str:
        """Make the attempt visible; returns its name. Durable, or an error and nothing changed."""

    def abandon(self, attempt: Attempt) -> None:
        """Remove what an attempt that failed has written."""

    def remove(self, name: str, manifest: Manifest) -> bool:
        """Remove a committed checkpoint; ``False`` if it turned out to be pinned and stays.

        Raises OSError where that is not possible: it is still there, or what is left of it is finished later.
        """

    @property
    def waiting(self) -> Collection[str]:
        """Ids of removed checkpoints whose directories cannot go yet, since a process has files in them open."""

    def finish_removal(self, id: str) -> None:
        """Try once more what ``remove`` of this checkpoint has begun and not ended."""

    def recover(self) -> None:
        """Finish or undo what dead writers have left. What fails does not keep it from the rest; then it raises."""

    def quarantine(self, name: str) -> str | None:
        """Move a damaged checkpoint to where nothing is ever deleted; ``None`` where nothing can be moved."""


def read_manifest(storage: Storage, directory: str) -> Manifest | None:
    """The manifest in a directory; ``None`` if there is none, so that it is no checkpoint.

    Raises:
        CorruptCheckpointError, FormatVersionError: there is one, but it cannot be used.
        UnreadableCheckpointError: the system does not let it be read.
    """
    path = f"{directory}/{paths.MANIFEST}"
    try:
        with refusals_typed(storage, path):
            data = storage.read(path, paths.MANIFEST_LIMIT)
    except FileNotFoundError:
        return None
    return parse_manifest(data, storage.place(path))


@dataclass(frozen=True)
class Existing:
    """What lies where a checkpoint wants to go."""

    manifest: Manifest | None
    damaged: bool = False
    keep: bool = False
    """Pinned, of a newer format, or not to be read by this user: it must not be replaced."""


def existing_at(storage: Storage, name: str) -> Existing | None:
    """Who holds ``name``; ``None`` if it is free."""
    try:
        manifest = read_manifest(storage, name)
    except CorruptCheckpointError:
        entries = storage.list_directory(name)  # none where the name belongs to a file, or to a link
        return Existing(None, damaged=any(entry.name == paths.MANIFEST for entry in entries))
    except (FormatVersionError, UnreadableCheckpointError):
        return Existing(None, keep=True)
    if manifest is None:
        return Existing(None) if storage.exists(name) else None
    info = annotated(manifest.info(name), read_notes(storage, manifest.id))
    return Existing(manifest, damaged=info.damaged is not None, keep=info.pinned)


def is_pinned(storage: Storage, manifest: Manifest) -> bool:
    """Whether the notes pin this checkpoint right now."""
    return annotated(manifest.info(""), read_notes(storage, manifest.id)).pinned


def own_manifest(storage: Storage, directory: str) -> Manifest | None:
    """The manifest in a directory that is being removed; an unusable one counts as none.

    Raises:
        UnreadableCheckpointError: it cannot be read, so nobody knows whose the directory is.
    """
    try:
        return read_manifest(storage, directory)
    except UnreadableCheckpointError:
        raise
    except CheckpointerError:
        return None


def for_each(items: Iterable[_T], work: Callable[[_T], object]) -> None:
    """Do ``work`` on every item, whichever of them fail; then raise the first error."""
    errors: list[OSError | CheckpointerError] = []
    for item in items:
        try:
            work(item)
        except (OSError, CheckpointerError) as error:
            errors.append(error)
    if errors:
        raise errors[0]


def obstacle_of(storage: Storage, error: OSError) -> str | None:
    """What keeps that in its place which ``error`` names, and the cure, for humans; ``None`` where nothing shows."""
    base = storage.place("").rstrip("/\\")
    for place in (error.filename, error.filename2):
        if not isinstance(place, str) or not place.startswith(base):
            continue
        path = place[len(base) :].replace("\\", "/").strip("/")
        while path and path not in (paths.PRIVATE, paths.TMP, paths.TRASH):  # what lies beside it is not meant
            reason = storage.obstacle(path)
            if reason is not None:
                return reason
            path = path.rpartition("/")[0]
    return None


def walk(storage: Storage, directory: str) -> Iterator[str]:
    """Every non-directory below ``directory``, relative to it."""
    return (path for path, _ in _below(storage, directory, storage.list_directory(directory)))


@dataclass(frozen=True)
class Leftovers:
    """What a directory holds, beside what is listed, by whom it is from; paths relative to it."""

    debris: tuple[str, ...] = ()
    """What systems leave behind; worth nothing."""
    open: tuple[str, ...] = ()
    """What a process has open although it was removed."""
    foreign: tuple[str, ...] = ()
    """All else: somebody's."""


def leftovers(storage: Storage, directory: str, listed: Collection[str] = ()) -> Leftovers:
    """What lies in ``directory`` that is not ``listed``."""
    return sorted_out(storage, directory, storage.list_directory(directory), listed)


def sorted_out(storage: Storage, directory: str, entries: Iterable[Entry], listed: Collection[str] = ()) -> Leftovers:
    """The same of these ``entries`` of it. Only a regular file is debris: systems leave no others."""
    found: dict[str | None, list[str]] = {"debris": [], "open": [], None: []}
    for path, entry in _below(storage, directory, entries):
        if path not in listed:
            found[paths.left_by_system(path) if entry.is_file else None].append(path)
    return Leftovers(*(tuple(sorted(found[kind])) for kind in ("debris", "open", None)))


def clear(storage: Storage, directory: str) -> Leftovers:
    """Remove debris and empty directories, ``directory`` itself too; what is left. Nothing in it may be listed.

    A file that a process has open is left to the system, which removes it, and its directory to the next call.
    """
    opened: list[str] = []
    foreign: list[str] = []
    for entry in storage.list_directory(directory):
        path = f"{directory}/{entry.name}"
        kind = paths.left_by_system(entry.name) if entry.is_file else None
        if entry.is_dir:
            inner = clear(storage, path)
            opened += (f"{entry.name}/{name}" for name in inner.open)
            foreign += (f"{entry.name}/{name}" for name in inner.foreign)
        elif kind == "debris":
            storage.remove(path)
        else:
            (opened if kind == "open" else foreign).append(entry.name)
    if not (opened or foreign):
        storage.remove_directory(directory)
    return Leftovers((), tuple(sorted(opened)), tuple(sorted(foreign)))


def delete_everything(storage: Storage, directory: str) -> None:
    """Delete a directory of ours with all that is in it, but for files that a process still has open."""
    for path, entry in list(_below(storage, directory, storage.list_directory(directory))):
        try:
            storage.remove(f"{directory}/{path}")
        except OSError as error:
            if error.errno != errno.EBUSY or paths.left_by_system(entry.name) != "open":
                raise
    remove_empty_directories(storage, directory)


def _below(storage: Storage, directory: str, entries: Iterable[Entry], above: str = "") -> Iterator[tuple[str, Entry]]:
    """The path, relative to where it began, and the entry of every non-directory among ``entries`` and below them."""
    for entry in entries:
        if entry.is_dir:
            inner = f"{directory}/{entry.name}"
            yield from _below(storage, inner, storage.list_directory(inner), f"{above}{entry.name}/")
        else:
            yield f"{above}{entry.name}", entry


def remove_empty_directories(storage: Storage, directory: str) -> bool:
    """Remove ``directory`` and all below it that holds no file; whether it is gone."""
    for entry in storage.list_directory(directory):
        if entry.is_dir:
            remove_empty_directories(storage, f"{directory}/{entry.name}")
    return storage.remove_directory(directory)
