"""``.checkpointer/known``: what the holder of the lock has read of manifests, for processes that are started later.

A cache, and never more: it may be missing, old, damaged, or of another version. A row counts where the stamp in it is
that of the manifest now, which nobody can give to another file (:meth:`Storage.stamps`); and what is restored or
removed by a row is read and checked first all the same. Only who may change the run root can write one that is used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import stat
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import TypeAlias

import xxhash

from checkpointer.format.info import EPOCH_START, CheckpointInfo
from checkpointer.storage import Stamp

WORTH_WRITING = 16
"""Manifests. So many are read about as fast as the file is written."""

LIMIT = 32 << 20
"""Bytes of the file."""

ROW_LIMIT = 16 << 10
"""Characters of a row; one of 800 has about 600."""

Row: TypeAlias = tuple[str, int, int, str, Stamp, str]
"""One checkpoint: directory, sequence, microseconds since 1970, id, stamp, and the other fields as JSON."""

_FIELDS = tuple(field.name for field in dataclasses.fields(CheckpointInfo))
_IN_ROW = ("sequence", "created", "id", "path")
"""Of these, what a row holds by itself, or follows from where it lies."""
_HEAD = f"checkpointer known 1 {sys.byteorder} {' '.join(_FIELDS)}\n".encode("ascii")
_NUMBERS = 7
"""Of a row: five of a stamp, sequence, time."""
_MICROSECOND = timedelta(microseconds=1)


class KnownFile:
    """The file beside the writer's lock."""

    def __init__(self, lock_path: str) -> None:
        self._path = Path(lock_path).with_name("known")

    def read(self) -> list[Row]:
        """Its rows; none where it is missing, damaged, or of somebody else."""
        with contextlib.suppress(OSError, ValueError):  # a cache: without it everything is read
            return _rows(_content(self._path))
        return []

    def write(self, rows: Iterable[Row]) -> None:
        """Replace it. Not durably: a torn one counts for nothing. One process at a time does that.

        Raises:
            OSError: and it is as it was, or gone.
        """
        data = _data([row for row in rows if len(row[4]) + 2 == _NUMBERS])
        if len(data) > LIMIT:
            return
        new = self._path.with_name("known.new")
        new.unlink(missing_ok=True)  # of a process that died, or a link: it is not followed
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o644)
        with open(fd, "wb") as file:
            file.write(data)
        os.replace(new, self._path)


def microseconds(created: datetime) -> int:
    """Since 1970."""
    return (created - EPOCH_START) // _MICROSECOND


def encoded(info: CheckpointInfo) -> str | None:
    """The fields that a row has no place of its own for; ``None`` if the info would not come back as it is."""
    fields = {field: getattr(info, field) for field in _FIELDS if field not in _IN_ROW}
    try:
        rest = json.dumps({key: dict(value) if isinstance(value, Mapping) else value for key, value in fields.items()})
    except (TypeError, ValueError):
        return None
    back = decoded(rest, info.sequence, microseconds(info.created), info.id, info.path)
    return rest if len(rest) <= ROW_LIMIT and repr(back) == repr(info) else None


def decoded(rest: str, sequence: int, created: int, id: str, path: str) -> CheckpointInfo | None:
    """The info of a checkpoint that lies at ``path``; ``None`` if it makes no sense."""
    try:
        fields = json.loads(rest)
        fields["tags"] = tuple(fields["tags"])
        when = EPOCH_START + timedelta(microseconds=created)
        return CheckpointInfo(**fields, created=when, sequence=sequence, id=id, path=path)
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError):
        return None


def _data(rows: Sequence[Row]) -> bytes:
    """All numbers, so many to a row; the names; the ids; a line for the rest of each row; and the hash of all that."""
    numbers = array("Q", (n for _, sequence, created, _, stamp, _ in rows for n in (*stamp, sequence, created)))
    lines = ["\t".join(row[0] for row in rows), "\t".join(row[3] for row in rows), *(row[5] for row in rows)]
    count = f"{len(rows)}\n".encode("ascii")
    data = _HEAD + count + numbers.tobytes() + "\n".join(lines).encode("ascii")
    return data + xxhash.xxh3_128_digest(data)


def _content(path: Path) -> bytes:
    """What it holds, if this user, or whoever the run root belongs to, wrote it, and nobody else may.

    Raises:
        OSError, ValueError: it is not so.
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    with open(os.open(path, flags), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > LIMIT:
            raise ValueError("no file of ours")
        if hasattr(os, "geteuid"):
            trusted = (os.geteuid(), os.stat(path.parents[1]).st_uid)
            if status.st_uid not in trusted or status.st_mode & 0o022:
                raise ValueError("somebody else may have written it")
        return file.read(LIMIT + 1)


def _rows(data: bytes) -> list[Row]:
    """The rows of a whole file of this version; ValueError if it is not one."""
    if not data.startswith(_HEAD) or xxhash.xxh3_128_digest(data[:-16]) != data[-16:]:
        raise ValueError("of another version, torn or damaged")
    begin = data.index(b"\n", len(_HEAD)) + 1
    end = begin + int(data[len(_HEAD) : begin]) * _NUMBERS * 8
    numbers = array("Q", data[begin:end])
    stamps = zip(*(numbers[column::_NUMBERS] for column in range(5)), strict=True)
    names, ids, *rests = data[end:-16].decode("ascii").split("\n")
    whole = (names.split("\t"), numbers[5::_NUMBERS], numbers[6::_NUMBERS], ids.split("\t"), stamps, rests)
    return list(zip(*whole, strict=True))
