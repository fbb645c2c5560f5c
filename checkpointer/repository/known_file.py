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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from checkpointer.format.info import EPOCH_START, CheckpointInfo

WORTH_WRITING = 16
"""Manifests. So many are read about as fast as the file is written."""

LIMIT = 32 << 20
"""Bytes of the file."""

ROW_LIMIT = 16 << 10
"""Characters of a row; one of 800 has about 600."""

_FIELDS = tuple(field.name for field in dataclasses.fields(CheckpointInfo))
_TEXT = ("sequence", "created", "id", "path")
"""Of these, what is in the row itself, or follows from where it lies."""
_HEAD = f"checkpointer known 1 {' '.join(_FIELDS)}"
_MICROSECOND = timedelta(microseconds=1)


class Row(NamedTuple):
    """One checkpoint."""

    name: str
    stamp: str
    sequence: int
    created: int
    """Microseconds since 1970."""
    id: str
    rest: str
    """The other fields of the info, as JSON."""


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
        """Replace it. Not durably: a torn one counts for nothing. One process at a time does that."""
        data = "\n".join([_HEAD, *_columns(list(rows)), ""]).encode("ascii")
        data += xxhash.xxh3_128_hexdigest(data).encode("ascii") + b"\n"
        if len(data) > LIMIT:
            return
        new = self._path.with_name("known.new")
        new.unlink(missing_ok=True)  # of a process that died, or a link: it is not followed
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o644)
        with open(fd, "wb") as file:
            file.write(data)
        os.replace(new, self._path)


def encoded(name: str, stamp: str, info: CheckpointInfo) -> Row | None:
    """``None`` if the info would not come back as it is."""
    fields = {field: getattr(info, field) for field in _FIELDS if field not in _TEXT}
    try:
        rest = json.dumps({key: dict(value) if isinstance(value, Mapping) else value for key, value in fields.items()})
    except (TypeError, ValueError):
        return None
    row = Row(name, stamp, info.sequence, (info.created - EPOCH_START) // _MICROSECOND, info.id, rest)
    if len(rest) > ROW_LIMIT:
        return None
    back = decoded(row, info.path)
    return row if back is not None and repr(back) == repr(info) else None


def decoded(row: Row, path: str) -> CheckpointInfo | None:
    """The info of a checkpoint that lies at ``path``; ``None`` if the row makes no sense."""
    try:
        fields = json.loads(row.rest)
        created = EPOCH_START + timedelta(microseconds=row.created)
        return _info(fields, created, row, path)
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return None


def _info(fields: dict[str, Any], created: datetime, row: Row, path: str) -> CheckpointInfo:
    fields["tags"] = tuple(fields["tags"])
    return CheckpointInfo(**fields, created=created, sequence=row.sequence, id=row.id, path=path)


def _columns(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each column, and then one for the rest of each row."""
    for column in range(5):
        yield "\t".join(str(row[column]) for row in rows)
    yield from (row.rest for row in rows)


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
    body, seal = data[:-33], data[-33:-1]
    if xxhash.xxh3_128_hexdigest(body).encode("ascii") != seal:
        raise ValueError("torn or damaged")
    head, *columns = body.decode("ascii").split("\n", 6)
    if head != _HEAD or len(columns) != 6:
        raise ValueError("of another version")
    names, stamps, sequences, created, ids = (column.split("\t") for column in columns[:5])
    rests = columns[5].split("\n")[:-1]
    whole = zip(names, stamps, map(int, sequences), map(int, created), ids, rests, strict=True)
    return list(map(Row._make, whole))
