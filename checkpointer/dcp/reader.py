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

from checkpointer.dcp.checkpoint_id import CheckpointId, is_checkpoint_id, parse_checkpoint_id
from checkpointer.dcp.contents import Contents, Held, TensorAt, ValueAt
from checkpointer.distributed.box_reads import reads_of_box
from checkpointer.distributed.read_plan import Reads
from checkpointer.errors import CheckpointNotFoundError, ConfigError
from checkpointer.format.boxes import Box
from checkpointer.format.index import Chunk, Index, TensorSpec
from checkpointer.repository.checkpoint_reader import CheckpointReader, ChunkRead
from checkpointer.repository.commit import read_manifest
from checkpointer.staging.read_targets import TensorTarget
from checkpointer.state.modes import outside_inference_mode, refuse_to_restore, wait_for_devices, writing_to
from checkpointer.state.tensors import DTYPES, empty_for
from checkpointer.state.tree.decode import decode, skeleton
from checkpointer.storage import open_storage

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class _Checks:
    """Chunks that this rank checks as a whole, because no rank needs all of their bytes: (name, number)."""

    chunks: tuple[tuple[str, int], ...]


class SafetensorsReader(StorageReader):
    """Reads checkpoints of this library's format for ``dcp.load``: see :mod:`checkpointer.dcp`.

    Checkpoints that a :class:`~checkpointer.CheckpointManager` has written, too, as the state ``{component: its
    state_dict()}``. The state of an optimizer has the names of its own ``state_dict()`` and those that DCP's
    ``get_optimizer_state_dict`` gives it.
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
        self._place: CheckpointId | None = None if path is None else parse_checkpoint_id(path)
        self._open: _Opened | None = None
        self.checkpoint_id: str | os.PathLike[str] | None = path
        """The directory, as it was given."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every file; a load that succeeds does so itself."""
        opened, self._open = self._open, None
        if opened is not None:
            opened.reader.close()

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a new load, from ``checkpoint_id`` if one is given. DCP calls this."""
        self.close()
        if checkpoint_id is not None:
            self._place, self.checkpoint_id = parse_checkpoint_id(checkpoint_id), checkpoint_id

    def read_metadata(self) -> Metadata:
        """What the checkpoint holds, in DCP's words. DCP calls this on every rank.

        Raises:
            CheckpointNotFoundError: there is none.
            CorruptCheckpointError: it is damaged.
        """
        opened = self._opened()
        manifest = opened.reader.manifest
        contents = opened.contents
        return Metadata(
            state_dict_metadata=_Described(contents, opened.reader.index),
            planner_data=contents.paths,
            storage_meta=StorageMeta(self.checkpoint_id, save_id=manifest.id),
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:  # noqa: FBT001
        """Check the parts of the checkpoint that every rank relies on. DCP calls this."""
        del metadata, args, kwargs
        if is_coordinator and self._verify:
            self._opened().reader.check_metadata()

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Leave the plan as it is. DCP calls this."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Share out the checking of chunks that no rank reads as a whole. DCP calls this on the coordinator."""
        opened = self._opened()
        whole: set[tuple[str, int]] = set()
        partly: dict[tuple[str, int], int] = {}
        for rank, plan in enumerate(plans):
            for item in plan.items:
                if item.type is LoadItemType.TENSOR:
                    name = item.storage_index.fqn
                    chunks = opened.chunks(name)
                    place = (name, _number_of(chunks, item.storage_index))
                    if tuple(item.lengths) == chunks[place[1]].lengths:
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
        opened = self._opened()
        refuse_to_restore(str(self.checkpoint_id))
        with outside_inference_mode():
            _Load(opened, plan.items, planner).run(verify=self._verify)
        checks = plan.storage_data
        if self._verify and isinstance(checks, _Checks):
            opened.reader.check_chunks((name, opened.chunks(name)[number]) for name, number in checks.chunks)
        self.close()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether ``checkpoint_id`` has the form of a checkpoint's directory."""
        return is_checkpoint_id(checkpoint_id)

    def _opened(self) -> _Opened:
        if self._place is None:
            raise ConfigError("no directory was given: SafetensorsReader('runs/gpt/checkpoint-500')")
        if self._open is None:
            storage = open_storage(self._place.root, self._options)
            manifest = read_manifest(storage, self._place.name)
            if manifest is None:
                raise CheckpointNotFoundError(f"there is no checkpoint in {storage.place(self._place.name)}")
            self._open = _Opened.of(CheckpointReader(storage, self._place.name, manifest))
        return self._open


@dataclass(frozen=True)
class _Opened:
    """A checkpoint that is open."""

    reader: CheckpointReader
    contents: Contents

    @classmethod
    def of(cls, reader: CheckpointReader) -> _Opened:
        try:
            return cls(reader, Contents.of(reader.index))
        except BaseException:
            reader.close()
            raise

    def chunks(self, name: str) -> Sequence[Chunk]:
        """Of a tensor, by DCP's name."""
        held = self.contents.find(name)
        assert isinstance(held, TensorAt)
        return self.reader.index.chunks[held]


class _Described(dict[str, Any]):
    """What each name stands for, in DCP's words. Lists everything once, but knows other names too, if asked for one."""

    def __init__(self, contents: Contents, index: Index) -> None:
        super().__init__((name, _description(held, index)) for name, held in contents.listed.items())
        self._contents = contents
        self._index = index

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in self._contents.also

    def __missing__(self, name: str) -> TensorStorageMetadata | BytesStorageMetadata:
        return _description(self._contents.also[name], self._index)


def _description(held: Held, index: Index) -> TensorStorageMetadata | BytesStorageMetadata:
    if not isinstance(held, TensorAt):
        return BytesStorageMetadata()
    spec = index.components[held.component].tensors[held.key]
    chunks = [ChunkStorageMetadata(torch.Size(part.offsets), torch.Size(part.lengths)) for part in index.chunks[held]]
    return TensorStorageMetadata(TensorProperties(dtype=DTYPES[spec.dtype]), torch.Size(spec.shape), chunks)


class _Load:
    """The reads of one rank."""

    def __init__(self, opened: _Opened, items: Sequence[ReadItem], planner: LoadPlanner) -> None:
        self._opened = opened
        self._reader = opened.reader
        self._tensors = [item for item in items if item.type is LoadItemType.TENSOR]
        self._values = [item for item in items if item.type is not LoadItemType.TENSOR]
        self._planner = planner
        self._filled: list[tuple[ReadItem, torch.Tensor]] = []
        """What the planner has handed out for each item. To ask again might bring other memory."""
        self._bounced: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Tensors that were read in the saved dtype, and where they go."""

    def run(self, *, verify: bool) -> None:
        reads = Reads.split(read for item in self._tensors for read in self._reads(item))
        targets = [target for _, target in self._filled]
        wait_for_devices(targets)  # the threads that read give their copies to other streams than the caller's
        reads.carry_out(self._reader, verify=verify)
        wait_for_devices(targets)
        for target, value in self._bounced:
            with writing_to(target):
                target.copy_(value)
        for item, tensor in self._filled:
            self._planner.commit_tensor(item, tensor)
        self._load_values(verify=verify)

    def _reads(self, item: ReadItem) -> Iterator[ChunkRead]:
        name = item.storage_index.fqn
        chunks = self._opened.chunks(name)
        chunk = chunks[_number_of(chunks, item.storage_index)]
        target = self._planner.resolve_tensor(item).detach()
        self._filled.append((item, target))
        dtype = DTYPES[self._spec(name).dtype]
        if target.dtype != dtype:
            value = torch.empty(target.shape, dtype=dtype, device=target.device)
            self._bounced.append((target, value))
            target = value
        offsets = tuple(a + b for a, b in zip(chunk.offsets, item.storage_offsets, strict=True))
        yield from reads_of_box(name, chunk, Box(offsets, tuple(item.lengths)), target)

    def _spec(self, name: str) -> TensorSpec:
        held = self._opened.contents.find(name)
        assert isinstance(held, TensorAt)
        return self._reader.index.components[held.component].tensors[held.key]

    def _load_values(self, *, verify: bool) -> None:
        found = [(item, self._opened.contents.find(item.storage_index.fqn)) for item in self._values]
        values = [(item, held) for item, held in found if isinstance(held, ValueAt)]
        tensors = self._inner_tensors([held for _, held in values], verify=verify)
        for item, held in values:
            component = self._reader.index.components[held.component]
            inner = {key: tensor for (name, key), tensor in tensors.items() if name == held.component}
            value = decode(held.node, inner, place=item.storage_index.fqn, specs=component.tensors)
            _hand_over(self._planner, item, value, held.names)

    def _inner_tensors(self, values: Sequence[ValueAt], *, verify: bool) -> dict[TensorAt, torch.Tensor]:
        """The tensors that are parts of values."""
        found: dict[TensorAt, torch.Tensor] = {}
        for held in values:
            specs = self._reader.index.components[held.component].tensors
            _, keys = skeleton(held.node, specs, place=held.component)
            found.update({TensorAt(held.component, key): empty_for(specs[key], "cpu") for key in keys})
        reads = [
            ChunkRead(place.key, part, TensorTarget(tensor, part))
            for place, tensor in found.items()
            for part in self._reader.index.chunks[place]
        ]
        self._reader.read(reads, verify=verify)
        return found


def _hand_over(planner: LoadPlanner, item: ReadItem, value: Any, names: Sequence[str]) -> None:
    """Give a decoded value to the planner, which expects pickled bytes of it.

    ``names``: what to give instead where the state holds names.
    """
    name = item.dest_index.fqn
    live = getattr(planner, "state_dict", {}).get(name)
    if names and isinstance(live, list) and any(isinstance(part, str) for part in live):
        value = list(names)
    if isinstance(planner, DefaultLoadPlanner) and type(planner).load_bytes is DefaultLoadPlanner.load_bytes:
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
