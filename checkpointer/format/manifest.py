"""The manifest: what a checkpoint is, which files it has, and the proof that it was committed.

Pure: bytes in, :class:`Manifest` out, and back. Reading trusts nothing (see FORMAT.md, "manifest.json").
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone

from checkpointer.errors import CorruptCheckpointError, FormatVersionError, SaveError
from checkpointer.format import paths, strict_json
from checkpointer.format.index import Json
from checkpointer.format.info import CheckpointInfo

FORMAT = "checkpointer"
VERSION = 1

_TIME = re.compile(
    r"(?P<time>[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2})(?P<fraction>\.[0-9]{1,9})?"
    r"(?P<zone>Z|[+-][0-9]{2}:[0-9]{2})"
)
"""What ``created`` may be; every Python that runs this reads the same of it."""

_SPECIAL_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and xxh3-128 (32 hexadecimal digits) of a whole file, and whose bytes it shares."""

    size: int
    xxh3: str
    origin: str | None = None
    """``id`` of the earlier checkpoint whose save wrote the bytes that this file shares; ``None``: its own did."""
    turn: int = 1
    """Which of the consecutive checkpoints that share these bytes this one is; the one that wrote them is the first."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything that ``manifest.json`` says. Times are aware UTC, sizes bytes."""

    id: str
    parent: str | None
    sequence: int
    step: int
    epoch: int | None
    created: datetime
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    finite: bool | None = None
    world_size: int = 1
    data: str | None = None
    """Directory inside the checkpoint that holds the files, where the file system cannot rename; else ``None``."""
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    environment: Mapping[str, Json] = field(default_factory=dict)
    statistics: Mapping[str, Json] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(record.size for record in self.files.values())

    @property
    def copies(self) -> dict[str, int]:
        """Bytes of each physical copy that the files lie on, by its name."""
        return {self.copy(path): record.size for path, record in self.files.items()}

    def copy(self, path: str) -> str:
        """A name of the physical copy that file ``path`` lies on; checkpoints that share it agree on the name.

        Where files cannot be linked (``data`` is given) sharing is a copy made by the server, so it is one of its own.
        """
        origin = self.files[path].origin
        return f"{origin if origin and not self.data else self.id}/{path}"

    def place(self, path: str) -> str:
        """Where file ``path`` lies, relative to the checkpoint's directory."""
        return f"{self.data}/{path}" if self.data else path

    def info(self, path: str) -> CheckpointInfo:
        """The public description, for a checkpoint that lies at ``path``."""
        return CheckpointInfo(
            step=self.step,
            epoch=self.epoch,
            sequence=self.sequence,
            id=self.id,
            parent=self.parent,
            created=self.created,
            metrics=dict(self.metrics),
            tags=self.tags,
            size=self.size,
            finite=self.finite,
            path=path,
            statistics=dict(self.statistics),
            copies=self.copies,
        )

    def to_bytes(self) -> bytes:
        """The file's content: sealed JSON.

        Raises:
            SaveError: larger than 64 KiB, or no reader would accept it.
        """
        fields: dict[str, object] = {
            "format": FORMAT,
            "version": VERSION,
            "id": self.id,
            "parent": self.parent,
            "sequence": self.sequence,
            "step": self.step,
            "epoch": self.epoch,
            "created": self.created.astimezone(timezone.utc).isoformat(timespec="microseconds"),
            "metrics": {name: metric_to_json(value) for name, value in self.metrics.items()},
            "tags": list(self.tags),
            "finite": self.finite,
            "world_size": self.world_size,
            "data": self.data,
            "files": {path: [record.size, record.xxh3] for path, record in self.files.items()},
            **self._shared_to_json(),
            "environment": dict(self.environment),
            "statistics": dict(self.statistics),
        }
        data = strict_json.seal(fields)
        if len(data) > paths.MANIFEST_LIMIT:
            raise SaveError(
                f"the manifest would take {len(data)} bytes, at most {paths.MANIFEST_LIMIT} are allowed: "
                f"pass fewer or shorter metrics, tags or attached files ({len(self.files)} files)"
            )
        try:
            parse_manifest(data, "the new manifest")
        except CorruptCheckpointError as error:  # a forged sequence, for one, can make the next one impossible
            raise SaveError(f"this checkpoint could not be read back, so it is not committed: {error}") from error
        return data

    def _shared_to_json(self) -> dict[str, object]:
        shared = {path: [file.origin, file.turn] for path, file in self.files.items() if file.origin is not None}
        return {"shared": shared} if shared else {}


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Read a manifest; ``where`` names it in errors.

    Raises:
        CorruptCheckpointError: the bytes are not what a writer of this format wrote.
        FormatVersionError: they are, but of a newer version.
    """
    if len(data) > paths.MANIFEST_LIMIT:
        raise CorruptCheckpointError(f"{where} is larger than {paths.MANIFEST_LIMIT} bytes")
    raw = strict_json.unseal(data, where)  # seal, format and version are the same in every version of the format
    if raw.get("format") != FORMAT:
        raise CorruptCheckpointError(f"{where}: not a checkpointer manifest (format {str(raw.get('format'))[:40]!r})")
    version = strict_json.integer(raw.get("version"), f"{where}: version", low=1)
    if version != VERSION:
        raise FormatVersionError(
            f"{where} is written in format version {version}, this library reads version {VERSION}: "
            "upgrade with 'pip install -U torch-checkpointer'"
        )
    try:
        return _from_json(raw)
    except (CorruptCheckpointError, KeyError, ValueError, OverflowError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise CorruptCheckpointError(f"{where}: {reason}") from error


def _from_json(raw: Mapping[str, object]) -> Manifest:
    identity, parent, epoch, data = raw["id"], raw["parent"], raw["epoch"], raw["data"]
    if not paths.is_id(identity) or not (parent is None or paths.is_id(parent)):
        raise CorruptCheckpointError("id and parent must be 32 hexadecimal digits")
    if not (data is None or paths.is_id(data)):
        raise CorruptCheckpointError("data must be null or an attempt's id")
    finite = raw["finite"]
    if not (finite is None or isinstance(finite, bool)):
        raise CorruptCheckpointError("finite must be true, false or null")
    metrics = strict_json.mapping(raw["metrics"], "metrics")
    return Manifest(
        id=str(identity),
        parent=None if parent is None else str(parent),
        sequence=strict_json.integer(raw["sequence"], "sequence"),
        step=strict_json.integer(raw["step"], "step"),
        epoch=None if epoch is None else strict_json.integer(epoch, "epoch"),
        created=_parse_time(strict_json.string(raw["created"], "created")),
        metrics={name: metric_from_json(value, name) for name, value in metrics.items()},
        tags=tuple(strict_json.string(tag, "tag") for tag in strict_json.array(raw["tags"], "tags")),
        finite=finite,
        world_size=strict_json.integer(raw["world_size"], "world_size", low=1, high=2**31),
        data=None if data is None else str(data),
        files=_parse_files(
            strict_json.mapping(raw["files"], "files"), strict_json.mapping(raw.get("shared", {}), "shared")
        ),
        environment=strict_json.mapping(raw["environment"], "environment"),
        statistics=strict_json.mapping(raw["statistics"], "statistics"),
    )


def _parse_time(text: str) -> datetime:
    found = _TIME.fullmatch(text)
    if found is None:
        raise CorruptCheckpointError(f"created {text!r} is not a date and a time with an offset")
    fraction = (found["fraction"] or ".0")[:7].ljust(7, "0")  # before 3.11, Python knows neither "Z" nor two digits
    zone = "+00:00" if found["zone"] == "Z" else found["zone"]
    return datetime.fromisoformat(f"{found['time']}{fraction}{zone}").astimezone(timezone.utc)


def _parse_files(raw: Mapping[str, object], shared: Mapping[str, object]) -> dict[str, FileRecord]:
    strangers = shared.keys() - raw.keys()
    if strangers:
        raise CorruptCheckpointError(f"shared names {min(strangers)[:100]!r}, which is not in files")
    return {paths.check_relative(path): _parse_record(path, value, shared.get(path)) for path, value in raw.items()}


def _parse_record(path: str, value: object, shared: object) -> FileRecord:
    items = strict_json.array(value, f"file {path!r}")
    if len(items) != 2:
        raise CorruptCheckpointError(f"file {path!r} must be [size, xxh3]")
    size, xxh3 = strict_json.integer(items[0], f"size of {path!r}"), strict_json.digest(items[1], path)
    if shared is None:
        return FileRecord(size, xxh3)
    origin, turn, *rest = [*strict_json.array(shared, f"shared file {path!r}"), None, None]
    if not paths.is_id(origin) or len(rest) != 2:
        raise CorruptCheckpointError(f"shared file {path!r} must be [id, turn]")
    return FileRecord(size, xxh3, str(origin), strict_json.integer(turn, f"turn of {path!r}", low=2, high=2**31))


def metric_to_json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def metric_from_json(value: object, name: str) -> float:
    if isinstance(value, str) and value in _SPECIAL_FLOATS:
        return _SPECIAL_FLOATS[value]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise CorruptCheckpointError(f"metric {name!r} must be a number")
    try:
        return float(value)
    except OverflowError:
        raise CorruptCheckpointError(f"metric {name!r} is too large") from None
