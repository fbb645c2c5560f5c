"""Any fsspec file system: no rename, no lock; a commit is one small put of the manifest."""

from __future__ import annotations

import contextlib
import errno
import functools
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, ParamSpec, TypeVar

from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem

from checkpointer.errors import CheckpointerError, CorruptCheckpointError
from checkpointer.format import paths
from checkpointer.storage.base import Buffer, Entry, Stamp, blocks
from checkpointer.storage.redact import Redactor, without_credentials

READ_BLOCK = 16 << 20
"""Bytes asked for in one request at most."""


_BUCKETS = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss", "cos", "obs", "tos", "r2"})


_COPYING = frozenset({"s3", "s3a", "gs", "gcs", "memory"})
"""Where ``cp_file`` copies in the store and is done when it returns. Elsewhere the bytes may pass through this process
(arrow), or the copy may go on in the background (azure)."""


_MODIFIED_FIELDS = ("LastModified", "last_modified", "mtime", "updated", "created")


_NUMBERS = {
    FileNotFoundError: errno.ENOENT,
    FileExistsError: errno.EEXIST,
    IsADirectoryError: errno.EISDIR,
    NotADirectoryError: errno.ENOTDIR,
    PermissionError: errno.EACCES,
}


P = ParamSpec("P")


R = TypeVar("R")


E = TypeVar("E", bound=Exception)


def _numbered(error: E) -> E:
    """The error with its ``errno``: most file systems raise one that has only a text."""
    if isinstance(error, OSError) and error.errno is None:
        error.errno = next((number for kind, number in _NUMBERS.items() if isinstance(error, kind)), None)
    return error


def _as_os_errors(function: Callable[P, R]) -> Callable[P, R]:
    """File systems raise their libraries' own exceptions; callers of a storage handle OSError, by its number too."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except OSError as error:
            _numbered(error)
            raise
        except (CheckpointerError, AssertionError):
            raise
        except Exception as error:
            storage: Any = args[0]
            raise _as_os_error(storage, error) from error

    return wrapped


def _as_os_error(storage: FsspecStorage, error: Exception) -> OSError:
    """A library's own exception; before Python 3.11 a time-out is one, too."""
    return OSError(storage.redact(f"{type(error).__name__} from {storage.url}: {error}"))


class FsspecStorage:
    """A run root on ``fs`` below ``path``; ``url`` and ``options`` are what the user gave to open it."""

    can_rename = False
    can_append = False
    lock_path = None

    def __init__(self, fs: AbstractFileSystem, path: str, url: str, options: Mapping[str, object]) -> None:
        self.fs = fs
        self._path = path.rstrip("/")
        self._redactor = Redactor(url, options)
        self._url = without_credentials(url).rstrip("/")
        self._exclusive: bool | None = None

    @property
    def url(self) -> str:
        return self._url

    def place(self, path: str) -> str:
        return f"{self._url}/{path}" if path else self._url

    def redact(self, text: str) -> str:
        return self._redactor.redact(text)

    @_as_os_errors
    def list_directory(self, path: str) -> list[Entry]:
        full = self._full(path)
        self.fs.invalidate_cache(full)
        try:
            found = self.fs.ls(full, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        entries = []
        for item in found:
            inner = item["name"].rstrip("/").rpartition(full.strip("/") + "/")[2]
            if inner and "/" not in inner:
                entries.append(Entry(inner, item["type"] == "directory", item["type"] == "file"))
        return entries

    @_as_os_errors
    def exists(self, path: str) -> bool:
        self.fs.invalidate_cache(self._full(path))
        return bool(self.fs.exists(self._full(path)))

    @_as_os_errors
    def read(self, path: str, limit: int) -> bytes:
        self.fs.invalidate_cache(self._full(path))
        try:
            data = self.fs.cat_file(self._full(path), start=0, end=limit + 1)
        except OSError as error:
            data = self._empty(path, error)
        return self._within(path, data, limit)

    @_as_os_errors
    def read_many(self, files: Sequence[str], limit: int) -> list[bytes | Exception]:
        full = [self._full(path) for path in files]
        self.fs.invalidate_cache()
        found = self.fs.cat_ranges(full, [0] * len(full), [limit + 1] * len(full), on_error="return")
        results: list[bytes | Exception] = []
        for path, data in zip(files, found, strict=True):
            try:
                whole = self._empty(path, data) if isinstance(data, Exception) else data
                results.append(self._within(path, whole, limit))
            except (OSError, CheckpointerError) as error:
                results.append(_numbered(error))
            except Exception as error:  # noqa: BLE001 - it takes the place of the result
                results.append(_as_os_error(self, error))
        return results

    def stamps(self, paths: Sequence[str]) -> list[Stamp | None]:
        """None at all: to ask whether an object is still the same takes a request, as reading a small one does."""
        return [None] * len(paths)

    @_as_os_errors
    def open(self, path: str) -> RemoteFile:
        self.fs.invalidate_cache(self._full(path))
        try:
            details = self.fs.info(self._full(path))
        except NotADirectoryError as error:
            raise self._no_file(path) from error
        if details["type"] != "file":
            raise self._no_file(path)
        return RemoteFile(self, self._full(path), int(details["size"]), self.place(path))

    @_as_os_errors
    def write(self, path: str, pieces: Iterable[Buffer], size: int, *, steady: bool = False) -> float:  # noqa: ARG002
        file = self._open_for_writing(path)
        try:
            written = 0
            for piece in pieces:
                for block in blocks(memoryview(piece).cast("B"), READ_BLOCK):
                    written += len(block)
                    file.write(block)
            if written != size:
                raise AssertionError(f"{path}: {written} bytes given, {size} announced")
        except BaseException:
            with contextlib.suppress(Exception):  # the first error counts; what was uploaded is referenced by nothing
                file.discard()
            with contextlib.suppress(AttributeError):  # in memory it is written already
                file.closed = True  # or its finalizer would complete the upload
            raise
        began = time.perf_counter()
        file.close()
        return time.perf_counter() - began

    @_as_os_errors
    def link(self, source: str, target: str) -> bool:
        if _COPYING.isdisjoint(_protocols(self.fs)):
            return False
        self.open(source)  # raises where it is missing, or no file
        try:
            self.fs.cp_file(self._full(source), self._full(target))
        except (PermissionError, NotImplementedError):
            return False
        self.fs.invalidate_cache(self._full(target))
        return True

    def append(self, path: str, data: bytes) -> None:  # noqa: ARG002  the seam names them
        raise AssertionError("no file grows here: can_append is False")

    @_as_os_errors
    def put(self, path: str, data: bytes) -> None:
        self._pipe(path, data)

    @_as_os_errors
    def create(self, path: str, data: bytes) -> None:
        if not self.exclusive:
            if self.exists(path):
                raise FileExistsError(self.place(path))
            return self._pipe(path, data)
        with _lost_races_as_file_exists(self.place(path)):
            self._pipe(path, data, mode="create")
        return None

    @_as_os_errors
    def replace(self, path: str, data: bytes, expected: bytes) -> None:
        self.fs.invalidate_cache(self._full(path))
        etag = self.fs.info(self._full(path)).get("ETag")
        if self.read(path, len(expected)) != expected:
            raise FileExistsError(f"{self.place(path)} was changed by somebody else")
        if etag and "s3" in _protocols(self.fs):
            with _lost_races_as_file_exists(self.place(path)):
                return self._pipe(path, data, IfMatch=etag)
        return self._pipe(path, data)

    @property
    def exclusive(self) -> bool:
        if self._exclusive is None:
            self._exclusive = self._probe_exclusive()
        return self._exclusive

    @_as_os_errors
    def remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            self.fs.rm_file(self._full(path))
        self.fs.invalidate_cache(self._full(path))

    @_as_os_errors
    def remove_directory(self, path: str) -> bool:
        if self.list_directory(path):
            return False
        with contextlib.suppress(OSError, NotImplementedError, ValueError):  # where directories do not really exist
            self.fs.rmdir(self._full(path))
        return True

    def make_directory(self, path: str) -> None:
        """Directories come into being with their files."""

    def rename(self, old: str, new: str) -> None:  # noqa: ARG002  the seam names them
        raise AssertionError("no atomic rename here: can_rename is False")

    def exchange(self, a: str, b: str) -> bool:  # noqa: ARG002  the seam names them
        raise AssertionError("no atomic exchange here: can_rename is False")

    def sync(self, *directories: str) -> None:
        """A finished put is durable."""

    def obstacle(self, path: str) -> str | None:  # noqa: ARG002  only trying tells
        return None

    def free_bytes(self) -> int | None:
        return None

    def identity(self, path: str) -> str | None:  # noqa: ARG002  an object has no second name
        return None

    @_as_os_errors
    def age(self, path: str) -> float | None:
        self.fs.invalidate_cache(self._full(path))
        try:
            details = self.fs.info(self._full(path))
        except (FileNotFoundError, NotADirectoryError):
            return None
        for name in _MODIFIED_FIELDS:
            modified = details.get(name)
            if isinstance(modified, datetime):
                return time.time() - modified.timestamp()
            if isinstance(modified, (int, float)):
                return time.time() - modified
        return None

    def _full(self, path: str) -> str:
        return f"{self._path}/{path}" if path else self._path

    def _empty(self, path: str, error: Exception) -> bytes:
        """Nothing, where ``error`` only says that a file without bytes has no range of bytes; else raises it.

        Raises CorruptCheckpointError where there is a directory, or a file in the place of one: as on a local disk.
        """
        if isinstance(error, (IsADirectoryError, NotADirectoryError)):
            raise self._no_file(path) from error
        if isinstance(error, OSError) and error.errno == errno.EINVAL and self.fs.info(self._full(path))["size"] == 0:
            return b""
        raise error

    def _no_file(self, path: str) -> CorruptCheckpointError:
        return CorruptCheckpointError(f"{self.place(path)} is, or lies behind, something other than a plain file")

    def _within(self, path: str, data: bytes, limit: int) -> bytes:
        if len(data) > limit:
            raise CorruptCheckpointError(f"{self.place(path)} is larger than {limit} bytes")
        return data

    def _pipe(self, path: str, data: bytes, **options: Any) -> None:
        try:
            self.fs.pipe_file(self._full(path), data, **options)
        except FileNotFoundError:
            self._make_parents(path)
            self.fs.pipe_file(self._full(path), data, **options)
        self.fs.invalidate_cache(self._full(path))

    def _open_for_writing(self, path: str) -> Any:
        try:
            return self.fs.open(self._full(path), "wb")
        except FileNotFoundError:
            self._make_parents(path)
            return self.fs.open(self._full(path), "wb")

    def _make_parents(self, path: str) -> None:
        """For file systems with real directories. In an object store this would create a bucket: a mistyped one."""
        if not _BUCKETS.isdisjoint(_protocols(self.fs)):
            raise FileNotFoundError(f"cannot write {self.place(path)}: no such bucket or container")
        self.fs.makedirs(self._full(path).rpartition("/")[0], exist_ok=True)

    def _probe_exclusive(self) -> bool:
        """Create the same key twice. Some servers ignore the condition; some clients only look before they write."""
        if not _creates_natively(self.fs):
            return False
        path = f"{paths.TMP}/probe-{secrets.token_hex(8)}"
        try:
            self._pipe(path, b"1", mode="create")
            try:
                with _lost_races_as_file_exists(path):
                    self._pipe(path, b"2", mode="create")
            except FileExistsError:
                return True
            return False
        except (TypeError, NotImplementedError, ValueError):  # the mode is not known
            return False
        finally:
            self.remove(path)


class RemoteFile:
    """A file of known size that is read in ranges."""

    def __init__(self, storage: FsspecStorage, path: str, size: int, place: str) -> None:
        self._storage = storage
        self._path = path
        self._place = place
        self.size = size

    def read_into(self, offset: int, view: memoryview) -> None:
        for start in range(0, len(view), READ_BLOCK):
            part = view[start : start + READ_BLOCK]
            data = self._fetch(offset + start, offset + start + len(part))
            if len(data) != len(part):
                raise CorruptCheckpointError(f"{self._place} ends before byte {offset + start + len(part)}")
            part[:] = data

    def read_many(self, offset: int, views: Sequence[memoryview]) -> None:
        whole = memoryview(bytearray(sum(map(len, views))))
        self.read_into(offset, whole)
        position = 0
        for view in views:
            view[:] = whole[position : position + len(view)]
            position += len(view)

    def prefetch(self, offset: int, size: int) -> None:
        """Nothing reads ahead."""

    def close(self) -> None:
        """Nothing is held open between reads."""

    def _fetch(self, begin: int, end: int) -> bytes:
        read: Callable[[FsspecStorage], bytes] = _as_os_errors(
            lambda storage: storage.fs.cat_file(self._path, start=begin, end=end)
        )
        return read(self._storage)


def _protocols(fs: AbstractFileSystem) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _creates_natively(fs: AbstractFileSystem) -> bool:
    """Whether the client implements exclusive creation itself: fsspec's own default looks first and then writes."""
    if isinstance(fs, AsyncFileSystem):
        return type(fs)._pipe_file is not AsyncFileSystem._pipe_file  # noqa: SLF001  the seam for implementers
    return type(fs).pipe_file is not AbstractFileSystem.pipe_file


@contextlib.contextmanager
def _lost_races_as_file_exists(place: str) -> Iterator[None]:
    """Servers word it differently: radosgw's answer reaches us as a bare OSError(22)."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        response = getattr(error.__cause__, "response", None) or {}
        code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
        if code in ("PreconditionFailed", "ConditionalRequestConflict", "412", "409"):
            raise FileExistsError(f"{place} exists: another writer was first") from error
        raise
