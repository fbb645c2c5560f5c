"""The log of a dm-log-writes device: every write in the order in which the disk was sure of it, and what replays them.

See Documentation/admin-guide/device-mapper/log-writes.rst of Linux. A write that no flush followed is not in the log.
"""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

MAGIC = 0x6A736677736872
FLUSH, FUA, DISCARD, MARK = 1, 2, 4, 8
_SUPER = struct.Struct("<QQQI")
_ENTRY = struct.Struct("<QQQQ")


@dataclass(frozen=True)
class Write:
    """One entry: where its bytes belong on the disk, and where they are in the log."""

    flags: int
    offset: int
    length: int
    position: int
    mark: str = ""

    @property
    def sure(self) -> bool:
        """Whether the disk may not lose it, whatever it loses of what was written since the last flush."""
        return bool(self.flags & (FLUSH | FUA | MARK))


def parse(log: Path) -> list[Write]:
    """All entries of a log.

    Raises:
        ValueError: it is no such log.
    """
    with log.open("rb") as file:
        magic, version, count, sector = _SUPER.unpack(file.read(_SUPER.size))
        if (magic, version) != (MAGIC, 1):
            raise ValueError(f"{log} is no log of dm-log-writes")
        found, position = [], sector
        for _ in range(count):
            file.seek(position)
            start, sectors, flags, extra = _ENTRY.unpack(file.read(_ENTRY.size))
            mark = file.read(extra).decode() if flags & MARK else ""
            data = position + sector
            found.append(Write(flags, start * sector, sectors * sector, data, mark))
            position = data + (0 if flags & (DISCARD | MARK) else sectors * sector)
    return found


def replay(log: Path, writes: Sequence[Write], image: Path) -> None:
    """Do to a disk what a log says."""
    source, target = os.open(log, os.O_RDONLY), os.open(image, os.O_WRONLY)
    for write in writes:
        if write.flags & DISCARD:
            os.pwrite(target, bytes(write.length), write.offset)
        elif write.length and not write.flags & MARK:
            os.pwrite(target, os.pread(source, write.length, write.position), write.offset)
    os.close(source)
    os.close(target)


def losses(writes: Sequence[Write], rng: random.Random, begin: int) -> Iterator[tuple[int, int, list[Write]]]:
    """What the disk may hold after each entry from ``begin`` on.

    Yields how many entries there were, how many of them the last flush has made sure, and those that came after them:
    all, and a sample of them, as a disk loses what is in its cache in any order.
    """
    sure = begin
    for end, write in enumerate(writes[begin:], begin + 1):
        if write.flags & FLUSH:
            sure = end
        since = list(writes[sure:end])
        if not write.flags & MARK:
            yield end, sure, since
        if sum(not later.sure for later in since) > 1:
            yield end, sure, [later for later in since if later.sure or rng.random() < 0.5]
