"""What a run did to its file system, in terms of inodes, so that any part of it can be taken away again.

The first directory of a record, number 0, is the area that the run root is made in; it is there, durably, before the
first operation. Names are entries of directories and say which inode they refer to; inodes are numbered by the record
and never used twice.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

AREA = 0
"""Number of the directory that everything happens in."""

Names: TypeAlias = "dict[tuple[int, str], int]"
"""(directory, name) to inode."""

MARK, FSYNC = "mark", "fsync"


@dataclass(frozen=True)
class File:
    """What an inode that is no directory holds."""

    data: bytes = b""
    mode: int = 0o644

    @functools.cached_property
    def digest(self) -> bytes:
        """Of its bytes."""
        return hashlib.blake2b(self.data, digest_size=16).digest()


@dataclass(frozen=True)
class Change:
    """One entry of a directory: what it refers to from now on; ``None`` for nothing."""

    directory: int
    name: str
    inode: int | None


@dataclass(frozen=True)
class Operation:
    """One change to a file system, an fsync, or a mark that the scenario sets between them."""

    kind: str
    path: str = ""
    """For humans, relative to the area."""
    changes: tuple[Change, ...] = ()
    """Names that it changes, all of them or none."""
    inode: int | None = None
    """The file whose bytes, size or mode it changes, or what is fsynced."""
    offset: int = 0
    data: bytes = b""
    size: int = 0
    """Of the file from now on; of ``fallocate``: at least."""
    mode: int = 0
    mark: tuple[object, ...] = ()
    site: str = ""
    """The function of the package that asked for it."""

    @property
    def waits_for(self) -> frozenset[int]:
        """The inodes that have to be fsynced, all of them, before it is sure to survive a power cut."""
        if self.kind in (FSYNC, MARK):
            return frozenset()
        if self.changes:
            return frozenset(change.directory for change in self.changes)
        return frozenset(() if self.inode is None else (self.inode,))

    def applied(self, file: File) -> File:
        """``file`` after this operation on its bytes, size or mode."""
        if self.kind == "chmod":
            return dataclasses.replace(file, mode=self.mode)
        if self.kind == "write":
            head = file.data[: self.offset].ljust(self.offset, b"\0")
            return dataclasses.replace(file, data=head + self.data + file.data[self.offset + len(self.data) :])
        if self.kind == "fallocate":
            return dataclasses.replace(file, data=file.data.ljust(self.size, b"\0"))
        assert self.kind == "truncate", self.kind
        return dataclasses.replace(file, data=file.data[: self.size].ljust(self.size, b"\0"))

    def __str__(self) -> str:
        return f"{self.kind} {self.path}" if self.kind != MARK else f"-- {self.mark}"


NOTHING = Operation(MARK)


@dataclass(frozen=True)
class Tree:
    """A whole file system: directories by number, and the files that they lead to."""

    names: Names
    files: Mapping[int, File]

    def children(self) -> dict[int, dict[str, int]]:
        """The entries of each directory."""
        found: dict[int, dict[str, int]] = {}
        for (directory, name), inode in self.names.items():
            found.setdefault(directory, {})[name] = inode
        return found

    def walk(self) -> Iterator[tuple[str, int]]:
        """Path and inode of everything that can be reached, parents first."""
        children = self.children()
        waiting = [("", AREA)]
        while waiting:
            path, directory = waiting.pop()
            for name, inode in children.get(directory, {}).items():
                inner = f"{path}/{name}" if path else name
                yield inner, inode
                if inode not in self.files:
                    waiting.append((inner, inode))

    def find(self, path: str) -> int | None:
        """The inode at ``path``; ``None`` where there is nothing."""
        inode: int | None = AREA
        for part in path.split("/"):
            inode = None if inode is None else self.names.get((inode, part))
        return inode


@dataclass(frozen=True)
class Record:
    """Where a run began, and what it did."""

    root: str
    """The run root, relative to the area."""
    start: Tree
    """All of it durable."""
    operations: Sequence[Operation]

    @property
    def count(self) -> int:
        """Of real operations."""
        return sum(operation.kind != MARK for operation in self.operations)

    @property
    def next_inode(self) -> int:
        """A number that no inode has."""
        used = [change.inode or AREA for operation in self.operations for change in operation.changes]
        return 1 + max([AREA, *self.start.names.values(), *used])

    def tree(self, end: int | None = None) -> Tree:
        """What every process sees after the first ``end`` operations."""
        names, files = dict(self.start.names), dict(self.start.files)
        for operation in self.operations[:end]:
            apply_names(operation, names)
            if operation.kind == "create":
                assert operation.changes[0].inode is not None
                files[operation.changes[0].inode] = File(mode=operation.mode)
            elif not operation.changes and operation.inode is not None and operation.kind != FSYNC:
                files[operation.inode] = operation.applied(files[operation.inode])
        return Tree(names, files)

    def without(self, *numbers: int) -> Record:
        """The same run, had the program left out some fsyncs: it would not have noticed."""
        changed = [NOTHING if number in numbers else operation for number, operation in enumerate(self.operations)]
        return dataclasses.replace(self, operations=changed)


def apply_names(operation: Operation, names: Names) -> None:
    """Carry out what an operation does to names."""
    for change in operation.changes:
        if change.inode is None:
            names.pop((change.directory, change.name), None)
        else:
            names[change.directory, change.name] = change.inode
