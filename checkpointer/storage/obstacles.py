"""Why something on a local file system cannot be moved or removed: what an errno does not tell."""

from __future__ import annotations

import contextlib
import os
import stat
import struct
from collections.abc import Iterator

_GET_FLAGS = 0x80086601 if struct.calcsize("l") == 8 else 0x80046601
"""FS_IOC_GETFLAGS of Linux."""

_FLAGS = {0x10: "immutable", 0x20: "append-only"}
_LETTERS = {"immutable": "i", "append-only": "a"}


def obstacle(place: str) -> str | None:
    """What keeps ``place``, or anything below it, from being moved and removed, and the cure."""
    found = [(path, problem) for path in _below(place) if (problem := _marked(path)) is not None]
    if found:
        path, flag = found[0]
        letters = "".join(sorted({_LETTERS[problem] for _, problem in found}))
        others = f", and {len(found) - 1} more below it" if len(found) > 1 else ""
        cure = f"'chattr -R -{letters} {place}' as root, or 'chflags -R nouchg' on macOS, ends it"
        return f"{path} is {flag}{others}: {cure}"
    if _is_mount(place):
        return f"{place} is a mount: 'umount {place}' ends it"
    return _kept_by_directory(place)


def _is_mount(place: str) -> bool:
    """Also of a directory of the same file system, which the numbers of its device do not tell."""
    if os.path.islink(place):
        return False
    with contextlib.suppress(OSError, UnicodeDecodeError), open("/proc/self/mountinfo", encoding="utf-8") as lines:
        points = {line.split()[4] for line in lines}
        escaped = "".join(f"\\{ord(c):03o}" if c in " \t\n\\" else c for c in os.path.realpath(place))
        return escaped in points
    return os.path.ismount(place)


def _below(place: str) -> Iterator[str]:
    """``place`` and everything in it, no link followed."""
    yield place
    for directory, folders, files in os.walk(place):
        yield from (os.path.join(directory, name) for name in (*folders, *files))


def _marked(path: str) -> str | None:
    """The flag that forbids to change a file or directory."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    bits = getattr(status, "st_flags", 0)  # macOS and BSD
    if bits & (stat.UF_IMMUTABLE | stat.SF_IMMUTABLE):
        return "immutable"
    if bits & (stat.UF_APPEND | stat.SF_APPEND):
        return "append-only"
    return _flag(path) if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode) else None


def _flag(path: str) -> str | None:
    """The same on Linux; ``None`` also where the file system has no such flags."""
    try:
        import fcntl
    except ImportError:
        return None
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            bits = int.from_bytes(fcntl.ioctl(fd, _GET_FLAGS, bytes(8))[:4], "little")
        finally:
            os.close(fd)
        return next((name for bit, name in _FLAGS.items() if bits & bit), None)
    return None


def _kept_by_directory(place: str) -> str | None:
    """In a sticky directory only the owners of the entry and of the directory may move it."""
    parent = os.path.dirname(place)
    try:
        above, entry = os.stat(parent), os.lstat(place)
    except OSError:
        return None
    if not above.st_mode & stat.S_ISVTX or not hasattr(os, "geteuid"):
        return None
    if os.geteuid() in (0, above.st_uid, entry.st_uid):
        return None
    return (
        f"{parent} is sticky, and {place} belongs to user {entry.st_uid}, not to this user {os.geteuid()}: that "
        f"user or root can remove it, or 'chmod -t {parent}' ends it"
    )
