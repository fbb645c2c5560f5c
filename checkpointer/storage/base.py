"""What a run root needs of a file system. Everything that touches disk or network is behind this seam.

It is private: whoever wants checkpoints on another file system writes one for fsspec, and gives its URL. What is
promised here is tested by :class:`checkpointer.testing.StorageContract`, which our storages run, and anybody can.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol, TypeAlias

from checkpointer.errors import CheckpointerError, UnreadableCheckpointError

Buffer: TypeAlias = "bytes | bytearray | memoryview"

Stamp: TypeAlias = tuple[int, ...]
"""What tells a file from any other, and from itself before it was changed; see :meth:`Storage.stamps`."""

_REFUSALS = frozenset(
    getattr(errno, name)
    for name in (
        *("EACCES", "EPERM", "EIO", "ESTALE", "ELOOP", "EISDIR", "ENOTDIR", "ENXIO", "ENODEV", "EREMOTEIO", "ENODATA"),
        *("ENOKEY", "EKEYEXPIRED", "EKEYREVOKED", "EUCLEAN", "EBADMSG", "ESHUTDOWN"),
    )
    if hasattr(errno, name)  # not every system has each
)


def blocks(view: memoryview, size: int) -> Iterator[memoryview]:
    """``view`` cut into pieces of at most ``size`` bytes."""
    return (view[start : start + size] for start in range(0, len(view), size))


class Entry(NamedTuple):
    """One name in a directory. Symbolic links and other special files are neither file nor directory."""

    name: str
    is_dir: bool
    is_file: bool
    link: str | None = None
    """Where a symbolic link says that it leads; ``None`` for what is none."""


class ReadFile(Protocol):
    """An open file of known size."""

    size: int

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` (contiguous, unsigned bytes) from byte ``offset`` on.

        MUST be safe to call from several threads. Raises CorruptCheckpointError where the file ends too early.
        """

    def read_many(self, offset: int, views: Sequence[memoryview]) -> None:
        """Fill ``views``, 256 at most, one after the other from byte ``offset`` on; else as ``read_into``."""

    def prefetch(self, offset: int, size: int) -> None:
        """A hint that these bytes will be read."""

    def close(self) -> None: ...


class Storage(Protocol):
    """One run root. Every path is relative to it, with ``/`` between its parts; ``""`` is the root itself.

    Every storage MUST keep this contract:

    - What is read is what was written, by whatever client: no question is answered from a cache.
    - ``list_directory`` is complete and of one level; of what does not exist, or is a file, it is empty.
    - Reads never follow a symbolic link below the root, and never block on a special file.
    - When ``write``, ``put`` or ``sync`` returns, the bytes (for ``sync``: the names) survive a power cut. What cannot
      be written raises; nothing is lost in silence.
    - A missing file raises FileNotFoundError, an existing one FileExistsError, both with their ``errno``. Every other
      failure is another OSError.
    - Every name is a name, whatever it means in a URL, a shell or a pattern.
    - Any method may be called by several threads.

    What only some can do is declared (``can_rename``, ``can_append``, ``exclusive``, ``lock_path``), or answered by the
    call (``link``, ``exchange``); what a storage has not declared it refuses, and changes nothing.
    """

    @property
    def url(self) -> str:
        """The root for humans and manifests: credentials removed."""

    @property
    def can_rename(self) -> bool:
        """Whether a directory can be renamed atomically. If so a commit is a rename, else one small ``put``."""

    @property
    def can_append(self) -> bool:
        """Whether a file can grow."""

    @property
    def lock_path(self) -> str | None:
        """Local path of the file that an OS lock protects this root with; ``None`` where there can be none."""

    def place(self, path: str) -> str:
        """``path`` for humans: a local path or a URL without credentials."""

    def redact(self, text: str) -> str:
        """``text`` without the secrets that this storage was opened with."""

    def list_directory(self, path: str) -> list[Entry]: ...

    def exists(self, path: str) -> bool: ...

    def read(self, path: str, limit: int) -> bytes:
        """A whole file. Raises CorruptCheckpointError if it is larger than ``limit`` bytes or not a regular file."""

    def read_many(self, paths: Sequence[str], limit: int) -> list[bytes | Exception]:
        """``read`` for each path, concurrently where that helps; an error takes the place of its result."""

    def stamps(self, paths: Sequence[str]) -> list[Stamp | None]:
        """For each file something that is another one as soon as its bytes, or who may read it, may be others.

        So a file that has the stamp it had before, and after, it was read need not be read again: by this process, or,
        where ``lock_path`` is given, by one that is started tomorrow. ``None`` where that cannot be promised: the file
        is missing, or none; it changed so lately that it could change again without another stamp; the file system is
        one of whose times or numbers nothing is known; or asking takes as long as reading, as on object stores. The
        directories on the way are not looked at: the caller has listed them.
        """

    def open(self, path: str) -> ReadFile: ...

    def write(self, path: str, pieces: Iterable[Buffer], size: int, *, steady: bool = False) -> float:
        """Create a file of ``size`` bytes from ``pieces``; missing directories are made. It MUST NOT exist.

        A piece is done with when the next one is asked for; ``steady`` promises that each stays as it is while the
        ``memory.STEADY`` after it are asked for, and that it lies in a ``memory.Region``. Returns the seconds that it
        took to make what was written durable.
        """

    def link(self, source: str, target: str) -> bool:
        """Make the file ``target``, which MUST NOT exist, of what ``source`` holds, without reading it.

        Either the two then lie on the same bytes, durable and read-only, and removing one leaves the other whole; or
        the server has copied them. ``False`` (and nothing done) where neither is possible. Raises
        CorruptCheckpointError where ``source`` is not a regular file.
        """

    def append(self, path: str, data: bytes) -> None:
        """Add ``data`` to the end of a file, which is made if it is not there; missing directories are made.

        Nothing of it is durable when this returns: after a power cut a part of it, or all, may be gone, or be other
        bytes. On an error nothing has been added, as far as the system lets that be undone. One writer at a time.
        Raises CorruptCheckpointError where there is something other than a regular file.
        """

    def put(self, path: str, data: bytes) -> None:
        """Create or replace a small file atomically; missing directories are made."""

    def create(self, path: str, data: bytes) -> None:
        """Create a small file atomically. FileExistsError if it exists, exact under races where ``exclusive``."""

    def replace(self, path: str, data: bytes, expected: bytes) -> None:
        """Replace a small file that holds ``expected``; FileExistsError if it holds something else by now."""

    @property
    def exclusive(self) -> bool:
        """Whether ``create`` is proven to have one winner in a race (probed at the first call)."""

    def remove(self, path: str) -> None:
        """Remove a file; no error if it is gone."""

    def remove_directory(self, path: str) -> bool:
        """Remove a directory if it is empty; whether it is gone now."""

    def make_directory(self, path: str) -> None: ...

    def rename(self, old: str, new: str) -> None:
        """Rename atomically; the parent of ``new`` exists, ``new`` does not (else FileExistsError)."""

    def exchange(self, a: str, b: str) -> bool:
        """Swap two directories atomically; ``False`` (and nothing done) where the system cannot."""

    def sync(self, *directories: str) -> None:
        """Make the names in these directories durable."""

    def obstacle(self, path: str) -> str | None:
        """Why this file or directory, or one below it, cannot be moved or removed, and the cure, for humans; ``None``
        where nothing shows. MUST NOT raise: it explains another error.
        """

    def free_bytes(self) -> int | None:
        """Bytes that can still be written, where that can be known."""

    def identity(self, path: str) -> str | None:
        """A name of the bytes that a file lies on: the same for files that were linked, and no others; ``None`` where
        that cannot be told.
        """

    def age(self, path: str) -> float | None:
        """Seconds since ``path`` was last written, by the file system's clock; ``None`` if unknown."""


def is_refusal(error: BaseException) -> bool:
    """Whether the system refuses just this file: nothing that time, memory or the network heals for all files at once.

    The other files of a run can be read all the same, so that an error of one of them is no error of the whole.
    """
    return isinstance(error, PermissionError) or (isinstance(error, OSError) and error.errno in _REFUSALS)


def unreadable(storage: Storage, path: str, error: OSError) -> UnreadableCheckpointError:
    """The typed error for a refusal."""
    denied = isinstance(error, PermissionError) or error.errno in (errno.EACCES, errno.EPERM)
    cure = "give this user read access to it" if denied else "look after the disk or the mount"
    reason = storage.redact(error.strerror or str(error) or type(error).__name__)
    made = UnreadableCheckpointError(
        f"{storage.place(path)} cannot be read: {reason}. Nothing says that it is damaged: {cure}"
    )
    made.errno = error.errno
    return made


@contextlib.contextmanager
def refusals_typed(storage: Storage, path: str) -> Iterator[None]:
    """Inside, a refusal to read ``path`` is raised as UnreadableCheckpointError."""
    try:
        yield
    except CheckpointerError:
        raise
    except OSError as error:
        if not is_refusal(error):
            raise
        raise unreadable(storage, path, error) from error
