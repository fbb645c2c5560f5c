"""Checking every byte of a checkpoint, and the report of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import xxhash

from checkpointer.errors import CheckpointerError, CorruptCheckpointError, UnreadableCheckpointError
from checkpointer.format import paths
from checkpointer.format.index import Chunk
from checkpointer.format.info import CheckpointInfo
from checkpointer.format.manifest import Manifest
from checkpointer.format.tensor_files import check_header
from checkpointer.repository.checkpoint_reader import CheckpointReader
from checkpointer.repository.commit import walk
from checkpointer.storage import Storage, refusals_typed


@dataclass(frozen=True)
class CheckpointReport:
    """What a check of one checkpoint found."""

    __module__ = "checkpointer"

    path: str
    step: int
    info: CheckpointInfo | None
    """``None`` where the manifest itself cannot be used."""
    damage: tuple[str, ...]
    """Why it cannot be trusted; empty if it can."""
    extra: tuple[str, ...]
    """Files in its directory that it does not list: harmless, and ignored by restore. Also what systems leave there."""
    bytes_read: int
    unreadable: tuple[str, ...] = ()
    """Why not all of it could be checked, although nothing says that it is damaged: the system does not let it be read,
    or a newer version of this library wrote it."""

    @property
    def ok(self) -> bool:
        """Whether all of it was read, and nothing is damaged."""
        return not (self.damage or self.unreadable)

    def __str__(self) -> str:
        verdict = "DAMAGED" if self.damage else "UNREADABLE" if self.unreadable else "ok"
        lines = [f"{self.path}: {verdict} ({self.bytes_read} bytes read)"]
        lines += [f"  damage: {reason}" for reason in self.damage]
        lines += [f"  unreadable: {reason}" for reason in self.unreadable]
        lines += [f"  extra file: {extra_text(name)}" for name in self.extra]
        return "\n".join(lines)


@dataclass(frozen=True)
class VerifyReport:
    """The result of ``verify``: one report for each checkpoint, in commit order, those without a manifest last."""

    __module__ = "checkpointer"

    checkpoints: tuple[CheckpointReport, ...]

    @property
    def ok(self) -> bool:
        """Whether every checkpoint was read as a whole, and none is damaged."""
        return all(report.ok for report in self.checkpoints)

    def __str__(self) -> str:
        damaged = sum(bool(report.damage) for report in self.checkpoints)
        unreadable = sum(not (report.ok or report.damage) for report in self.checkpoints)
        summary = f"{len(self.checkpoints)} checkpoints checked, {damaged} damaged"
        summary += f", {unreadable} unreadable" if unreadable else ""
        return "\n".join([*map(str, self.checkpoints), summary])


def verify_checkpoint(storage: Storage, directory: str, manifest: Manifest, info: CheckpointInfo) -> CheckpointReport:
    """Read and hash every byte that the manifest lists, file by file, and look for files that it does not.

    What the system does not let be read is reported as unreadable: that says nothing of its bytes.
    """
    damage: list[str] = []
    refused: list[str] = []
    extra: tuple[str, ...] = ()
    files: Collection[str] = manifest.index
    read = 0
    try:
        with CheckpointReader(storage, directory, manifest) as reader:
            files = reader.files.keys()
            parts = _parts_by_file(reader)
            for path, record in reader.files.items():
                try:
                    damage += _check_file(reader, path, parts[path])
                    read += record.size
                except UnreadableCheckpointError as error:
                    refused.append(str(error))
    except UnreadableCheckpointError as error:
        refused.append(str(error))
    except (CheckpointerError, FileNotFoundError) as error:
        damage.append(str(error))
    try:
        with refusals_typed(storage, directory):
            extra = tuple(extra_files(storage, directory, manifest, files))
    except UnreadableCheckpointError as error:
        refused.append(str(error))
    return CheckpointReport(info.path, info.step, info, tuple(damage), extra, read, tuple(dict.fromkeys(refused)))


class _Part(NamedTuple):
    """Bytes of a file that have a hash of their own."""

    name: str
    begin: int
    end: int
    xxh3: str
    dtype: str = ""
    chunk: Chunk | None = None
    """``None``: the header of a tensor file."""


def _parts_by_file(reader: CheckpointReader) -> dict[str, list[_Part]]:
    """The parts of each tensor file, in order and without gaps; none of other files."""
    found: dict[str, list[_Part]] = {path: [] for path in reader.files}
    for path, record in reader.files.items():
        if record.header is not None:
            found[path].append(_Part("header", 0, *record.header))
    for name, dtype, chunk in reader.all_chunks():
        found[chunk.file].append(_Part(name, chunk.begin, chunk.end, chunk.xxh3, dtype, chunk))
    for parts in found.values():
        parts.sort(key=lambda part: part[1:3])
    return found


def _check_file(reader: CheckpointReader, path: str, parts: Sequence[_Part]) -> Iterator[str]:
    """One pass over a file: its own hash, and the hash of each part of it that the index knows."""
    record = reader.files[path]
    inside = (
        record.header is None
    )  # a part of the index, in which small tensors lie: not all of it has hashes of its own
    spans = [("file", 0, record.size, None)] if inside else [part[:4] for part in parts]
    whole = xxhash.xxh3_128()
    try:
        for name, begin, end, expected in spans:
            part = xxhash.xxh3_128()
            for block in reader.blocks(path, begin, end):
                part.update(block)
                whole.update(block)
            if expected is not None and part.hexdigest() != expected:
                yield f"{path}: bytes {begin} to {end} ({name}) do not match their hash"
        if inside:
            yield from _check_inside(reader, path, parts)
    except CorruptCheckpointError as error:
        yield str(error)
        return
    if whole.hexdigest() != record.xxh3:
        yield f"{path}: its bytes do not match its hash"
    elif record.header is not None:
        yield from _check_header(reader, path, record.header[0], parts[1:])


def _check_inside(reader: CheckpointReader, path: str, parts: Sequence[_Part]) -> Iterator[str]:
    for part in parts:
        if xxhash.xxh3_128_hexdigest(reader.whole(path, part.begin, part.end)) != part.xxh3:
            yield f"{path}: bytes {part.begin} to {part.end} ({part.name}) do not match their hash"


def _check_header(reader: CheckpointReader, path: str, length: int, parts: Sequence[_Part]) -> Iterator[str]:
    chunks = [(part.dtype, part.chunk) for part in parts if part.chunk is not None]
    try:
        check_header(reader.whole(path, 0, length), chunks, f"the header of {path}")
    except CorruptCheckpointError as error:
        yield str(error)


def extra_files(storage: Storage, directory: str, manifest: Manifest, files: Iterable[str]) -> list[str]:
    """Files in a checkpoint's directory that are not among its ``files``."""
    listed = {paths.MANIFEST, *map(manifest.place, files)}
    return sorted(path for path in walk(storage, directory) if path not in listed)


def extra_text(name: str) -> str:
    """Name such a file, and say what becomes of it where it is nobody's."""
    kind = paths.left_by_system(name)
    about = {"debris": " (left by the system: it goes with the checkpoint)", "open": " (removed, and open somewhere)"}
    return name if kind is None else name + about[kind]
