"""Storages that fail on command: what does a training loop do when the disk is full, or the network hangs?

```python
from checkpointer import CheckpointManager
from checkpointer.testing import Fault, faulty


def test_a_full_disk_does_not_stop_training(tmp_path):
    fault = Fault("ENOSPC", on=["write"], at=2, forever=True)      # the second file, and each one after it
    with faulty(fault):
        mgr = CheckpointManager(tmp_path, model=model)
    with mgr:
        with pytest.raises(SaveError):
            mgr.save(1).result()
        fault.end()                                                # there is room again
        mgr.save(2).result()
    assert fault.operations                                        # what the manager asked of its storage
```

The storage below is a real one. An operation that is not to fail is carried out by it, and so are all that it uses in
turn: a ``put`` on a local disk writes a file beside its target first, and each step of that can fail by itself.
"""

from __future__ import annotations

import copy
import errno
import fnmatch
import functools
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, get_args

from checkpointer.errors import ConfigError
from checkpointer.storage import Buffer, Storage, blocks, wrapping

Kind: TypeAlias = Literal[
    "EIO", "ENOSPC", "EACCES", "EMFILE", "short write", "close", "fsync", "slow", "hang", "vanished", "stale listing"
]  # fmt: skip
"""What can go wrong; see :class:`Fault`."""

OPERATIONS = (
    "list_directory", "exists", "read", "read_many", "open", "write", "append", "link", "put", "create", "replace",
    "remove", "remove_directory", "make_directory", "rename", "exchange", "sync", "stamps", "age", "identity",
    "free_bytes",
    "read_into",
)  # fmt: skip
"""Every operation of a :class:`~checkpointer.storage.Storage` that asks the file system for something; ``read_into`` is
all reading from an open file."""

_SUBJECT_TO: dict[str, tuple[str, ...]] = {
    "short write": ("write",),
    "close": ("write",),
    "fsync": ("write", "link", "make_directory", "sync"),
    "vanished": ("exists", "read", "read_many", "open", "link", "age"),
    "stale listing": ("list_directory",),
}
"""The operations that a kind of fault can happen to; all of them where none are named."""

_BLOCK = 1 << 16
"""Bytes between two looks at the clock while a slow file is written."""


class Fault:
    """One thing that goes wrong with a storage: once, or from then on.

    =============== =================================================================================================
    kind            what happens
    =============== =================================================================================================
    EIO, ENOSPC,    the operation raises ``OSError`` with this errno, and has done nothing; with ``after``, it has
    EACCES, EMFILE  been carried out, and only its answer is lost
    short write     half of a file is written, then the disk is full
    close           a file is written, and closing it raises EIO
    fsync           making it durable raises EIO, once; the bytes of a file are lost, as the kernel drops them, and
                    whoever asked again would be told that all is well
    slow            it takes ``seconds`` longer; a file, so much for each 64 KiB
    hang            it takes until ``release`` is called
    vanished        a file is not there, though it was listed, and is there again the next time
    stale listing   a directory is listed as it was when it was listed first
    =============== =================================================================================================
    """

    def __init__(
        self,
        kind: Kind = "EIO",
        *,
        at: int = 1,
        forever: bool = False,
        after: bool = False,
        on: Collection[str] = OPERATIONS,
        path: str = "*",
        instead: Callable[[], object] | None = None,
        seconds: float = 0.05,
    ) -> None:
        """Describe the fault; :func:`faulty` lets it happen.

        Args:
            kind: what goes wrong.
            at: the operation that it happens to, counted from 1 among those that it can happen to.
            forever: it happens to each one from then on, until ``end``.
            after: an error comes once the operation has been carried out.
            on: the operations that count; see :data:`OPERATIONS`.
            path: only those whose path (for a rename, the old one) matches this pattern count.
            instead: called in place of the first failure; then the operation goes on. For a test that kills the
                process there, or lets another one act in between.
            seconds: of ``slow``.

        Raises:
            ConfigError: there is no such kind or operation.
        """
        if kind not in get_args(Kind):
            raise ConfigError(f"no kind of fault is called {kind!r}; there are {', '.join(get_args(Kind))}")
        if unknown := set(on) - set(OPERATIONS):
            known = ", ".join(OPERATIONS)
            raise ConfigError(f"no operation of a storage is called {min(unknown)!r}; there are {known}")
        self.kind = kind
        self.operations: list[str] = []
        """What was asked of the storage and counted, in words, in order."""
        self.hits = 0
        """How often it has happened."""
        self._at = at
        self._forever = forever
        self._after = after
        self._on = frozenset(on) & frozenset(_SUBJECT_TO.get(kind, OPERATIONS))
        self._path = path
        self._instead = instead
        self._seconds = seconds
        self._ended = False
        self._guard = threading.Lock()
        self._waiting = threading.Event()
        self._released = threading.Event()
        self._listed: dict[str, list[Any]] = {}

    @property
    def reached(self) -> bool:
        """Whether there were that many operations."""
        return len(self.operations) >= self._at

    def end(self) -> None:
        """The cause is gone: nothing fails any more, and what hangs goes on."""
        self._ended = True
        self._released.set()

    def restart(self) -> None:
        """Count from here on, as if nothing had been asked or had happened yet."""
        self.operations.clear()
        self.hits = 0
        self._released.clear()
        self._ended = False

    def release(self) -> None:
        """Let what hangs go on."""
        self._released.set()

    def hanging(self, timeout: float | None = None) -> bool:
        """Wait, at most ``timeout`` seconds, until an operation hangs; whether one does."""
        return self._waiting.wait(timeout)

    def call(self, name: str, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        """Carry out one operation of a storage, or fail."""
        operation = functools.partial(function, *arguments, **keywords)
        if not self._counts(name, arguments):
            return self._watched(arguments[0], operation()) if name == "open" else operation()
        if not self._happens(name, arguments):
            result = operation()
            if name == "list_directory":
                self._listed.setdefault(arguments[0], result)
            return self._watched(arguments[0], result) if name == "open" else result
        if self.kind in ("short write", "close", "slow") and name == "write":
            path, pieces, *rest = arguments
            return function(path, self._failing_pieces(pieces, *rest, **keywords), *rest, **keywords)
        return self._fail(name, operation, arguments)

    def _watched(self, path: str, file: Any) -> Any:
        """An open file, reading from which is an operation, too."""
        for name in ("read_into", "read_many"):
            setattr(file, name, functools.partial(self._read, path, getattr(file, name)))
        return file

    def _read(self, path: str, function: Callable[..., None], *arguments: Any) -> None:
        self.call("read_into", lambda _: function(*arguments), path)

    def _counts(self, name: str, arguments: tuple[Any, ...]) -> bool:
        paths = arguments[0] if arguments else ""
        given = [paths] if isinstance(paths, str) else paths
        return name in self._on and (self._path == "*" or any(fnmatch.fnmatch(path, self._path) for path in given))

    def _happens(self, name: str, arguments: tuple[Any, ...]) -> bool:
        """Count an operation; whether it is the turn of this one."""
        with self._guard:
            self.operations.append(f"{name}({', '.join(item for item in arguments if isinstance(item, str))})")
            count = len(self.operations)
            if self._ended or count < self._at or (count > self._at and not self._forever):
                return False
            instead, self._instead = self._instead, None
            self.hits += instead is None
        if instead is not None:
            instead()
        return instead is None

    def _fail(self, name: str, operation: Callable[[], Any], arguments: tuple[Any, ...]) -> Any:
        if self.kind == "slow":
            time.sleep(self._seconds)
            return operation()
        if self.kind == "hang":
            self._waiting.set()
            self._released.wait()
            return operation()
        if self.kind == "stale listing":
            return self._listed.setdefault(arguments[0], operation())
        if self.kind == "vanished":
            return _missing(name, arguments[0])
        if self.kind == "fsync":
            operation()
            raise _error("EIO")
        if self._after:
            result = operation()
            if name == "open":
                result.close()
        raise _error(self.kind)

    def _failing_pieces(self, pieces: Iterable[Buffer], size: int, **_: Any) -> Iterator[Buffer]:
        """What a file is made of, up to where it fails."""
        if self.kind == "slow":
            for piece in pieces:
                for block in blocks(memoryview(piece).cast("B"), _BLOCK):
                    time.sleep(self._seconds)
                    yield block
            return
        left = size // 2 if self.kind == "short write" else size
        for piece in pieces:
            view = memoryview(piece).cast("B")
            yield view[:left]
            left -= min(left, len(view))
            if not left and self.kind == "short write":
                break
        raise _error("ENOSPC" if self.kind == "short write" else "EIO")


def faulty_storage(storage: Storage, fault: Fault) -> Storage:
    """A copy of ``storage`` whose operations obey ``fault``, those that it uses itself too."""
    made = copy.copy(storage)
    for name in (name for name in OPERATIONS if name != "read_into"):
        operation = functools.partial(fault.call, name, getattr(made, name))
        setattr(made, name, operation)
    if fault.kind == "fsync":
        _lose_unsynced(made, storage)
    return made


@contextmanager
def faulty(fault: Fault) -> Iterator[Fault]:
    """Managers that this thread makes inside use storages that obey ``fault``, for as long as they live."""
    with wrapping(lambda storage: faulty_storage(storage, fault)):
        yield fault


def _lose_unsynced(made: Storage, real: Storage) -> None:
    """Let a file that could not be made durable hold zeros: the kernel has dropped what it could not write."""
    write = made.write

    def writing(path: str, pieces: Iterable[Buffer], size: int, *, steady: bool = False) -> float:
        try:
            return write(path, pieces, size, steady=steady)
        except OSError:
            if real.exists(path):
                real.remove(path)
                real.write(path, [bytes(size)], size)
            raise

    setattr(made, "write", writing)  # noqa: B010 - a type checker knows better what it is


def _missing(name: str, path: Any) -> Any:
    """The answer to a question about a file that is not there."""
    if name == "exists":
        return False
    if name == "age":
        return None
    if name == "read_many":
        return [FileNotFoundError(errno.ENOENT, "injected fault", item) for item in path]
    raise FileNotFoundError(errno.ENOENT, "injected fault", path)


def _error(name: str) -> OSError:
    return OSError(getattr(errno, name), f"injected fault: {name}")
