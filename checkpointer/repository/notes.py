"""Pins and annotations: small sealed files beside the checkpoints, appended and never changed.

Any process may write one without the writer's lock. Each is ``.checkpointer/notes/<checkpoint-id>/<number>-<random>``
with the next free number, so that reading them in the order of their names replays what happened; no clock is asked.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from checkpointer.errors import ConfigError, CorruptCheckpointError
from checkpointer.format import paths, strict_json
from checkpointer.format.info import CheckpointInfo
from checkpointer.format.manifest import metric_from_json, metric_to_json
from checkpointer.storage import Entry, Storage, is_refusal

NOTE_LIMIT = 64 * 1024
"""Bytes."""

_NAME = re.compile(r"([0-9]{8})-[0-9a-f]{16}\.json")
_UNFINISHED = re.compile(r"\.[0-9]{8}-[0-9a-f]{16}\.json\.[0-9a-f]{16}")
"""What a process that died while it wrote a note leaves in a directory."""


@dataclass(frozen=True, kw_only=True)
class Note:
    """One entry. ``None`` leaves a thing as it is."""

    pinned: bool | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    text: str | None = None
    damaged: str | None = None
    """Why the checkpoint failed a check; ``""`` takes it back (a later check passed)."""

    def to_bytes(self) -> bytes:
        fields = {
            "pinned": self.pinned,
            "metrics": {name: metric_to_json(value) for name, value in self.metrics.items()},
            "tags": list(self.tags),
            "text": self.text,
            "damaged": self.damaged,
        }
        data = strict_json.seal(fields)
        if len(data) > NOTE_LIMIT:
            raise ConfigError(f"a note takes {len(data)} bytes, at most {NOTE_LIMIT} are allowed")
        return data


def add_note(storage: Storage, checkpoint_id: str, note: Note) -> None:
    """Append ``note``; durable when this returns."""
    directory = f"{paths.NOTES}/{checkpoint_id}"
    number = 1 + max((int(match[1]) for match in _names(storage, directory)), default=0)
    storage.create(f"{directory}/{number:08d}-{secrets.token_hex(8)}.json", note.to_bytes())


def read_notes(storage: Storage, checkpoint_id: str) -> list[Note]:
    """All notes on a checkpoint, oldest first. One that cannot be read counts as a pin: that loses nothing."""
    directory = f"{paths.NOTES}/{checkpoint_id}"
    listed = _listed(storage, directory)
    if listed is None:
        return [Note(pinned=True)]
    files = [f"{directory}/{match[0]}" for match in sorted(_matches(listed), key=lambda match: match[0])]
    return [_parse(data, path) for path, data in zip(files, storage.read_many(files, NOTE_LIMIT), strict=True)]


def noted_ids(storage: Storage) -> set[str]:
    """Ids of the checkpoints that have notes."""
    return {entry.name for entry in storage.list_directory(paths.NOTES) if paths.is_id(entry.name)}


def noted_as_far_as_known(storage: Storage) -> set[str] | None:
    """As ``noted_ids``; ``None`` where the notes cannot be listed, so that each checkpoint may have some."""
    found = _listed(storage, paths.NOTES)
    return None if found is None else {entry.name for entry in found if paths.is_id(entry.name)}


def remove_notes(storage: Storage, checkpoint_id: str) -> None:
    """Forget the notes on a checkpoint that is gone."""
    directory = f"{paths.NOTES}/{checkpoint_id}"
    for entry in storage.list_directory(directory):
        debris = entry.is_file and paths.left_by_system(entry.name) == "debris"
        if debris or _NAME.fullmatch(entry.name) or _UNFINISHED.fullmatch(entry.name):
            storage.remove(f"{directory}/{entry.name}")
    storage.remove_directory(directory)


def damaged_notes(storage: Storage, checkpoint_id: str) -> list[str]:
    """The notes on a checkpoint that cannot be read, and so count as a pin; their directory, if it is that."""
    directory = f"{paths.NOTES}/{checkpoint_id}"
    listed = _listed(storage, directory)
    if listed is None:
        return [directory]
    files = [f"{directory}/{match[0]}" for match in _matches(listed)]
    found = zip(files, storage.read_many(files, NOTE_LIMIT), strict=True)
    return sorted(path for path, data in found if not _whole(data, path))


def annotated(info: CheckpointInfo, notes: Iterable[Note]) -> CheckpointInfo:
    """``info`` with ``notes`` replayed over it."""
    for note in notes:
        info = replace(
            info,
            pinned=info.pinned if note.pinned is None else note.pinned,
            metrics={**info.metrics, **note.metrics},
            tags=tuple(dict.fromkeys((*info.tags, *note.tags))),
            note=info.note if note.text is None else note.text,
            damaged=info.damaged if note.damaged is None else note.damaged or None,
        )
    return info


def _names(storage: Storage, directory: str) -> list[re.Match[str]]:
    return _matches(storage.list_directory(directory))


def _matches(entries: Iterable[Entry]) -> list[re.Match[str]]:
    matches = (_NAME.fullmatch(entry.name) for entry in entries)
    return [match for match in matches if match]


def _listed(storage: Storage, directory: str) -> list[Entry] | None:
    """What a directory of notes holds; ``None`` where the system refuses to say."""
    try:
        return storage.list_directory(directory)
    except OSError as error:
        if not is_refusal(error):
            raise
        return None


def _whole(data: bytes | Exception, path: str) -> bool:
    if isinstance(data, Exception):
        return not (isinstance(data, CorruptCheckpointError) or is_refusal(data))
    try:
        strict_json.unseal(data, path)
    except CorruptCheckpointError:
        return False
    return True


def _parse(data: bytes | Exception, path: str) -> Note:
    if isinstance(data, FileNotFoundError):
        return Note()  # its checkpoint was pruned meanwhile
    if isinstance(data, CorruptCheckpointError) or (isinstance(data, Exception) and is_refusal(data)):
        return Note(pinned=True)
    if isinstance(data, Exception):
        raise data
    try:
        raw = strict_json.unseal(data, path)
        pinned, text, damaged = raw.get("pinned"), raw.get("text"), raw.get("damaged")
        metrics = strict_json.mapping(raw.get("metrics"), "metrics")
        return Note(
            pinned=pinned if isinstance(pinned, bool) else None,
            metrics={name: metric_from_json(value, name) for name, value in metrics.items()},
            tags=tuple(strict_json.string(tag, "tag") for tag in strict_json.array(raw.get("tags"), "tags")),
            text=None if text is None else strict_json.string(text, "text"),
            damaged=None if damaged is None else strict_json.string(damaged, "damaged"),
        )
    except CorruptCheckpointError:
        return Note(pinned=True)
