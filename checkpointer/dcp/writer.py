"""The storage writer: each rank writes one safetensors file into one attempt, and the coordinator commits it."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from math import prod
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from checkpointer import layout
from checkpointer.commit import Attempt
from checkpointer.dcp.places import MODEL, OBJECTS, PATHS, Place, is_place, parse_place
from checkpointer.distributed.boxes import Box, whole
from checkpointer.distributed.shardfile import Piece, WrittenFile, write_pieces
from checkpointer.environment import environment
from checkpointer.errors import ConfigError, UnsupportedStateError
from checkpointer.index import Chunk, Component, Index, Json, TensorSpec, parse_index
from checkpointer.manifest import Manifest
from checkpointer.repository import Repository
from checkpointer.state.codec import Encoder
from checkpointer.state.tensors import STORABLE, dtype_name
from checkpointer.storage import open_storage
from checkpointer.tensorfile import joined_shard_indexes


@dataclass(frozen=True)
class _Part:
    """What the coordinator tells a rank: where to write, and under which names."""

    step: int
    id: str
    rank: int
    path: str
    """Of the rank's file of tensors."""


@dataclass(frozen=True)
class _Stored:
    """What a rank reports of one item: a chunk, or the tree of an object with the tensors that it refers to."""

    chunk: Chunk | None = None
    node: Json = None
    inner: Mapping[str, tuple[TensorSpec, Chunk]] = field(default_factory=dict)
    files: tuple[WrittenFile, ...] = ()
    """All files of the rank, in the report of its first item."""


class SafetensorsWriter(StorageWriter):
    """Writes what DCP saves as a checkpoint of this library's format: see :mod:`checkpointer.dcp`.

    For one save at a time. The coordinator holds the run's writer lock from planning to the commit, and waits for
    nobody else: a run root that a :class:`~checkpointer.CheckpointManager` is writing to is refused.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        storage_options: Mapping[str, object] | None = None,
        durable: bool = True,
        threads: int = 2,
        epoch: int | None = None,
        metrics: Mapping[str, float] | None = None,
        tags: Iterable[str] = (),
    ) -> None:
        """Prepare; nothing is read or written yet.

        Args:
            path: ``<run root>/checkpoint-<step>``, path or fsspec URL; or leave it to ``dcp.save(checkpoint_id=…)``.
            storage_options: handed to fsspec.
            durable: fsync; false only for throw-away runs.
            threads: that write one large file.
            epoch: recorded in the manifest, as are ``metrics`` and ``tags``.
            metrics: numbers that retention can go by.
            tags: words to find the checkpoint by.

        Raises:
            ConfigError: the path has another form.
        """
        super().__init__()
        self._options = dict(storage_options or {})
        self._durable, self._threads = durable, threads
        self._epoch, self._metrics, self._tags = epoch, dict(metrics or {}), tuple(tags)
        self._place: Place | None = None if path is None else parse_place(path)
        self.checkpoint_id: str | os.PathLike[str] | None = path
        """The directory, as it was given."""
        self._session = _Session.of(self)

    def __getstate__(self) -> dict[str, Any]:
        """For the process in which DCP can save asynchronously: a writer that has begun nothing."""
        return {name: value for name, value in self.__dict__.items() if name != "_session"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._session = _Session.of(self)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a new save, to ``checkpoint_id`` if one is given. DCP calls this."""
        self._session.give_up()
        if checkpoint_id is not None:
            self._place, self.checkpoint_id = parse_place(checkpoint_id), checkpoint_id

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:  # noqa: FBT001
        """Open the run root; the coordinator takes the writer's lock. DCP calls this on every rank."""
        del args
        if not kwargs.get("use_collectives", True):
            raise ConfigError("use_collectives=False leaves no one to commit for all ranks: leave it out")
        self._session.give_up()
        place = self._known_place()
        storage = open_storage(place.root, self._options, durable=self._durable, threads=self._threads)
        repository = self._session.begin(Repository(storage))
        if is_coordinator:
            repository.lock.acquire()
            repository.recover()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Leave the plan as it is. DCP calls this."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Begin the attempt, and name each rank's file. DCP calls this on the coordinator."""
        place, session = self._known_place(), self._session
        if not all(plan.usable for plan in plans):
            raise ConfigError("enable_plan_caching repeats the names of an earlier save's files: leave it out")
        assert session.repository is not None
        session.attempt = session.repository.begin(place.step, sum(map(_size, plans)))
        names = _file_names(plans)
        return [
            replace(plan, storage_data=_Part(place.step, session.attempt.id, rank, name))
            for rank, (plan, name) in enumerate(zip(plans, names, strict=True))
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's items, durably. DCP calls this."""
        part, repository = plan.storage_data, self._session.repository
        assert isinstance(part, _Part)
        assert repository is not None
        attempt = self._session.attempt or repository.join(part.step, part.id)
        if attempt.id != part.id:
            raise ConfigError("this planner repeats an earlier save's plan, which names files that exist: do without")
        done: Future[list[WriteResult]] = Future()
        done.set_result(_RankFiles(attempt, part, plan.items, planner).write())
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Check that every byte is there, and commit. DCP calls this on the coordinator, after all have written."""
        session = self._session
        repository, attempt = session.repository, session.attempt
        assert repository is not None
        assert attempt is not None
        reports = [(result.index, result.storage_data) for rank in results for result in rank]
        for file in (file for _, stored in reports for file in stored.files):
            attempt.files[file.path] = file.record
        index = _index(metadata, reports)
        data = index.to_bytes()
        parse_index(data, {path: record.size for path, record in attempt.files.items()}, "the new index")
        for path, content in {layout.INDEX: data, **joined_shard_indexes(index)}.items():
            attempt.write(path, [content], len(content))
        repository.commit(attempt, self._manifest(repository, attempt, len(results)))
        session.attempt = None
        session.give_up()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether ``checkpoint_id`` is a directory that this writer can write."""
        return is_place(checkpoint_id)

    @contextmanager
    def given_up_on_error(self) -> Iterator[None]:
        """Remove what a save has written, and free the lock, if it fails: DCP tells the writer nothing of that."""
        try:
            yield
        except BaseException:
            self._session.give_up()
            raise

    def _known_place(self) -> Place:
        if self._place is None:
            raise ConfigError("no directory was given: SafetensorsWriter('runs/gpt/checkpoint-500')")
        return self._place

    def _manifest(self, repository: Repository, attempt: Attempt, ranks: int) -> Manifest:
        listing = repository.list_checkpoints()
        parent = listing.checkpoints[-1].id if listing.checkpoints else None
        return Manifest(
            id=attempt.id,
            parent=parent,
            sequence=listing.next_sequence,
            step=attempt.step,
            epoch=self._epoch,
            created=datetime.now(timezone.utc),
            metrics=self._metrics,
            tags=self._tags,
            world_size=ranks,
            data=attempt.data,
            files=dict(attempt.files),
            environment=environment(),
        )


class _Session:
    """What one save holds on to. Apart from the writer, so that it can be given up when that is collected."""

    def __init__(self) -> None:
        self.repository: Repository | None = None
        self.attempt: Attempt | None = None
        self._thread = threading.current_thread()

    @classmethod
    def of(cls, writer: SafetensorsWriter) -> _Session:
        """For ``writer``, and no longer than it is there."""
        session = cls()
        weakref.finalize(writer, session.give_up)
        return session

    def begin(self, repository: Repository) -> Repository:
        """Begin a save, and give up those that have failed.

        DCP tells a writer nothing of what fails on other ranks, and a program may keep it. But a thread makes one save
        at a time: an earlier one of this thread, or of one that has ended, is over.
        """
        self._thread = threading.current_thread()
        for other in tuple(_begun):
            if other is not self and other.over:
                other.give_up()
        self.repository = repository
        _begun.add(self)
        return repository

    @property
    def over(self) -> bool:
        """Whether its save cannot be running any more."""
        return self._thread is threading.current_thread() or not self._thread.is_alive()

    def give_up(self) -> None:
        """Remove what was written and not committed, and free the lock."""
        _begun.discard(self)
        repository, attempt = self.repository, self.attempt
        self.repository = self.attempt = None
        if repository is None or not repository.lock.held:
            return
        try:
            if attempt is not None:
                repository.abandon(attempt)
        finally:
            repository.lock.release()


_begun: set[_Session] = set()
"""The saves of this process that are neither committed nor given up."""


class _RankFiles:
    """The files of one rank."""

    def __init__(self, attempt: Attempt, part: _Part, items: Sequence[WriteItem], planner: SavePlanner) -> None:
        self._attempt = attempt
        self._part = part
        self._items = items
        self._planner = planner

    def write(self) -> list[WriteResult]:
        """Write them; one result for each item."""
        pieces: list[Piece] = []
        inner: list[Piece] = []
        objects: dict[int, tuple[Json, list[str]]] = {}
        for number, item in enumerate(self._items):
            if item.type is WriteItemType.BYTE_IO:
                node, tensors = self._encoded(number, item.index)
                objects[number] = (node, list(tensors))
                inner += [Piece(key, whole(tuple(tensor.shape)), tensor) for key, tensor in tensors.items()]
            elif _worth_storing(item):
                pieces.append(self._piece(item))
        written = self._write(self._part.path, MODEL, pieces)
        beside = self._write(layout.rank_file(OBJECTS, self._part.rank), OBJECTS, inner)
        files = tuple(file for file in (written, beside) if file is not None)
        chunks = iter(written.chunks if written is not None else ())
        places = {
            piece.key: (piece.spec, chunk)
            for piece, chunk in zip(inner, beside.chunks if beside is not None else (), strict=True)
        }
        results: list[WriteResult] = []
        for number, item in enumerate(self._items):
            if number in objects:
                node, keys = objects[number]
                stored = _Stored(node=node, inner={key: places[key] for key in keys})
            else:
                stored = _Stored(chunk=next(chunks) if _worth_storing(item) else None)
            results.append(_result(item, stored if results else replace(stored, files=files)))
        return results

    def _write(self, path: str, component: str, pieces: Sequence[Piece]) -> WrittenFile | None:
        return write_pieces(self._attempt, path, component, pieces) if pieces else None

    def _piece(self, item: WriteItem) -> Piece:
        tensor = self._planner.resolve_data(item)
        name = item.index.fqn
        if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided or tensor.is_quantized:
            raise UnsupportedStateError(f"{name}: only strided tensors can be stored by DCP, got {type(tensor)}")
        if tensor.dtype not in STORABLE:
            raise UnsupportedStateError(f"{name}: a tensor of dtype {tensor.dtype} cannot be stored")
        assert item.tensor_data is not None
        chunk = item.tensor_data.chunk
        return Piece(name, Box(tuple(chunk.offsets), tuple(chunk.sizes)), tensor.detach())

    def _encoded(self, number: int, index: MetadataIndex) -> tuple[Json, dict[str, torch.Tensor]]:
        """Tree and tensors of a value that DCP would pickle. The keys of its tensors are its own on all ranks."""
        lookup = getattr(self._planner, "lookup_object", None)
        if lookup is None:
            kind = type(self._planner).__qualname__
            raise UnsupportedStateError(
                f"{index.fqn}: {kind} gives no object but pickled bytes; see DefaultSavePlanner"
            )
        encoder = Encoder(index.fqn)
        node = encoder.encode_at([("[]", f"{self._part.rank}-{number}")], lookup(index))
        return node, encoder.tensors


def _result(item: WriteItem, stored: _Stored) -> WriteResult:
    size = 0 if stored.chunk is None else stored.chunk.end - stored.chunk.begin
    return WriteResult(index=item.index, size_in_bytes=size, storage_data=stored)


def _worth_storing(item: WriteItem) -> bool:
    """Whether an item is a chunk: an empty box is none, unless the tensor is empty itself."""
    data = item.tensor_data
    return data is not None and (0 not in data.chunk.sizes or 0 in data.size)


def _size(plan: SavePlan) -> int:
    tensors = [item.tensor_data for item in plan.items if item.tensor_data is not None]
    return sum(prod(data.chunk.sizes) * data.properties.dtype.itemsize for data in tensors)


def _file_names(plans: Sequence[SavePlan]) -> list[str]:
    """The file of each rank's tensors: as Hugging Face names shards, where each tensor is whole in one of them."""
    held = [[item.tensor_data for item in plan.items if item.tensor_data and _worth_storing(item)] for plan in plans]
    cut = any(data.chunk.sizes != data.size for tensors in held for data in tensors)
    if cut:
        return [layout.rank_file(MODEL, rank) for rank in range(len(plans))]
    numbers = {
        rank: number for number, rank in enumerate((rank for rank, tensors in enumerate(held) if tensors), start=1)
    }
    return [layout.tensor_file(MODEL, numbers.get(rank, 1), max(len(numbers), 1)) for rank in range(len(plans))]


def _index(metadata: Metadata, reports: Sequence[tuple[MetadataIndex, _Stored]]) -> Index:
    """What all ranks have reported, as one index."""
    paths: dict[str, tuple[str | int, ...]] = metadata.planner_data or {}
    specs = {
        name: TensorSpec(dtype_name(entry.properties.dtype), tuple(entry.size))
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    chunks: dict[tuple[str, str], tuple[Chunk, ...]] = {(MODEL, name): () for name in specs}
    inner: dict[str, TensorSpec] = {}
    tree: dict[str, Json] = {}
    headers: dict[str, tuple[int, str]] = {}
    for index, stored in reports:
        headers.update({file.path: file.header for file in stored.files})
        if stored.chunk is not None:
            chunks[MODEL, index.fqn] += (stored.chunk,)
        elif index.fqn not in specs:
            tree[index.fqn] = stored.node
            for key, (spec, chunk) in stored.inner.items():
                inner[key], chunks[OBJECTS, key] = spec, (chunk,)
    model = Component("module", {}, specs, {"inner": [], PATHS: _nested(paths, specs)})
    components = {MODEL: model}
    if tree:
        components[OBJECTS] = Component("container", _dict_node(tree), inner, {PATHS: _nested(paths, tree)})
    return Index(components, chunks, headers)


def _nested(paths: Mapping[str, tuple[str | int, ...]], names: Iterable[str]) -> Json:
    return {name: list(paths[name]) for name in names if paths.get(name, (name,)) != (name,)}


def _dict_node(tree: Mapping[str, Json]) -> Json:
    """A dict of encoded values as the codec writes it."""
    if any(name.startswith("$") for name in tree):
        return {"$dict": [[name, node] for name, node in tree.items()]}
    return dict(tree)
