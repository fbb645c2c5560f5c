"""Listens to everything that this process does to the files below one directory.

The functions of ``os``, and the calls of the C library that the package makes, are replaced by ones that do the same
and write down what came of it. Nothing is simulated. ``test_record.py`` compares what is heard here with ``strace``.
"""

from __future__ import annotations

import _pyio  # type: ignore[import-not-found]  # typeshed does not know it
import contextlib
import io
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

from checkpointer.storage import local as local_storage
from checkpointer.system import direct_io
from tests.campaign.crash.power.record import AREA, FSYNC, MARK, Change, File, Operation, Record, Tree

CREATES = os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_RDWR
_SYNCING = ("_sync_fd", "_sync_path", "sync")
_EXCHANGE = 2  # renameat2(2)


def scan(area: str) -> Tree:
    """What lies below ``area`` now; inodes are numbered in the order of their paths."""
    numbers: dict[str, int] = {"": AREA}
    identities: dict[tuple[int, int], int] = {}
    names: dict[tuple[int, str], int] = {}
    files: dict[int, File] = {}
    for folder, directories, plain in os.walk(area):
        directories.sort()
        above = numbers[os.path.relpath(folder, area) if folder != area else ""]
        for name in [*directories, *sorted(plain)]:
            place = os.path.join(folder, name)
            status = os.lstat(place)
            number = identities.setdefault((status.st_dev, status.st_ino), len(identities) + 1)
            names[above, name] = numbers[os.path.relpath(place, area)] = number
            if name in plain and number not in files:
                with open(place, "rb") as file:
                    files[number] = File(file.read(), status.st_mode & 0o7777)
    return Tree(names, files)


class Recorder:
    """Writes down what happens below ``area`` while ``listening``.

    With ``before`` this is what another process goes on with after the first ``end`` operations of that record; what it
    has left lies there already.
    """

    def __init__(self, area: str, root: str, before: Record | None = None, end: int | None = None) -> None:
        self.area = os.path.realpath(area)
        self.root = root
        self._before = (
            Record(root, scan(self.area), ()) if before is None else replace(before, operations=before.operations[:end])
        )
        self.operations: list[Operation] = []
        self.calls: list[str] = []
        """Every call that could have changed something, in the words of ``tracing``."""
        self.after_each: Callable[[int], object] = lambda _: None
        """Called after each operation with how many there are by now, before anything else can happen."""
        self._guard = threading.RLock()
        self._numbers = {self._identity(self.area): AREA}
        for path, number in self._before.tree().walk():
            self._numbers[self._identity(os.path.join(self.area, path))] = number
        self._next = self._before.next_inode

    @property
    def record(self) -> Record:
        return replace(self._before, operations=(*self._before.operations, *self.operations))

    def mark(self, *what: object) -> None:
        """Note that something is true from now on."""
        with self._guard:
            self.operations.append(Operation(MARK, mark=what))

    @contextlib.contextmanager
    def listening(self, *, exchange: bool = True) -> Iterator[None]:
        """Without ``exchange``: as on a system whose C library has no renameat2."""
        replaced: dict[str, Callable[..., Any]] = {
            name: self._heard(name, getattr(os, name))
            for name in (
                "open", "write", "pwrite", "fsync", "mkdir", "rename", "replace", "link", "unlink", "remove", "rmdir",
                "fchmod", "chmod", "ftruncate",
            )
        }  # fmt: skip
        with contextlib.ExitStack() as stack:
            for name, function in replaced.items():
                stack.enter_context(mock.patch.object(os, name, function))
            known = os.supports_dir_fd | {replaced[name] for name in ("open", "link", "mkdir", "unlink", "rmdir")}
            stack.enter_context(mock.patch.object(os, "supports_dir_fd", known))
            stack.enter_context(mock.patch.object(io, "open", self._opened(io.open)))
            special = self._special_rename(local_storage._special_rename()) if exchange else None
            stack.enter_context(mock.patch.object(local_storage, "_special_rename", return_value=special))
            stack.enter_context(mock.patch.object(direct_io, "_system_call", self._system_call(direct_io._system_call)))
            yield

    # ---------------------------------------------------------------------------------------------- listening

    def _heard(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        """``real``, one call at a time, with what ``_on_<name>`` makes of it."""
        listener: Callable[..., Any] = getattr(self, f"_on_{name}")

        def call(*arguments: Any, **keywords: Any) -> Any:
            with self._guard:
                return listener(real, *arguments, **keywords)

        return call

    def _opened(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """``io.open``, whose own C code nobody hears: for files that are written, its twin in Python is used."""

        def opened(file: Any, mode: str = "r", *arguments: Any, **keywords: Any) -> Any:
            if set(mode) & set("wax+") and not isinstance(file, int) and self._place(file) is not None:
                return _pyio.open(os.fspath(file), mode, *arguments, **keywords)
            return real(file, mode, *arguments, **keywords)

        return opened

    def _special_rename(self, real: Callable[[bytes, bytes, int], int] | None) -> Callable[[bytes, bytes, int], int]:
        assert real is not None, "this system has no renameat2"

        def rename(old: bytes, new: bytes, flag: int) -> int:
            with self._guard:
                before = self._place(old), self._place(new)
                status = real(old, new, flag)
                if status == 0 and before[0] is not None and before[1] is not None:
                    self._renamed(before[0], before[1], exchange=flag == _EXCHANGE)
                return status

        return rename

    def _system_call(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def found(name: str, *types: Any) -> Any:
            function = real(name, *types)
            return function if name != "fallocate" else lambda *arguments: self._fallocated(function, *arguments)

        return found

    def _fallocated(self, real: Callable[..., int], fd: int, mode: int, offset: int, size: int) -> int:
        with self._guard:
            status = real(fd, mode, offset, size)
            if status == 0 and (number := self._number_of(fd)) is not None:
                self._add("fallocate", self._path(fd), inode=number, size=offset + size)
            return status

    def _on_open(self, real: Any, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        place = self._place(path, dir_fd) if flags & CREATES else None
        if place is None:
            return int(real(path, flags, mode, dir_fd=dir_fd))
        existed = os.path.lexists(place)
        fd = int(real(path, flags, mode, dir_fd=dir_fd))
        status = os.fstat(fd)
        self.calls.append(f"open {self._relative(place)}")
        if not existed:
            number = self._new(place)
            change = self._change(place, number)
            self._note("create", self._relative(place), changes=(change,), mode=status.st_mode & 0o7777)
        elif flags & os.O_TRUNC:
            self._note("truncate", self._relative(place), inode=self._number_of(fd), size=0)
        return fd

    def _on_write(self, real: Any, fd: int, data: Any) -> int:
        number = self._number_of(fd)
        offset = os.lseek(fd, 0, os.SEEK_CUR) if number is not None else 0
        count = int(real(fd, data))
        if number is not None:
            self._add("write", self._path(fd), inode=number, offset=offset, data=_first(data, count))
        return count

    def _on_pwrite(self, real: Any, fd: int, data: Any, offset: int) -> int:
        count = int(real(fd, data, offset))
        if (number := self._number_of(fd)) is not None:
            self._add("write", self._path(fd), inode=number, offset=offset, data=_first(data, count))
        return count

    def _on_fsync(self, real: Any, fd: int) -> None:
        real(fd)
        if (number := self._number_of(fd)) is not None:
            self._add(FSYNC, self._path(fd), inode=number, site=_site())

    def _on_ftruncate(self, real: Any, fd: int, size: int) -> None:
        real(fd, size)
        if (number := self._number_of(fd)) is not None:
            self._add("truncate", self._path(fd), inode=number, size=size)

    def _on_fchmod(self, real: Any, fd: int, mode: int) -> None:
        real(fd, mode)
        if (number := self._number_of(fd)) is not None:
            self._add("chmod", self._path(fd), inode=number, mode=mode)

    def _on_chmod(self, real: Any, path: Any, mode: int, **keywords: Any) -> None:
        real(path, mode, **keywords)
        place = self._place(path, keywords.get("dir_fd"))
        if place is not None:
            self._add("chmod", self._relative(place), inode=self._numbers[self._identity(place)], mode=mode)

    def _on_mkdir(self, real: Any, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        real(path, mode, dir_fd=dir_fd)
        if (place := self._place(path, dir_fd)) is not None:
            self._add("mkdir", self._relative(place), changes=(self._change(place, self._new(place)),))

    def _on_link(
        self,
        real: Any,
        old: Any,
        new: Any,
        *,
        src_dir_fd: int | None = None,
        dst_dir_fd: int | None = None,
        **rest: Any,
    ) -> None:
        real(old, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd, **rest)
        if (place := self._place(new, dst_dir_fd)) is not None:
            number = self._numbers[self._identity(place)]
            self._add("link", self._relative(place), changes=(self._change(place, number),))

    def _on_unlink(self, real: Any, path: Any, *, dir_fd: int | None = None) -> None:
        self._removed("unlink", real, path, dir_fd)

    _on_remove = _on_unlink

    def _on_rmdir(self, real: Any, path: Any, *, dir_fd: int | None = None) -> None:
        self._removed("rmdir", real, path, dir_fd)

    def _on_rename(self, real: Any, old: Any, new: Any, **directories: Any) -> None:
        places = (
            self._place(old, directories.get("src_dir_fd")),
            self._place(new, directories.get("dst_dir_fd")),
        )
        real(old, new, **directories)
        if places[0] is not None and places[1] is not None:
            self._renamed(places[0], places[1], exchange=False)

    _on_replace = _on_rename

    # -------------------------------------------------------------------------------------------- writing down

    def _removed(self, kind: str, real: Any, path: Any, dir_fd: int | None) -> None:
        place = self._place(path, dir_fd)
        status = os.lstat(place) if place is not None and os.path.lexists(place) else None
        real(path, dir_fd=dir_fd)
        if place is None or status is None:
            return
        self._add(kind, self._relative(place), changes=(self._change(place, None),))
        if kind == "rmdir" or status.st_nlink == 1:
            del self._numbers[status.st_dev, status.st_ino]  # the system may use it again, for something else

    def _renamed(self, old: str, new: str, *, exchange: bool) -> None:
        moved = self._numbers[self._identity(new)]
        left = self._numbers[self._identity(old)] if exchange else None
        changes = (self._change(new, moved), self._change(old, left))
        what = f"{self._relative(old)} -> {self._relative(new)}"
        self._add("exchange" if exchange else "rename", what, changes=changes)

    def _add(self, kind: str, path: str, **what: Any) -> None:
        self.calls.append(f"{kind} {path}" + (f" {len(what['data'])}" if kind == "write" else ""))
        self._note(kind, path, **what)

    def _note(self, kind: str, path: str, **what: Any) -> None:
        self.operations.append(Operation(kind, path, **what))
        self.after_each(len(self._before.operations) + len(self.operations))

    def _new(self, place: str) -> int:
        number = self._numbers[self._identity(place)] = self._next
        self._next += 1
        return number

    def _change(self, place: str, inode: int | None) -> Change:
        above, name = os.path.split(place)
        return Change(self._numbers[self._identity(above)], name, inode)

    def _identity(self, place: str) -> tuple[int, int]:
        status = os.lstat(place)
        return status.st_dev, status.st_ino

    def _number_of(self, fd: int) -> int | None:
        status = os.fstat(fd)
        return self._numbers.get((status.st_dev, status.st_ino))

    def _place(self, path: Any, dir_fd: int | None = None) -> str | None:
        """The whole path, or ``None`` where it lies elsewhere."""
        above = os.getcwd() if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
        place = os.path.normpath(os.path.join(above, os.fsdecode(path)))
        return place if place.startswith(self.area + "/") else None

    def _relative(self, place: str) -> str:
        return os.path.relpath(place, self.area)

    def _path(self, fd: int) -> str:
        return self._relative(os.readlink(f"/proc/self/fd/{fd}"))


def _site() -> str:
    """The function that wants something to be durable: the innermost one that is about something else, too."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        module = str(frame.f_globals.get("__name__", ""))
        if module.startswith("checkpointer.") and frame.f_code.co_name not in _SYNCING:
            return f"{module.removeprefix('checkpointer.')}.{frame.f_code.co_name}"
    return "?"


def _first(data: Any, count: int) -> bytes:
    return bytes(memoryview(data).cast("B")[:count])
