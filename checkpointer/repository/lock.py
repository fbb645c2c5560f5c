"""The single-writer lock of a run root: an OS lock, which dies with its owner, and a file that says who holds it."""

from __future__ import annotations

import contextlib
import errno
import getpass
import hashlib
import json
import os
import stat
import tempfile
import weakref
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from checkpointer.errors import RunLockedError, SaveError
from checkpointer.format import strict_json
from checkpointer.system import messages
from checkpointer.system.host import host_name

if TYPE_CHECKING:
    from filelock import FileLock

_OWNER_LIMIT = 4096
"""Bytes; a manager writes some hundred."""

_FIELD_LIMIT = 100
"""Characters of one field that a message shows."""

_NO_OS_LOCK = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


class WriterLock:
    """Held from ``acquire`` to ``release`` by one manager of one process on one host.

    ``path`` is the lock file inside the run root, or ``None`` where the file system has no OS locks (object stores):
    then a local lock, keyed by the URL, keeps the processes of this host and user apart, and a warning says so.
    ``make_directory`` makes the directory of ``path`` in the storage's own way.
    """

    def __init__(self, url: str, path: str | None, make_directory: Callable[[], None] | None = None) -> None:
        self._url = url
        self._make_directory = make_directory
        self._inside_root = path is not None
        self._path = Path(path) if path is not None else _substitute_path(url)
        self._owner_path = self._path.with_name("owner.json") if path else self._path.with_suffix(".owner.json")
        self._lock: FileLock | None = None
        self._pid = os.getpid()
        self._identity: tuple[int, int] | None = None
        self._warned = False
        self.holder = ""
        """What holds it, for the message to whoever in this process wants it too."""

    @property
    def held(self) -> bool:
        """Whether this very process holds it: a forked child inherits nothing."""
        return self._lock is not None and self._pid == os.getpid()

    @property
    def tenure(self) -> object | None:
        """Stands for the time from one ``acquire`` to its ``release``; ``None`` where this process does not hold it."""
        return self._lock if self.held else None

    def held_as(self, identity: tuple[int, int]) -> bool:
        """Whether this process holds it, by the lock file of this device and inode."""
        return self.held and self._identity == identity

    @property
    def proven(self) -> bool:
        """Whether holding it proves that no other writer of this root is alive."""
        return self.held and (self._inside_root or self._url.startswith("memory://"))

    @property
    def owner(self) -> dict[str, object] | None:
        """Who says to hold it, or was killed while holding it; ``None`` if nobody."""
        return read_owner(self._owner_path)

    def taken(self) -> bool | None:
        """Whether anybody holds it at this moment; ``None`` where the system does not tell. Makes no file.

        It is asked by a shared lock, given back at once.
        """
        try:
            import fcntl
        except ImportError:
            return None
        try:
            fd = os.open(self._path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))  # a pipe
        except FileNotFoundError:
            return False
        except OSError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return None
        finally:
            os.close(fd)
        return False

    def acquire(self, holder: str = "a save or an import without a manager") -> None:
        """Take the lock, or fail at once. ``holder`` is what takes it, for others in this process.

        Raises:
            RunLockedError: another manager holds it; names host, process and time.
            SaveError: the lock file cannot be written.
        """
        if self.held:
            return
        from filelock import FileLock, Timeout  # imported late: readers never lock

        lock = FileLock(self._path, timeout=0, thread_local=False, fallback_to_soft=False)
        try:
            if self._inside_root and self._make_directory is not None:
                self._make_directory()  # durably: it may be the first directory of the run
            self._path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise RunLockedError(self._refusal()) from None
        except (OSError, NotImplementedError) as error:
            if getattr(error, "errno", None) not in _NO_OS_LOCK and not isinstance(error, NotImplementedError):
                cure = self._how_to_share(error) or "make the run root writable"
                raise SaveError(
                    f"cannot lock {self._url} for writing: {error}; to read only, pass read_only=True, else {cure}"
                ) from error
            self._fall_back(holder)
            return
        self._lock, self._pid, self.holder = lock, os.getpid(), holder
        _held.add(self)
        status = os.stat(self._path)
        self._identity = (status.st_dev, status.st_ino)
        self._write_owner()
        if not self._inside_root and not self._url.startswith("memory://") and not self._warned:
            self._warn_unprotected("its storage has no lock that a dead owner frees")

    def adopt(self, other: WriterLock, holder: str) -> None:
        """Get the lock from ``other``, which holds it on the same run root: it is free at no moment in between."""
        self._path, self._owner_path, self._inside_root = other._path, other._owner_path, other._inside_root
        self._identity, self._pid, self._warned = other._identity, other._pid, other._warned
        self._lock, other._lock, self.holder = other._lock, None, holder
        _held.add(self)

    def _how_to_share(self, error: Exception) -> str | None:
        """The advice where another user's job has made what this one may not write; ``None`` where it is all the same.

        With the usual umask of 022 only its user may write what a job has made, whatever the mode of the run root.
        """
        refused = isinstance(error, PermissionError) and hasattr(os, "geteuid")  # no full disk, no read-only mount
        denied = _denied(self._path.parent, self._path) if refused and self._inside_root else None
        if denied is None or denied[1].st_uid == os.geteuid():
            return None
        path, status = denied
        owner, private = f"user {_user_name(status.st_uid)}", self._path.parent
        if status.st_mode & stat.S_IWGRP:
            return f"join its group: {path} belongs to {owner}, and group {status.st_gid} may write it"
        return (
            f"share {private}: {path} belongs to {owner}, whose umask let nobody else write it. A run that several "
            "users of a group write to needs 'umask 002' in the jobs of all of them; what is there already is opened "
            f"by 'chmod -R g+w {private}', as {owner} or root"
        )

    def check(self) -> None:
        """Raise RunLockedError unless the lock file is still the one that was locked."""
        if not self.held or not self.in_place():
            raise RunLockedError(
                f"the writer's lock of {self._url} is no longer ours: {self._path} was removed or replaced. "
                "Another job may be writing to this run; nothing was committed"
            )

    def release(self) -> None:
        """Free the lock; does nothing where this process does not hold it."""
        if self.held and self._lock is not None:
            if self.in_place():  # else the name is that of another owner
                with contextlib.suppress(OSError):  # on a disk that fails: it is only who was the last one
                    self._owner_path.unlink(missing_ok=True)
            self._lock.release()
        self._lock = None

    def in_place(self) -> bool:
        """Whether the lock file is still the one that was locked."""
        try:
            status = os.stat(self._path)
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == self._identity

    def _fall_back(self, holder: str) -> None:
        self._warn_unprotected("its file system has no working OS locks")
        self._path = _substitute_path(self._url)
        self._owner_path = self._path.with_suffix(".owner.json")
        self._inside_root = False
        self.acquire(holder)

    def _warn_unprotected(self, reason: str) -> None:
        self._warned = True
        messages.warn(
            f"{self._url}: {reason}, so only jobs of this user on this host are kept from writing to the same run; "
            "make sure that no other host does",
        )

    def _write_owner(self) -> None:
        owner = {
            "host": host_name(),
            "pid": os.getpid(),
            "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "user": _user(),
        }
        with contextlib.suppress(OSError):  # on a full disk the lock holds all the same, and restoring needs it
            self._owner_path.write_text(json.dumps(owner) + "\n", encoding="utf-8")

    def _refusal(self) -> str:
        who = read_owner(self._owner_path)
        same = who is not None and who.get("pid") == os.getpid() and who.get("host") == host_name()
        if same:
            advice = f"That is this process: {self._holder_here()}. Close it, or let it end, first"
        else:
            advice = "Wait for it to end or stop it; to read only (evaluation, a notebook), pass read_only=True"
        return f"{self._url} is being written by {described(who)}. {advice}"

    def _holder_here(self) -> str:
        """What holds it in this process."""
        with contextlib.suppress(OSError):
            status = os.stat(self._path)
            identity = (status.st_dev, status.st_ino)
            return next((lock.holder for lock in list(_held) if lock.held_as(identity)), "another manager")
        return "another manager"


_held: weakref.WeakSet[WriterLock] = weakref.WeakSet()
"""Those that this process holds, or has held."""


def described(owner: Mapping[str, object] | None) -> str:
    """The content of ``owner.json`` for humans."""
    if owner is None:
        return "a process that has not said who it is"
    pid, host, user, since = (_printable(owner.get(name)) for name in ("pid", "host", "user", "since"))
    return f"pid {pid} on host {host} (user {user}), since {since}"


def _printable(value: object) -> str:
    """A field for a message that may end on a terminal: anybody who may write to the run root chooses it."""
    text = str(value) if isinstance(value, (str, int)) or value is None else type(value).__name__
    return "".join(char if char.isprintable() else "?" for char in text[:_FIELD_LIMIT])


def read_owner(path: Path) -> dict[str, object] | None:
    """Who holds, or last held, the lock; ``None`` if nobody said so in words that a manager writes."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
    try:
        with open(os.open(path, flags), "rb") as file:  # opening a pipe in the ordinary way would wait for ever
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return None
            return strict_json.mapping(strict_json.loads(file.read(_OWNER_LIMIT), "owner"), "owner")
    except OSError:  # an owner that is no JSON is one, too
        return None


def one_spelling(url: str) -> str:
    """The same for ``memory://run`` and ``memory:///run/``, which are one run root."""
    return url.rstrip("/").replace(":///", "://")


def _denied(*paths: Path) -> tuple[Path, os.stat_result] | None:
    """The first of ``paths`` that is there and that the effective user, by whom writing goes, may not write."""
    effective = os.access in os.supports_effective_ids
    with contextlib.suppress(OSError):  # what cannot be looked at is in a place that has to be opened first
        for path in paths:
            if os.path.lexists(path) and not os.access(path, os.W_OK, effective_ids=effective):
                return path, os.stat(path)
    return None


def _user_name(uid: int) -> str:
    with contextlib.suppress(KeyError, ImportError):  # containers may run as a number without a name
        import pwd

        return pwd.getpwuid(uid).pw_name
    return str(uid)


def _substitute_path(url: str) -> Path:
    key = f"{one_spelling(url)}#{os.getpid()}" if url.startswith("memory://") else one_spelling(url)
    digest = hashlib.sha256(key.encode()).hexdigest()[:32]
    return Path(tempfile.gettempdir()) / f"checkpointer-{_user()}" / f"{digest}.lock"


def _user() -> str:
    with contextlib.suppress(KeyError, OSError, ImportError):  # containers may run as a number without a name
        return getpass.getuser()
    return str(os.getuid()) if hasattr(os, "getuid") else "unknown"
