"""Local (and mounted) file systems: real fsync, atomic rename, exchange where the system has it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import secrets
import shutil
import stat
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from checkpointer.errors import CorruptCheckpointError
from checkpointer.format import paths
from checkpointer.storage import mounts
from checkpointer.storage.base import Buffer, Entry, Stamp

PREFETCHED = 128 << 10
"""Bytes that the system is asked to read at a time: of more, Linux reads as far as its readahead is set to."""

LARGE = 1 << 20
"""Bytes. Files from this size on are written past the page cache, by several threads."""

CLOCK_TICK = 50_000_000
"""Nanoseconds. A file can change twice before the clock that its times are from goes on: 10 ms at most on Linux."""

WHOLE_SECOND = 1_000_000_000
"""Nanoseconds. ext4 with small inodes keeps no fractions."""

_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_NON_BLOCK = getattr(os, "O_NONBLOCK", 0)
_DIRECTORY = getattr(os, "O_DIRECTORY", 0)
_CLOEXEC = getattr(os, "O_CLOEXEC", 0)
_BINARY = getattr(os, "O_BINARY", 0)
_NOREPLACE, _EXCHANGE = 1, 2  # renameat2(2)
_SWAP, _EXCLUSIVE = 2, 4  # renamex_np(2) on macOS
_UNLINKABLE = (errno.EPERM, errno.EACCES, errno.EMLINK, errno.EXDEV, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


class LocalStorage:
    """A run root in a directory. ``durable=False`` leaves out every fsync: for throw-away runs only.

    ``threads`` write one large file.
    """

    can_rename = True
    can_append = True
    exclusive = True

    def __init__(self, root: str | os.PathLike[str], *, durable: bool = True, threads: int = 2) -> None:
        self.root = os.path.abspath(os.path.expanduser(os.fspath(root)))
        self.durable = durable
        self.threads = threads
        self._settled: deque[str] = deque(maxlen=64)
        """Directories whose own names are durable; of those forgotten it is made sure once more."""

    @property
    def url(self) -> str:
        return self.root

    @property
    def lock_path(self) -> str | None:
        return self.place(paths.LOCK)

    def place(self, path: str) -> str:
        return os.path.join(self.root, *path.split("/")) if path else self.root

    def redact(self, text: str) -> str:
        return text

    def list_directory(self, path: str) -> list[Entry]:
        try:
            with self._scan(path) as entries:
                return [
                    Entry(entry.name, True, False) if entry.is_dir(follow_symlinks=False) else self._other(path, entry)
                    for entry in entries
                ]
        except NotADirectoryError:
            if not path:  # a run root that has become a file is no empty run
                raise
            return []
        except (FileNotFoundError, CorruptCheckpointError):
            return []

    def _other(self, directory: str, entry: os.DirEntry[str]) -> Entry:
        link = self._target(directory, entry.name) if entry.is_symlink() else None
        return Entry(entry.name, False, entry.is_file(follow_symlinks=False), link)

    def _target(self, directory: str, name: str) -> str:
        """Where a link says that it leads; empty if it has just gone."""
        try:
            return os.readlink(os.path.join(self.place(directory), name))
        except OSError:
            return ""

    def exists(self, path: str) -> bool:
        return os.path.lexists(self.place(path))

    def read(self, path: str, limit: int) -> bytes:
        file = self.open(path)
        try:
            if file.size > limit:
                raise CorruptCheckpointError(f"{self.place(path)} has {file.size} bytes, at most {limit} are read")
            data = bytearray(file.size)
            file.read_into(0, memoryview(data))
            return bytes(data)
        finally:
            file.close()

    def read_many(self, files: Sequence[str], limit: int) -> list[bytes | Exception]:
        results: list[bytes | Exception] = []
        for path in files:
            try:
                results.append(self.read(path, limit))
            except OSError as error:
                results.append(error)
        return results

    def stamps(self, files: Sequence[str]) -> list[Stamp | None]:
        if not self._has_stamps:
            return [None] * len(files)
        now = time.time_ns()
        return [_stamp(f"{self.root}/{path}", now) for path in files]

    @functools.cached_property
    def _has_stamps(self) -> bool:
        return mounts.are_local(self.root)

    def open(self, path: str) -> LocalFile:
        fd = _open_below(self.root, path)
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(fd)
            raise CorruptCheckpointError(f"{self.place(path)} is not a regular file")
        return LocalFile(fd, status.st_size, self.place(path))

    def write(self, path: str, pieces: Iterable[Buffer], size: int, *, steady: bool = False) -> float:
        self.make_directory(path.rpartition("/")[0])
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _CLOEXEC | _NO_FOLLOW | _BINARY
        if size < LARGE or sys.platform == "win32":
            fd = os.open(self.place(path), flags, 0o666)
            write = _write_in_turn
        else:
            from checkpointer.system import direct_io  # numpy's import is for those who write tensors

            fd = direct_io.open_direct(self.place(path), flags)
            write = functools.partial(direct_io.write_blocks, steady=steady, threads=self.threads)
        try:
            written = write(fd, pieces, size)
            if written != size:
                raise AssertionError(f"{path}: {written} bytes given, {size} announced")
            began = time.perf_counter()
            self._sync_fd(fd)
            return time.perf_counter() - began
        finally:
            os.close(fd)

    def link(self, source: str, target: str) -> bool:
        if os.link not in os.supports_dir_fd:
            return False
        self.make_directory(target.rpartition("/")[0])
        with _inside(self.root, source) as (old, parent), _inside(self.root, target) as (new, new_parent):
            fd = os.open(old, os.O_RDONLY | _NO_FOLLOW | _NON_BLOCK | _CLOEXEC, dir_fd=parent)
            try:
                mode = os.fstat(fd).st_mode
                if not stat.S_ISREG(mode):
                    raise CorruptCheckpointError(f"{self.place(source)} is not a regular file")
                os.fchmod(fd, stat.S_IMODE(mode) & ~0o222)  # a tool that edits one of them in place would change all
                os.link(old, new, src_dir_fd=parent, dst_dir_fd=new_parent, follow_symlinks=False)
                self._sync_fd(fd)
            except OSError as error:
                if error.errno not in _UNLINKABLE:
                    raise
                return False
            finally:
                os.close(fd)
        return True

    def append(self, path: str, data: bytes) -> None:
        try:
            self._append(path, data)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(self.place(path)), exist_ok=True)
            self._append(path, data)

    def _append(self, path: str, data: bytes) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | _CLOEXEC | _NO_FOLLOW | _NON_BLOCK | _BINARY
        with _inside(self.root, path) as (name, parent):
            fd = os.open(name, flags, 0o666, dir_fd=parent)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise CorruptCheckpointError(f"{self.place(path)} is not a regular file")
            size = os.lseek(fd, 0, os.SEEK_END)
            try:
                _write_all(fd, memoryview(data))
            except BaseException:
                os.ftruncate(fd, size)
                raise
        finally:
            os.close(fd)

    def put(self, path: str, data: bytes) -> None:
        with self._beside(path, data) as temporary:
            os.replace(temporary, self.place(path))
        self.sync(path.rpartition("/")[0])

    def create(self, path: str, data: bytes) -> None:
        with self._beside(path, data) as temporary:
            rename_exclusively(temporary, self.place(path))
        self.sync(path.rpartition("/")[0])

    def replace(self, path: str, data: bytes, expected: bytes) -> None:
        if self.read(path, len(expected)) != expected:
            raise FileExistsError(errno.EEXIST, "changed by somebody else", self.place(path))
        self.put(path, data)

    def remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError), _inside(self.root, path) as (name, parent):
            os.unlink(name, dir_fd=parent)

    def remove_directory(self, path: str) -> bool:
        try:
            with _inside(self.root, path) as (name, parent):
                os.rmdir(name, dir_fd=parent)
        except FileNotFoundError:
            return True
        except CorruptCheckpointError:
            return False
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                return False
            raise
        return True

    def make_directory(self, path: str) -> None:
        missing = []
        directory = self.place(path)
        while not os.path.isdir(directory):
            missing.append(directory)
            directory = os.path.dirname(directory)
        self._settle(directory)
        for directory in reversed(missing):
            with contextlib.suppress(FileExistsError):
                os.mkdir(directory)
            try:
                self._sync_path(os.path.dirname(directory))
            except OSError:
                with contextlib.suppress(OSError):  # the first error counts
                    os.rmdir(directory)  # or the next call would find it, and take its name for durable
                raise
            self._settled.append(directory)

    def rename(self, old: str, new: str) -> None:
        rename_exclusively(self.place(old), self.place(new))

    def exchange(self, a: str, b: str) -> bool:
        return _exchange(self.place(a), self.place(b))

    def sync(self, *directories: str) -> None:
        for directory in directories:
            self._sync_path(self.place(directory))

    def obstacle(self, path: str) -> str | None:
        from checkpointer.storage.obstacles import obstacle  # for those alone who meet one

        return obstacle(self.place(path))

    def free_bytes(self) -> int | None:
        directory = Path(self.root)
        while not directory.exists():
            directory = directory.parent
        return shutil.disk_usage(directory).free

    def identity(self, path: str) -> str | None:
        try:
            status = os.lstat(self.place(path))
        except OSError:
            return None
        return f"{status.st_dev:x}-{status.st_ino:x}" if stat.S_ISREG(status.st_mode) and status.st_ino else None

    def age(self, path: str) -> float | None:
        try:
            return time.time() - os.lstat(self.place(path)).st_mtime
        except (FileNotFoundError, NotADirectoryError):
            return None

    @contextlib.contextmanager
    def _scan(self, path: str) -> Iterator[Iterator[os.DirEntry[str]]]:
        """The entries of a directory that is reached through no symbolic link."""
        if not path or os.scandir not in os.supports_fd:
            with os.scandir(self.place(path)) as entries:
                yield entries
            return
        with _inside(self.root, path) as (name, parent):
            fd = os.open(name, os.O_RDONLY | _DIRECTORY | _NO_FOLLOW | _CLOEXEC, dir_fd=parent)
            try:
                with os.scandir(fd) as entries:
                    yield entries
            finally:
                os.close(fd)

    @contextlib.contextmanager
    def _beside(self, path: str, data: bytes) -> Iterator[str]:
        """A durable file with ``data`` next to ``path``, for renaming; removed if that fails."""
        parent, _, name = path.rpartition("/")
        temporary = f"{parent}/.{name}.{secrets.token_hex(8)}" if parent else f".{name}.{secrets.token_hex(8)}"
        try:
            self.write(temporary, [data], len(data))
            yield self.place(temporary)
        except BaseException:
            self.remove(temporary)
            raise

    def _settle(self, directory: str) -> None:
        """Make the name of a directory durable that is there: a process may have made it and died before it did that.

        Those above need no such care: whoever made this one had made their names durable before.
        """
        if directory not in self._settled:
            with contextlib.suppress(PermissionError):  # above the root: then it was no such process that made it
                self._sync_path(os.path.dirname(directory))
            self._settled.append(directory)

    def _sync_path(self, directory: str) -> None:
        if not self.durable or sys.platform == "win32":  # Windows cannot open a directory; NTFS journals names
            return
        fd = os.open(directory, os.O_RDONLY | _DIRECTORY | _CLOEXEC)
        try:
            self._sync_fd(fd)
        finally:
            os.close(fd)

    def _sync_fd(self, fd: int) -> None:
        """Once: after a failed fsync the kernel has dropped the pages, and a second one would lie."""
        if not self.durable:
            return
        if sys.platform == "darwin":
            import fcntl  # macOS: fsync alone leaves the data in the drive's cache

            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
        else:
            os.fsync(fd)


class LocalFile:
    """A file opened for reading; ``read_into`` uses positions of its own, so threads may share it."""

    def __init__(self, fd: int, size: int, place: str) -> None:
        self._fd = fd
        self.size = size
        self._place = place
        self._advise(0, 0, "POSIX_FADV_SEQUENTIAL")

    def read_into(self, offset: int, view: memoryview) -> None:
        position = 0
        while position < len(view):
            count = os.preadv(self._fd, [view[position:]], offset + position)
            if count == 0:
                raise CorruptCheckpointError(f"{self._place} ends at byte {offset + position}, more was expected")
            position += count

    def read_many(self, offset: int, views: Sequence[memoryview]) -> None:
        count = os.preadv(self._fd, views, offset)
        for view in views:
            if count < len(view):  # interrupted, or the end of the file
                self.read_into(offset + max(count, 0), view[max(count, 0) :])
            offset += len(view)
            count -= len(view)

    def prefetch(self, offset: int, size: int) -> None:
        for start in range(offset, offset + size, PREFETCHED):
            self._advise(start, min(PREFETCHED, offset + size - start), "POSIX_FADV_WILLNEED")

    def _advise(self, offset: int, size: int, name: str) -> None:
        """A hint; where there is none, or the file system knows it not, reading is only slower."""
        advice = getattr(os, name, None)
        if advice is not None:
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._fd, offset, size, advice)

    def close(self) -> None:
        os.close(self._fd)


def _stamp(place: str, now: int) -> Stamp | None:
    """Of a regular file that did not change just before ``now``, in nanoseconds since 1970.

    Nobody can set ``st_ctime``: it is when anything about the file was changed last, its rights and ``st_mtime`` too.
    """
    try:
        status = os.lstat(place)
    except OSError:  # whoever reads the file learns why
        return None
    changed, modified = status.st_ctime_ns, status.st_mtime_ns
    latest = now - (CLOCK_TICK if changed % WHOLE_SECOND else 2 * WHOLE_SECOND)
    if changed > latest or modified > latest or not stat.S_ISREG(status.st_mode):
        return None
    return status.st_dev, status.st_ino, status.st_size, modified, changed


def _open_below(root: str, path: str) -> int:
    """Open ``path`` for reading without following a symbolic link in any part of it below ``root``."""
    with _inside(root, path) as (name, parent):
        return os.open(name, os.O_RDONLY | _NO_FOLLOW | _NON_BLOCK | _CLOEXEC | _BINARY, dir_fd=parent)


@contextlib.contextmanager
def _inside(root: str, path: str) -> Iterator[tuple[str, int | None]]:
    """The last part of ``path`` and an open descriptor of its directory, reached through no symbolic link.

    Where the system cannot work relative to a descriptor: the whole path and ``None``.

    Raises:
        CorruptCheckpointError: a part below ``root`` is no directory, or what the caller does meets a link.
    """
    place = os.path.join(root, *path.split("/"))
    if os.open not in os.supports_dir_fd:
        yield place, None
        return
    *parents, name = path.split("/")
    directory = os.open(root, os.O_RDONLY | _DIRECTORY | _CLOEXEC)
    try:
        for part in parents:
            inner = os.open(part, os.O_RDONLY | _DIRECTORY | _NO_FOLLOW | _CLOEXEC, dir_fd=directory)
            os.close(directory)
            directory = inner
        yield name, directory
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.EMLINK):
            raise CorruptCheckpointError(f"{place} is, or lies behind, something other than a plain file") from error
        error.filename = place
        raise
    finally:
        os.close(directory)


def _write_in_turn(fd: int, pieces: Iterable[Buffer], size: int) -> int:  # noqa: ARG001  as for large files
    return sum(_write_all(fd, memoryview(piece).cast("B")) for piece in pieces)


def _write_all(fd: int, view: memoryview) -> int:
    position = 0
    while position < len(view):
        position += os.write(fd, view[position:])
    return position


def rename_exclusively(old: str, new: str) -> None:
    """Rename ``old`` to ``new``, which must not exist: plain rename(2) would replace a file or an empty directory."""
    if _flagged_rename(old, new, _NOREPLACE, _EXCLUSIVE):
        return
    if os.path.lexists(new):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new)
    os.rename(old, new)


def _exchange(a: str, b: str) -> bool:
    return _flagged_rename(a, b, _EXCHANGE, _SWAP)


def _flagged_rename(old: str, new: str, linux_flag: int, macos_flag: int) -> bool:
    """Whether the system carried the special rename out; ``False`` where it does not know it."""
    call = _special_rename()
    if call is None:
        return False
    if call(os.fsencode(old), os.fsencode(new), macos_flag if sys.platform == "darwin" else linux_flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), old, None, new)


@functools.cache
def _special_rename() -> Callable[[bytes, bytes, int], int] | None:
    """The C library's rename with flags, or ``None``."""
    if sys.platform == "win32":
        return None
    library: Any = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "darwin":
        function = getattr(library, "renamex_np", None)
        return None if function is None else lambda old, new, flag: int(function(old, new, flag))
    function = getattr(library, "renameat2", None)
    at_cwd = -100
    return None if function is None else lambda old, new, flag: int(function(at_cwd, old, at_cwd, new, flag))
