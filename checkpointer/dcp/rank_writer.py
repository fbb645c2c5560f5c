"""What one rank writes of a save of DCP, and what the coordinator makes of the reports of all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from checkpointer.dcp.checkpoint_id import MODEL, OBJECTS, PATHS
from checkpointer.distributed.rank_report import RankFiles, joined_index
from checkpointer.errors import UnsupportedStateError
from checkpointer.format.boxes import Box, whole
from checkpointer.format.index import Chunk, Component, Index, Json, TensorSpec
from checkpointer.format.tensor_files import FileNaming
from checkpointer.repository.commit import Attempt
from checkpointer.save.tensor_writer import Piece, shards_of, write_pieces
from checkpointer.state.modes import wait_for_streams
from checkpointer.state.tensors import STORABLE, dtype_name, unknown_dtype
from checkpointer.state.tree.encode import Encoder


@dataclass(frozen=True)
class RankTask:
    """What the coordinator tells a rank: where to write, and under which names."""

    step: int
    id: str
    naming: FileNaming


@dataclass(frozen=True)
class Stored:
    """What a rank reports of one item."""

    node: Json = None
    """The tree of a value that is no tensor."""
    inner: Mapping[str, TensorSpec] = field(default_factory=dict)
    """The tensors that it refers to."""
    rank: RankFiles | None = None
    """All that the rank has written, in the report of its first item."""


class RankPart:
    """The files of one rank."""

    def __init__(self, attempt: Attempt, part: RankTask, items: Sequence[WriteItem], planner: SavePlanner) -> None:
        self._attempt = attempt
        self._naming = part.naming
        self._items = items
        self._planner = planner

    def write(self) -> list[WriteResult]:
        """Write them; one result for each item."""
        trees: dict[int, Stored] = {}
        inner: list[Piece] = []
        for number, item in enumerate(self._items):
            if item.type is WriteItemType.BYTE_IO:
                node, tensors = self._encoded(number, item.index)
                found = [Piece(key, whole(tuple(tensor.shape)), tensor) for key, tensor in tensors.items()]
                trees[number] = Stored(node, {piece.key: piece.spec for piece in found})
                inner += found
        pieces = [self._piece(item) for item in self._items if is_chunk(item)]
        wait_for_streams(piece.tensor for piece in (*pieces, *inner))
        tensors_written = write_pieces(self._attempt, MODEL, self._naming, pieces)
        inner_written = write_pieces(self._attempt, OBJECTS, replace(self._naming, cut=True), inner)
        chunks: dict[tuple[str, str], tuple[Chunk, ...]] = {}
        for component, written, parts in ((MODEL, tensors_written, pieces), (OBJECTS, inner_written, inner)):
            for piece, chunk in zip(parts, written.chunks, strict=True):
                chunks[component, piece.key] = (*chunks.get((component, piece.key), ()), chunk)
        headers = {**tensors_written.headers, **inner_written.headers}
        files = RankFiles(
            files={path: replace(self._attempt.files[path], header=header) for path, header in headers.items()},
            chunks=chunks,
            finite=None,
            trainable=False,
            fsync_seconds=self._attempt.fsync_seconds,
        )
        return [
            _result(item, replace(trees.get(number, Stored()), rank=None if number else files))
            for number, item in enumerate(self._items)
        ]

    def _piece(self, item: WriteItem) -> Piece:
        tensor = self._planner.resolve_data(item)
        name, data = item.index.fqn, item.tensor_data
        assert data is not None
        if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided or tensor.is_quantized:
            raise UnsupportedStateError(f"{name}: only strided tensors can be stored by DCP, got {type(tensor)}")
        if tensor.dtype not in STORABLE:
            raise UnsupportedStateError(f"{name}: {unknown_dtype(tensor.dtype)}")
        if (tensor.dtype, tensor.shape) != (data.properties.dtype, data.chunk.sizes):
            raise UnsupportedStateError(
                f"{name}: {type(self._planner).__qualname__} announces {data.properties.dtype} "
                f"{list(data.chunk.sizes)} in its plan, and gives {tensor.dtype} {list(tensor.shape)}"
            )
        return Piece(name, Box(tuple(data.chunk.offsets), tuple(data.chunk.sizes)), tensor.detach())

    def _encoded(self, number: int, index: MetadataIndex) -> tuple[Json, dict[str, torch.Tensor]]:
        """Tree and tensors of a value that DCP would pickle. The keys of its tensors are its own on all ranks."""
        lookup = getattr(self._planner, "lookup_object", None)
        if lookup is None:
            kind = type(self._planner).__qualname__
            raise UnsupportedStateError(
                f"{index.fqn}: {kind} gives no object but pickled bytes; see DefaultSavePlanner"
            )
        encoder, own = Encoder(index.fqn), f"{self._naming.rank}-{number}"
        try:
            node = encoder.encode_at([("[]", own)], lookup(index))
        except UnsupportedStateError as error:
            raise UnsupportedStateError(str(error).replace(f"['{own}']", "", 1)) from error
        return node, encoder.tensors


def _result(item: WriteItem, stored: Stored) -> WriteResult:
    return WriteResult(index=item.index, size_in_bytes=_nbytes(item) if is_chunk(item) else 0, storage_data=stored)


def is_chunk(item: WriteItem) -> bool:
    """Whether an item is written as a chunk: an empty box is none, unless the tensor is empty itself."""
    data = item.tensor_data
    return data is not None and (0 not in data.chunk.sizes or 0 in data.size)


def _nbytes(item: WriteItem) -> int:
    data = item.tensor_data
    return 0 if data is None else prod(data.chunk.sizes) * data.properties.dtype.itemsize


def size_of(plan: SavePlan) -> int:
    """Bytes of its tensors."""
    return sum(map(_nbytes, plan.items))


def namings(plans: Sequence[SavePlan]) -> Iterator[FileNaming]:
    """How each rank calls its files: as Hugging Face names shards, where each tensor is whole in one of them."""
    held = [[item for item in plan.items if is_chunk(item)] for plan in plans]
    boxes = [item.tensor_data for items in held for item in items if item.tensor_data is not None]
    cut = any(data.chunk.sizes != data.size for data in boxes)
    counts = [len(shards_of([_nbytes(item) for item in items])) for items in held]
    for rank in range(len(plans)):
        yield FileNaming(rank, cut=cut, first=1 + sum(counts[:rank]), total=sum(counts))


def index_of(metadata: Metadata, reports: Sequence[tuple[MetadataIndex, Stored]]) -> Index:
    """What all ranks have reported, as one index."""
    paths: dict[str, tuple[str | int, ...]] = metadata.planner_data or {}
    specs = {
        name: TensorSpec(dtype_name(entry.properties.dtype), tuple(entry.size))
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    inner: dict[str, TensorSpec] = {}
    tree: dict[str, Json] = {}
    for place, stored in reports:
        if place.fqn not in specs:
            tree[place.fqn] = stored.node
            inner.update(stored.inner)
    components = {MODEL: Component("module", {}, specs, {"inner": [], PATHS: _nested(paths, specs)})}
    if tree:
        components[OBJECTS] = Component("container", _dict_node(tree), inner, {PATHS: _nested(paths, tree)})
    return joined_index(components, [stored.rank for _, stored in reports if stored.rank is not None])


def _nested(paths: Mapping[str, tuple[str | int, ...]], names: Iterable[str]) -> Json:
    return {name: list(paths[name]) for name in names if paths.get(name, (name,)) != (name,)}


def _dict_node(tree: Mapping[str, Json]) -> Json:
    """A dict of encoded values as the codec writes it."""
    if any(name.startswith("$") for name in tree):
        return {"$dict": [[name, node] for name, node in tree.items()]}
    return dict(tree)
