"""The manifest: what a checkpoint is, the hashes of its index, and the proof that it was committed.

Pure: bytes in, :class:`Manifest` out, and back. Reading trusts nothing (see FORMAT.md, "manifest.json").
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import TypedDict

from checkpointer.errors import CorruptCheckpointError, FormatVersionError, SaveError
from checkpointer.format import paths, strict_json
from checkpointer.format.index import FileRecord, Json
from checkpointer.format.info import CheckpointInfo

FORMAT = "checkpointer"
VERSION = 1

_TIME = re.compile(
    r"(?P<time>[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2})(?P<fraction>\.[0-9]{1,9})?"
    r"(?P<zone>Z|[+-][0-9]{2}:[0-9]{2})"
)
"""What ``created`` may be; every Python that runs this reads the same of it."""

_SPECIAL_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


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
    index: Mapping[str, FileRecord] = field(default_factory=dict)
    """Size and hash of the files that say what else there is: ``index.json`` and ``index.safetensors``."""
    files: int = 0
    """How many files there are but the manifest."""
    size: int = 0
    """Bytes of all of them."""
    shared: Mapping[str, int] = field(default_factory=dict)
    """Of these, the bytes that were written by the save of another checkpoint, by its id."""
    foreign: int = 0
    """How many of the files were written by somebody else's saver."""
    run: str | None = None
    """The id of the run; every checkpoint of a run root has the same."""
    rules: Mapping[str, Json] = field(default_factory=dict)
    """The ``save`` and ``keep`` rules that were in force, as the configuration spells them. Left out where the file
    would be too large with them."""
    replaces: str | None = None
    """The id that this checkpoint had before some of its components were removed."""
    slimmed: tuple[str, ...] = ()
    """The components that were removed since it was saved."""
    environment: Mapping[str, Json] = field(default_factory=dict)
    statistics: Mapping[str, Json] = field(default_factory=dict)

    @property
    def copies(self) -> dict[str, int]:
        """Bytes that lie on this disk, by the id of the checkpoint whose save wrote them.

        What several checkpoints share is counted once, at the largest of their numbers. Where files cannot be linked
        (``data`` is given) sharing is a copy made by the server, so all bytes are its own.
        """
        if self.data:
            return {self.id: self.size}
        return {self.id: self.size - sum(self.shared.values()), **self.shared}

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
            "index": {path: [record.size, record.xxh3] for path, record in self.index.items()},
            "files": self.files,
            "size": self.size,
            **self._optional_to_json(),
            "environment": dict(self.environment),
            "statistics": dict(self.statistics),
        }
        data = strict_json.seal(fields)
        if len(data) > paths.MANIFEST_LIMIT and self.rules:
            return replace(self, rules={}).to_bytes()  # no save may fail for what only commands ask for
        if len(data) > paths.MANIFEST_LIMIT:
            raise SaveError(
                f"the manifest would take {len(data)} bytes, at most {paths.MANIFEST_LIMIT} are allowed: "
                "pass fewer or shorter metrics or tags"
            )
        try:
            parse_manifest(data, "the new manifest")
        except CorruptCheckpointError as error:  # a forged sequence, for one, can make the next one impossible
            raise SaveError(f"this checkpoint could not be read back, so it is not committed: {error}") from error
        return data

    def _optional_to_json(self) -> dict[str, object]:
        """Members that most manifests can do without."""
        members: dict[str, object] = {
            "shared": dict(self.shared),
            "foreign": self.foreign,
            "run": self.run,
            "rules": dict(self.rules),
            "replaces": self.replaces,
            "slimmed": list(self.slimmed),
        }
        return {name: value for name, value in members.items() if value}


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
        **_totals(raw),
        foreign=strict_json.integer(raw.get("foreign", 0), "foreign"),
        run=_optional_id(raw, "run"),
        rules=strict_json.mapping(raw.get("rules", {}), "rules"),
        replaces=_optional_id(raw, "replaces"),
        slimmed=tuple(
            strict_json.string(name, "slimmed") for name in strict_json.array(raw.get("slimmed", []), "slimmed")
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


class Totals(TypedDict):
    """The members of a manifest that count its files."""

    index: dict[str, FileRecord]
    files: int
    size: int
    shared: dict[str, int]


def _totals(raw: Mapping[str, object]) -> Totals:
    index = {path: _parse_record(path, value) for path, value in strict_json.mapping(raw["index"], "index").items()}
    if index.keys() != {paths.INDEX, paths.TABLE}:
        raise CorruptCheckpointError(f"index must name {paths.INDEX} and {paths.TABLE}")
    size = strict_json.integer(raw["size"], "size", low=sum(record.size for record in index.values()))
    shared: dict[str, int] = {}
    for origin, number in strict_json.mapping(raw.get("shared", {}), "shared").items():
        if not paths.is_id(origin) or origin == raw["id"]:
            raise CorruptCheckpointError(f"shared names {origin[:100]!r}, which is no id of another checkpoint")
        shared[origin] = strict_json.integer(number, f"bytes shared with {origin}")
    if sum(shared.values()) > size:
        raise CorruptCheckpointError("more bytes are shared than there are")
    return {"index": index, "files": strict_json.integer(raw["files"], "files", low=2), "size": size, "shared": shared}


def _parse_record(path: str, value: object) -> FileRecord:
    items = strict_json.array(value, f"file {path!r}")
    if len(items) != 2:
        raise CorruptCheckpointError(f"file {path!r} must be [size, xxh3]")
    return FileRecord(strict_json.integer(items[0], f"size of {path!r}"), strict_json.digest(items[1], path))


def _optional_id(raw: Mapping[str, object], name: str) -> str | None:
    value = raw.get(name)
    if not (value is None or paths.is_id(value)):
        raise CorruptCheckpointError(f"{name} must be null or 32 hexadecimal digits")
    return None if value is None else str(value)


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
