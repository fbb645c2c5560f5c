"""One thing that happened to a run, and the line that it is written as in the run's journal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any, NamedTuple

from checkpointer.errors import CorruptCheckpointError, FormatVersionError
from checkpointer.format import paths, strict_json
from checkpointer.format.manifest import metric_from_json, metric_to_json

VERSION = 1
"""Of a journal's files. Readers pass over files of other versions."""

LINE_LIMIT = 4096
"""Bytes of a line that is written."""

_REASON_LIMIT = 1000
_WORD_LIMIT = 64
_HOST_LIMIT = 255
_OPTIONAL = ("metrics", "details", "statistics")
"""What is left out of a line that would be too long, in this order."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """One thing that happened to a run. ``mgr.history()`` gives those that its journal holds, in their order."""

    __module__ = "checkpointer"

    kind: str
    """``commit``, ``removal``, ``restore``, ``branch`` (the next commit goes on from another checkpoint than the
    newest), ``damage`` and ``intact`` (a check of a checkpoint failed, or a later one passed), ``quarantine``,
    ``signal``. A newer version of this library may have written others."""
    time: datetime
    """When, by the clock of the host that wrote it (aware, UTC). Clocks jump: events are in order without it."""
    step: int | None = None
    """Of the checkpoint that it happened to; for ``signal`` the step of the call that noticed it."""
    id: str | None = None
    """``id`` of the checkpoint that it happened to."""
    reason: str | None = None
    """Why, for humans."""
    metrics: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Of a commit: the metrics given to ``save``."""
    statistics: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Of a commit: what the save cost, as in ``CheckpointInfo.statistics``."""
    details: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What else is known, by name; of a commit ``sequence``, ``parent``, ``epoch``, ``size``, ``finite``.
    ``left_out`` names the members that were too long to be written."""
    host: str | None = None
    """Where the process ran that wrote it."""
    pid: int | None = None
    """The number of that process."""

    def __post_init__(self) -> None:
        if self.time.tzinfo is None:
            raise ValueError(f"time must be an aware datetime, got {self.time!r}")

    def __str__(self) -> str:
        step = "" if self.step is None else f" of step {self.step}"
        return f"{self.kind}{step}" + (f": {self.reason}" if self.reason else "")

    def to_json(self) -> dict[str, Any]:
        """What a line of the journal holds, and ``checkpointer history --json`` shows, but for host and process."""
        return {
            "kind": self.kind,
            "time": self.time.astimezone(timezone.utc).isoformat(timespec="milliseconds"),
            "step": self.step,
            "id": self.id,
            "reason": self.reason,
            "metrics": {name: metric_to_json(value) for name, value in self.metrics.items()},
            "statistics": dict(self.statistics),
            "details": dict(self.details),
        }


class Head(NamedTuple):
    """What the events of one file have in common."""

    host: str | None = None
    pid: int | None = None

    def to_line(self) -> bytes:
        """The first line of the file."""
        return strict_json.seal_line({"journal": VERSION, "host": str(self.host)[:_HOST_LIMIT], "pid": self.pid})


def event_line(event: Event) -> bytes:
    """``event`` as one sealed line of at most ``LINE_LIMIT`` bytes; what is empty is not written."""
    if event.reason is not None and len(event.reason) > _REASON_LIMIT:
        event = replace(event, reason=f"{event.reason[:_REASON_LIMIT]}…")
    left_out: list[str] = []
    for name in (*_OPTIONAL, "reason"):
        line = _line(event)
        if len(line) <= LINE_LIMIT:
            return line
        left_out.append(name)
        nothing: dict[str, Any] = {name: None if name == "reason" else {}}
        event = replace(event, **nothing)
        event = replace(event, details={**event.details, "left_out": [*left_out]})
    return _line(event)


def _line(event: Event) -> bytes:
    return strict_json.seal_line({name: value for name, value in event.to_json().items() if value not in (None, {})})


def parse_line(line: bytes, where: str, head: Head | None = None) -> Event | Head:
    """What a line says: an event, of the process that ``head`` names, or the head of those that follow.

    Raises:
        CorruptCheckpointError: the line is damaged, or none that this library writes.
        FormatVersionError: it is the head of a version that is not known: so are the lines that follow.
    """
    raw = strict_json.unseal_line(line, where)
    return _parse_head(raw, where) if "journal" in raw else _parse_event(raw, where, head or Head())


def _parse_head(raw: dict[str, Any], where: str) -> Head:
    version = strict_json.integer(raw["journal"], f"version of {where}")
    if version != VERSION:
        raise FormatVersionError(f"{where} is of version {version}, this library reads {VERSION}")
    host, pid = raw.get("host"), raw.get("pid")
    return Head(
        None if host is None else strict_json.string(host, "host")[:_HOST_LIMIT],
        None if pid is None else strict_json.integer(pid, "pid"),
    )


def _parse_event(raw: dict[str, Any], where: str, head: Head) -> Event:
    kind = strict_json.string(raw.get("kind"), "kind")
    if not kind or len(kind) > _WORD_LIMIT:
        raise CorruptCheckpointError(f"{where} has a kind of {len(kind)} characters")
    step, id, reason = raw.get("step"), raw.get("id"), raw.get("reason")
    if not (id is None or paths.is_id(id)):
        raise CorruptCheckpointError(f"{where} has an id that is none")
    metrics = strict_json.mapping(raw.get("metrics", {}), "metrics")
    return Event(
        kind=kind,
        time=_parse_time(strict_json.string(raw.get("time"), "time"), where),
        step=None if step is None else strict_json.integer(step, "step"),
        id=id,
        reason=None if reason is None else strict_json.string(reason, "reason"),
        metrics={name: metric_from_json(value, name) for name, value in metrics.items()},
        statistics=strict_json.mapping(raw.get("statistics", {}), "statistics"),
        details=strict_json.mapping(raw.get("details", {}), "details"),
        host=head.host,
        pid=head.pid,
    )


def _parse_time(text: str, where: str) -> datetime:
    try:
        time = datetime.fromisoformat(text)
        if time.tzinfo is not None:
            return time.astimezone(timezone.utc)
    except (ValueError, OverflowError) as error:
        raise CorruptCheckpointError(f"{where} has no time that can be read: {text[:40]!r}") from error
    raise CorruptCheckpointError(f"{where} has a time without its offset: {text[:40]!r}")
