"""The storage reader: each rank reads the byte ranges that it needs, from chunks of any layout, and checks them."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from checkpointer.commit import read_manifest
from checkpointer.dcp.places import MODEL, OBJECTS, Place, is_place, is_plugin_made, parse_place, paths_of
from checkpointer.distributed.boxes import Box, reads_of_box
from checkpointer.errors import CheckpointNotFoundError, ConfigError, CorruptCheckpointError
from checkpointer.index import Chunk, Component, Index, Json
from checkpointer.reading import CheckpointReader, ChunkRead
from checkpointer.state.decoding import decode
from checkpointer.state.tensors import DTYPES, empty_for
from checkpointer.storage import open_storage
from checkpointer.targets import TensorTarget

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class _Checks:
    """Chunks that this rank checks as a whole, because no rank needs all of their bytes: (name, number)."""

    chunks: tuple[tuple[str, int], ...]


class SafetensorsReader(StorageReader):
    """Reads checkpoints of this library's format for ``dcp.load``: see :mod:`checkpointer.dcp`.

    Checkpoints that a :class:`~checkpointer.CheckpointManager` has written, too: their tensors are named
    ``<component>.<key>``.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        storage_options: Mapping[str, object] | None = None,
        verify: bool = True,
    ) -> None:
        """Prepare; nothing is read yet.

        Args:
            path: ``<run root>/checkpoint-<step>``, path or fsspec URL; or leave it to ``dcp.load(checkpoint_id=…)``.
            storage_options: handed to fsspec.
            verify: check the hash of everything that is read.

        Raises:
            ConfigError: the path has another form.
        """
        super().__init__()
        self._options = dict(storage_options or {})
        self._verify = verify
        self._place: Place | None = None if path is None else parse_place(path)
        self._reader: CheckpointReader | None = None
        self.checkpoint_id: str | os.PathLike[str] | None = path
        """The directory, as it was given."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every file; a load that succeeds does so itself."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a new load, from ``checkpoint_id`` if one is given. DCP calls this."""
        self.close()
        if checkpoint_id is not None:
            self._place, self.checkpoint_id = parse_place(checkpoint_id), checkpoint_id

    def read_metadata(self) -> Metadata:
        """What the checkpoint holds, in DCP's words. DCP calls this on every rank.

        Raises:
            CheckpointNotFoundError: there is none.
            CorruptCheckpointError: it is damaged.
        """
        reader = self._opened()
        index = reader.index
        identity = StorageMeta(self.checkpoint_id, save_id=reader.manifest.id)
        found = Metadata(state_dict_metadata={}, planner_data={}, storage_meta=identity)
        for name, path, tensor in _tensors(index):
            component, key = tensor
            chunks = index.chunks[tensor]
            spec = index.components[component].tensors[key]
            found.state_dict_metadata[name] = TensorStorageMetadata(
                TensorProperties(dtype=DTYPES[spec.dtype]), torch.Size(spec.shape), [_chunk(part) for part in chunks]
            )
            found.planner_data[name] = path
        for name, path in _objects(index):
            found.state_dict_metadata[name] = BytesStorageMetadata()
            found.planner_data[name] = path
        return found

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:  # noqa: FBT001
        """Check the parts of the checkpoint that every rank relies on. DCP calls this."""
        del metadata, args, kwargs
        if is_coordinator and self._verify:
            self._opened().check_metadata()

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Leave the plan as it is. DCP calls this."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Share out the checking of chunks that no rank reads as a whole. DCP calls this on the coordinator."""
        tensors = {name: self._opened().index.chunks[tensor] for name, _, tensor in _tensors(self._opened().index)}
        whole: set[tuple[str, int]] = set()
        partly: dict[tuple[str, int], int] = {}
        for rank, plan in enumerate(plans):
            for item in plan.items:
                if item.type is LoadItemType.TENSOR:
                    number = _number_of(tensors[item.storage_index.fqn], item.storage_index)
                    place = (item.storage_index.fqn, number)
                    if tuple(item.lengths) == tensors[place[0]][number].lengths:
                        whole.add(place)
                    else:
                        partly.setdefault(place, rank)
        shares: list[list[tuple[str, int]]] = [[] for _ in plans]
        for place, rank in partly.items():
            if place not in whole:
                shares[rank].append(place)
        return [replace(plan, storage_data=_Checks(tuple(share))) for plan, share in zip(plans, shares, strict=True)]

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read this rank's items into the planner's tensors. DCP calls this."""
        reader = self._opened()
        _Load(reader, plan.items, planner).run(verify=self._verify)
        checks = plan.storage_data
        if self._verify and isinstance(checks, _Checks):
            places = {name: tensor for name, _, tensor in _tensors(reader.index)}
            reader.check_chunks((name, reader.index.chunks[places[name]][number]) for name, number in checks.chunks)
        self.close()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether ``checkpoint_id`` has the form of a checkpoint's directory."""
        return is_place(checkpoint_id)

    def _opened(self) -> CheckpointReader:
        if self._place is None:
            raise ConfigError("no directory was given: SafetensorsReader('runs/gpt/checkpoint-500')")
        if self._reader is None:
            storage = open_storage(self._place.root, self._options)
            manifest = read_manifest(storage, self._place.name)
            if manifest is None:
                raise CheckpointNotFoundError(f"there is no checkpoint in {storage.place(self._place.name)}")
            self._reader = CheckpointReader(storage, self._place.name, manifest)
        return self._reader


class _Load:
    """The reads of one rank."""

    def __init__(self, reader: CheckpointReader, items: Sequence[ReadItem], planner: LoadPlanner) -> None:
        self._reader = reader
        self._items = items
        self._planner = planner
        self._places = {name: tensor for name, _, tensor in _tensors(reader.index)}
        self._filled: list[tuple[ReadItem, torch.Tensor]] = []
        """What the planner has handed out for each item. To ask again might bring other memory."""
        self._bounced: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Tensors that were read in the saved dtype, and where they go."""

    def run(self, *, verify: bool) -> None:
        reads = [read for item in self._items if item.type is LoadItemType.TENSOR for read in self._reads(item)]
        self._reader.read([read for read in reads if read.chunk.xxh3], verify=verify)
        self._reader.read([read for read in reads if not read.chunk.xxh3], verify=False)
        with torch.no_grad():
            for target, value in self._bounced:
                target.copy_(value)
        for item, tensor in self._filled:
            self._planner.commit_tensor(item, tensor)
        self._load_objects([item for item in self._items if item.type is not LoadItemType.TENSOR], verify=verify)

    def _reads(self, item: ReadItem) -> Iterator[ChunkRead]:
        name = item.storage_index.fqn
        component, key = self._places[name]
        chunks = self._reader.index.chunks[component, key]
        chunk = chunks[_number_of(chunks, item.storage_index)]
        target = self._planner.resolve_tensor(item).detach()
        self._filled.append((item, target))
        dtype = DTYPES[self._reader.index.components[component].tensors[key].dtype]
        if target.dtype != dtype:
            value = torch.empty(target.shape, dtype=dtype, device=target.device)
            self._bounced.append((target, value))
            target = value
        offsets = tuple(a + b for a, b in zip(chunk.offsets, item.storage_offsets, strict=True))
        yield from reads_of_box(name, chunk, Box(offsets, tuple(item.lengths)), target)

    def _load_objects(self, items: Sequence[ReadItem], *, verify: bool) -> None:
        if not items:
            return
        component = self._reader.index.components[OBJECTS]
        nodes = _nodes(component)
        tensors = self._inner_tensors(component, verify=verify)
        for item in items:
            name = item.storage_index.fqn
            value = decode(nodes[name], tensors, place=name, specs=component.tensors)
            _hand_over(self._planner, item, value)

    def _inner_tensors(self, component: Component, *, verify: bool) -> dict[str, torch.Tensor]:
        found = {key: empty_for(spec, "cpu") for key, spec in component.tensors.items()}
        chunks = {key: self._reader.index.chunks[OBJECTS, key] for key in found}
        reads = [
            ChunkRead(key, part, TensorTarget(found[key], part)) for key, parts in chunks.items() for part in parts
        ]
        self._reader.read(reads, verify=verify)
        return found


def _hand_over(planner: LoadPlanner, item: ReadItem, value: Any) -> None:
    """Give a decoded value to the planner, which expects pickled bytes of it."""
    if isinstance(planner, DefaultLoadPlanner) and type(planner).load_bytes is DefaultLoadPlanner.load_bytes:
        name = item.dest_index.fqn
        if planner.flatten_state_dict:
            _set(planner.original_state_dict, planner.mappings[name], value)
        else:
            planner.state_dict[name] = value
        return
    packed = io.BytesIO()  # never on disk: only for a planner that knows nothing else
    torch.save(value, packed)
    packed.seek(0)
    planner.load_bytes(item, packed)


def _set(state: Any, path: Sequence[str | int], value: Any) -> None:
    for part in path[:-1]:
        state = state[part]
    state[path[-1]] = value


def _tensors(index: Index) -> Iterator[tuple[str, tuple[str | int, ...], tuple[str, str]]]:
    """DCP's name, the keys that lead there, and (component, key) of every tensor."""
    if is_plugin_made(index):
        component = index.components[MODEL]
        paths = paths_of(component.meta)
        yield from ((key, paths.get(key, (key,)), (MODEL, key)) for key in component.tensors)
        return
    for name, component in index.components.items():
        yield from ((f"{name}.{key}", (name, key), (name, key)) for key in component.tensors)


def _objects(index: Index) -> Iterator[tuple[str, tuple[str | int, ...]]]:
    component = index.components.get(OBJECTS)
    if is_plugin_made(index) and component is not None:
        paths = paths_of(component.meta)
        yield from ((name, paths.get(name, (name,))) for name in _nodes(component))


def _nodes(component: Component) -> dict[str, Json]:
    """The trees of all values that are no tensors, by name."""
    tree = component.tree
    if isinstance(tree, dict) and set(tree) == {"$dict"} and isinstance(tree["$dict"], list):
        tree = {str(pair[0]): pair[1] for pair in tree["$dict"] if isinstance(pair, list) and len(pair) == 2}
    if not isinstance(tree, dict):
        raise CorruptCheckpointError("the tree of the component 'objects' is not well formed")
    return tree


def _chunk(chunk: Chunk) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.lengths))


def _number_of(chunks: Sequence[Chunk], index: MetadataIndex) -> int:
    """Which chunk an index means: its hint is right unless a planner has changed the order."""
    hint = index.index
    if (
        hint is not None
        and hint < len(chunks)
        and (index.offset is None or chunks[hint].offsets == tuple(index.offset))
    ):
        return int(hint)
    offset = tuple(index.offset or (0,) * len(chunks[0].offsets))
    return next(number for number, chunk in enumerate(chunks) if chunk.offsets == offset)
