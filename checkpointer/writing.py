"""Writing one checkpoint: tensor files, small files, index, manifest, commit. Nothing is visible before the last."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import xxhash

from checkpointer import layout
from checkpointer.commit import Attempt
from checkpointer.index import Chunk, Component, Index, Json
from checkpointer.info import CheckpointInfo
from checkpointer.manifest import Manifest
from checkpointer.repository import Repository
from checkpointer.staging import StagedComponent, StagedTensor
from checkpointer.storage import Buffer, blocks
from checkpointer.tensorfile import SHARD_LIMIT, ComponentTensors, TensorFile, plan_files, shard_indexes

WRITE_BLOCK = 8 << 20
"""Bytes hashed and handed to the storage at a time."""

logger = logging.getLogger("checkpointer")


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Everything that one ``save`` call captured."""

    step: int
    epoch: int | None
    created: datetime
    metrics: Mapping[str, float]
    tags: tuple[str, ...]
    components: Mapping[str, StagedComponent]
    attachments: Mapping[str, bytes]
    parent: str | None
    environment: Mapping[str, Json]
    statistics: Mapping[str, Json] = field(default_factory=dict)


def write_checkpoint(repository: Repository, snapshot: Snapshot, shard_limit: int = SHARD_LIMIT) -> CheckpointInfo:
    """Write and commit; durable when this returns. On any error nothing is visible and what was written is removed."""
    tensors = {name: _tensors_of(component) for name, component in snapshot.components.items()}
    files = plan_files(tensors, shard_limit)
    small = _small_files(snapshot, files, tensors)
    began = time.perf_counter()
    size = sum(file.size for file in files) + sum(map(len, small.values()))
    attempt = repository.begin(snapshot.step, size)
    try:
        chunks = _write_tensors(attempt, files, snapshot.components)
        for path, data in small.items():
            attempt.write(path, [data], len(data))
        index = _index(snapshot, files, chunks).to_bytes()
        attempt.write(layout.INDEX, [index], len(index))
        manifest = _manifest(repository, snapshot, attempt, time.perf_counter() - began)
        return repository.commit(attempt, manifest)
    except BaseException:
        _abandon(repository, attempt)
        raise


def _abandon(repository: Repository, attempt: Attempt) -> None:
    """Tidy up after a failure, whose own error matters more than one met here."""
    try:
        repository.abandon(attempt)
    except OSError:
        logger.warning("could not remove the unfinished %s; the next writer will", attempt.directory, exc_info=True)


def _tensors_of(component: StagedComponent) -> ComponentTensors:
    specs = {key: tensor.spec for key, tensor in component.tensors.items()}
    return ComponentTensors(component.kind, specs, component.frozen, component.aliases)


def _small_files(
    snapshot: Snapshot, files: Sequence[TensorFile], tensors: Mapping[str, ComponentTensors]
) -> dict[str, bytes]:
    attached = {f"{layout.ATTACHMENTS}/{name}": data for name, data in snapshot.attachments.items()}
    return {**shard_indexes(files, tensors), **attached}


def _write_tensors(
    attempt: Attempt, files: Sequence[TensorFile], components: Mapping[str, StagedComponent]
) -> dict[tuple[str, str], tuple[Chunk, ...]]:
    chunks: dict[tuple[str, str], tuple[Chunk, ...]] = {}
    for file in files:
        hashes: list[str] = []
        attempt.write(file.path, _file_pieces(file, components, hashes), file.size)
        for slot, xxh3 in zip(file.slots, hashes, strict=True):
            shape = components[slot.component].tensors[slot.key].spec.shape
            chunk = Chunk((0,) * len(shape), shape, file.path, slot.begin, slot.end, xxh3)
            chunks[slot.component, slot.key] = (chunk,)
    return chunks


def _file_pieces(file: TensorFile, components: Mapping[str, StagedComponent], hashes: list[str]) -> Iterator[Buffer]:
    """Header and tensors of one file, in order; the hash of each tensor is appended to ``hashes`` as it passes."""
    yield file.header
    for slot in file.slots:
        yield from _hashed(components[slot.component].tensors[slot.key], hashes)


def _hashed(tensor: StagedTensor, hashes: list[str]) -> Iterator[memoryview]:
    hasher = xxhash.xxh3_128()
    for block in blocks(tensor.bytes(), WRITE_BLOCK):
        hasher.update(block)
        yield block
    hashes.append(hasher.hexdigest())


def _index(
    snapshot: Snapshot, files: Sequence[TensorFile], chunks: Mapping[tuple[str, str], tuple[Chunk, ...]]
) -> Index:
    components = {
        name: Component(
            kind=component.kind,
            tree=component.tree,
            tensors={key: tensor.spec for key, tensor in component.tensors.items()},
            meta=component.meta,
        )
        for name, component in snapshot.components.items()
    }
    headers = {file.path: (len(file.header), xxhash.xxh3_128_hexdigest(file.header)) for file in files}
    return Index(components, chunks, headers)


def _manifest(repository: Repository, snapshot: Snapshot, attempt: Attempt, seconds: float) -> Manifest:
    return Manifest(
        id=attempt.id,
        parent=snapshot.parent,
        sequence=repository.list_checkpoints().next_sequence,
        step=snapshot.step,
        epoch=snapshot.epoch,
        created=snapshot.created,
        metrics=snapshot.metrics,
        tags=snapshot.tags,
        data=attempt.data,
        files=dict(attempt.files),
        environment=snapshot.environment,
        statistics={**snapshot.statistics, "write_seconds": round(seconds, 6)},
    )
