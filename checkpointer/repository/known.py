"""What has been read of manifests already, by the stamp of their files: who looks again reads what is new or changed.

This is no mirror of the disk. Each look begins with the names that are in the run root now, and with the stamp of each
manifest now (:meth:`Storage.stamps`); what has no stamp, or another one, is read. Notes are never remembered.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias, overload

from checkpointer.errors import CheckpointerError
from checkpointer.format import paths
from checkpointer.format.info import CheckpointInfo
from checkpointer.repository.known_file import WORTH_WRITING, KnownFile, Row, decoded, encoded, microseconds
from checkpointer.repository.lock import WriterLock
from checkpointer.storage import Stamp, Storage
from checkpointer.system import messages

logger = logging.getLogger("checkpointer")

Key: TypeAlias = tuple[int, int, str]
"""Sequence, microseconds since 1970, id: checkpoints are in commit order by it."""


class Source(NamedTuple):
    """Where the rest is from."""

    place: Callable[[str], str]
    """The path of a directory in the run root, for humans."""
    read: Callable[[str], CheckpointInfo]
    """Reads the manifest in it."""


class Known:
    """A checkpoint of which the order is known, and the rest once it is asked for."""

    __slots__ = ("_info", "_rest", "key", "name", "stamp")

    def __init__(
        self, name: str, key: Key, stamp: Stamp, rest: str | None = None, info: CheckpointInfo | None = None
    ) -> None:
        self.name, self.key, self.stamp = name, key, stamp
        self._rest, self._info = rest, info

    @classmethod
    def read(cls, name: str, info: CheckpointInfo, stamp: Stamp = ()) -> Known:
        """One whose manifest, which has this stamp, says ``info``."""
        return cls(name, key_of(info), stamp, info=info)

    def info(self, source: Source) -> CheckpointInfo:
        """What the manifest says."""
        info = self._info
        if info is None:
            info = None if self._rest is None else decoded(self._rest, *self.key, source.place(self.name))
            if info is None or info.step != paths.parse_checkpoint_name(self.name):
                info, self._rest = source.read(self.name), None  # what was kept makes no sense after all
            self._info = info
        return info

    def row(self) -> Row | None:
        """For the file; ``None`` if it does not come back from one as it is."""
        if self._rest is None and self._info is not None:
            self._rest = encoded(self._info)
        return None if self._rest is None else (self.name, *self.key, self.stamp, self._rest)


def key_of(info: CheckpointInfo) -> Key:
    """By which a checkpoint is sorted."""
    return info.sequence, microseconds(info.created), info.id


class Checkpoints(Sequence[CheckpointInfo]):
    """Checkpoints in an order, each of which is made when it is asked for: of 800, a restore needs one."""

    def __init__(self, known: Sequence[Known], source: Source, infos: Mapping[str, CheckpointInfo]) -> None:
        """``infos``: those that are not as their manifest says, by the name of their directory: they have notes."""
        self._known = known
        self._source = source
        self._infos = infos

    @property
    def ids(self) -> list[str]:
        return [known.key[2] for known in self._known]

    @property
    def names(self) -> list[str]:
        """Of their directories."""
        return [known.name for known in self._known]

    @property
    def sequences(self) -> list[int]:
        return [known.key[0] for known in self._known]

    def of(self, ids: Iterable[str]) -> Checkpoints:
        """Those with these ids, in this order."""
        known = {item.key[2]: item for item in self._known}
        return Checkpoints([known[id] for id in ids], self._source, self._infos)

    def where(self, holds: Callable[[CheckpointInfo], object]) -> Checkpoints:
        """Those of which ``holds`` is true."""
        return Checkpoints([known for known in self._known if holds(self._info(known))], self._source, self._infos)

    @overload
    def __getitem__(self, index: int) -> CheckpointInfo: ...

    @overload
    def __getitem__(self, index: slice) -> Checkpoints: ...

    def __getitem__(self, index: int | slice) -> CheckpointInfo | Checkpoints:
        if isinstance(index, slice):
            return Checkpoints(self._known[index], self._source, self._infos)
        return self._info(self._known[index])

    def __iter__(self) -> Iterator[CheckpointInfo]:
        return map(self._info, self._known)

    def __len__(self) -> int:
        return len(self._known)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self.ids))

    def __repr__(self) -> str:
        return repr(tuple(self))

    def _info(self, known: Known) -> CheckpointInfo:
        return self._infos.get(known.name) or known.info(self._source)


NONE_THERE = Checkpoints((), Source(str, lambda name: CheckpointInfo(step=0, path=name)), {})


class KnownManifests:
    """Of one run root. What it holds is true whenever it was learned, and so safe to use from several threads."""

    def __init__(self, storage: Storage, lock: WriterLock) -> None:
        self._storage = storage
        self._lock = lock
        self._found: dict[str, Known] = {}
        """By the name of their directory."""
        self._learned = 0
        """How many of them are not in the file."""
        self._file = None if storage.lock_path is None else KnownFile(storage.lock_path)
        self._loaded = False

    def forget(self) -> None:
        """Read everything anew, and not the file either."""
        self._found, self._loaded = {}, True

    def look(self, names: Sequence[str]) -> Look:
        """What is known of directories that were listed just now."""
        if not self._loaded and len(names) >= WORTH_WRITING:
            self._load()
        stamps = self._stamps(names)
        found = ((self._found.get(name), stamp) for name, stamp in stamps.items())
        return Look(stamps, {item.name: item for item, stamp in found if item is not None and item.stamp == stamp})

    def learn(self, look: Look, read: Mapping[str, CheckpointInfo], *, whole: bool) -> None:
        """Remember what was ``read`` after ``look``, if it is the same file still. ``whole``: there are no others."""
        named = [name for name in read if name in look.stamps]
        after = self._stamps(named) if named else {}
        learned = {
            name: Known.read(name, read[name], stamp) for name, stamp in after.items() if look.stamps[name] == stamp
        }
        self._learned += len(learned)
        self._found = {**({} if whole else self._found), **look.known, **learned}

    def write_file(self, *, least: int = WORTH_WRITING) -> None:
        """Let a process that is started later know it, too, if ``least`` are new. For the holder of the lock alone.

        A few checkpoints are not worth a file. What goes wrong costs time, and nothing else: it is a cache.
        """
        if self._file is None or self._learned < least or len(self._found) < WORTH_WRITING or not self._lock.held:
            return
        try:
            self._file.write(row for item in self._found.values() if (row := item.row()) is not None)
        except (OSError, OverflowError) as error:  # also of a time before 1970
            messages.log(logger.debug, "what is known of %s cannot be kept for later: %s", self._storage.url, error)
        self._learned = 0

    def _load(self) -> None:
        self._loaded = True
        if self._file is None:
            return
        kept = {
            name: Known(name, (sequence, created, id), stamp, rest)
            for name, sequence, created, id, stamp, rest in self._file.read()
        }
        self._found = {**kept, **self._found}

    def _stamps(self, names: Sequence[str]) -> dict[str, Stamp]:
        """Of each directory's manifest that has one."""
        try:
            stamps = self._storage.stamps([f"{name}/{paths.MANIFEST}" for name in names])
        except (OSError, CheckpointerError) as error:
            messages.log(logger.debug, "all manifests of %s are read again: %s", self._storage.url, error)
            self.forget()
            return {}
        return {name: stamp for name, stamp in zip(names, stamps, strict=True) if stamp is not None}


class Look:
    """One look at the manifests of a run, from before the first of them is read."""

    __slots__ = ("known", "stamps")

    def __init__(self, stamps: Mapping[str, Stamp], known: Mapping[str, Known]) -> None:
        self.stamps = stamps
        """By the name of their directory."""
        self.known = known
        """What need not be read, without its notes."""
