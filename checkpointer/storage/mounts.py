"""On which file systems the numbers and times of a file prove that it is the file that it was."""

from __future__ import annotations

import os
import re
import sys

LOCAL = frozenset({
    "bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "tmpfs", "xfs", "zfs",
})  # fmt: skip
"""Kinds of file systems that this host alone writes, whose inode numbers last, and whose times are the kernel's.

Not NFS or SMB, whose attributes are seen late; not FAT, whose times are coarse; not what a program serves (FUSE).
"""

_ESCAPED = re.compile(rb"\\([0-7]{3})")


def are_local(directory: str) -> bool:
    """Whether a directory lies on such a file system, and no other is mounted below it. Only Linux tells."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        with open("/proc/self/mountinfo", "rb") as file:
            table = file.read()
    except OSError:  # a container may hide it
        return False
    kind, below = _mounts_at(os.fsencode(os.path.realpath(directory)), table)
    return kind in LOCAL and not below


def _mounts_at(place: bytes, table: bytes) -> tuple[str | None, bool]:
    """The kind of the file system that ``place`` lies on, and whether another one is mounted below it."""
    kind: str | None = None
    nearest = -1
    below = False
    place = place.rstrip(b"/")
    for line in table.splitlines():
        left, _, right = line.partition(b" - ")
        fields = left.split(b" ")
        if len(fields) < 5 or not right:
            return None, True
        point = _ESCAPED.sub(lambda match: bytes([int(match[1], 8)]), fields[4]).rstrip(b"/")
        if place == point or place.startswith(point + b"/"):
            if len(point) >= nearest:  # of two at one point the later one is on top
                kind, nearest = right.split(b" ")[0].decode("ascii", "replace"), len(point)
        elif point.startswith(place + b"/"):
            below = True
    return kind, below
