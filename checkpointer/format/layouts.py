"""How tensors lie over ranks, as numbers: which rank holds which box of a tensor follows from its layout by arithmetic.

A layout is a mesh of ranks, and the order in which the mesh's dimensions cut a tensor. In a mesh of sizes (2, 2) whose
cells are the ranks 0 to 3 in row-major order, the cuts ``(1, 0), (0, 0)`` cut a tensor of 8 rows along mesh dimension 1
first and each half along mesh dimension 0 after it, as FSDP2 over tensor parallelism does::

    rank 0: rows 0, 1    rank 1: rows 4, 5
    rank 2: rows 2, 3    rank 3: rows 6, 7

A mesh dimension without a cut holds replicas; several meshes of one form that hold the same tensors are replicas too.
So each tensor has shards, numbered in the order of the cuts, and replicas, and one rank for each pair of both. Pure,
and proof against hostile numbers: nothing takes more memory than what it is given. See FORMAT.md, "Layouts".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from checkpointer.errors import CorruptCheckpointError
from checkpointer.format import strict_json
from checkpointer.format.boxes import Box

Integers: TypeAlias = NDArray[np.int64]
RankTable: TypeAlias = NDArray[np.int32]

MAX_MESH_DIMENSIONS = 16
MAX_CUTS = 4
"""Mesh dimensions that may cut one tensor."""

MAX_TENSOR_DIMENSIONS = 64


class Cut(NamedTuple):
    """One step of cutting a tensor: as ``torch.chunk`` cuts, so that the last pieces may be shorter, or empty."""

    mesh: int
    """The mesh dimension: as many pieces as its size."""
    dimension: int
    """The tensor dimension that is cut."""


class Place(NamedTuple):
    """Where a rank stands in a layout."""

    replica: int
    shard: int


class Pieces(NamedTuple):
    """One dimension of a tensor, in pieces: for each its first index and its length, which may be 0."""

    begins: Integers
    lengths: Integers


class Form(NamedTuple):
    """How a tensor is cut by the cells of a mesh, whichever ranks these are."""

    mesh: tuple[int, ...]
    """The size of each mesh dimension."""
    cuts: tuple[Cut, ...] = ()
    """In the order in which a tensor is cut; mesh dimensions that are missing here hold replicas."""

    @property
    def cells(self) -> int:
        return prod(self.mesh)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of pieces of each cut."""
        return tuple(self.mesh[cut.mesh] for cut in self.cuts)

    @property
    def shards(self) -> int:
        """Into how many pieces a tensor is cut, empty ones included."""
        return prod(self.sizes)

    @property
    def parts(self) -> Mapping[int, tuple[int, ...]]:
        """For each tensor dimension that is cut, the numbers of pieces, in the order of its cuts."""
        found: dict[int, tuple[int, ...]] = {}
        for cut in self.cuts:
            found[cut.dimension] = (*found.get(cut.dimension, ()), self.mesh[cut.mesh])
        return found

    def place(self, group: int, cell: int) -> Place:
        """Where the rank stands that is ``cell``, in row-major order, of the mesh number ``group``."""
        where = digits(cell, self.mesh)
        cutting = {cut.mesh for cut in self.cuts}
        replica, shard = group, 0
        for dimension, size in enumerate(self.mesh):
            if dimension not in cutting:
                replica = replica * size + where[dimension]
        for cut in self.cuts:
            shard = shard * self.mesh[cut.mesh] + where[cut.mesh]
        return Place(replica, shard)

    def position(self, place: Place) -> int:
        """The inverse of :meth:`place`: the mesh's number times the cells of a mesh, and the cell."""
        cutting = {cut.mesh for cut in self.cuts}
        copies = [size for dimension, size in enumerate(self.mesh) if dimension not in cutting]
        group, copy = divmod(place.replica, prod(copies))
        replicating, pieces = iter(digits(copy, copies)), digits(place.shard, self.sizes)
        of_cut = {cut.mesh: number for cut, number in zip(self.cuts, pieces, strict=True)}
        position = group
        for dimension, size in enumerate(self.mesh):
            position = position * size + (of_cut[dimension] if dimension in cutting else next(replicating))
        return position

    def box(self, shape: Sequence[int], shard: int) -> Box:
        """The box of one shard; some of its lengths may be 0."""
        offsets, lengths = [0] * len(shape), list(shape)
        for cut, number in zip(self.cuts, digits(shard, self.sizes), strict=True):
            begin, length = piece(lengths[cut.dimension], self.mesh[cut.mesh], number)
            offsets[cut.dimension] += begin
            lengths[cut.dimension] = length
        return Box(tuple(offsets), tuple(lengths))

    def overlapping(self, shape: Sequence[int], box: Box) -> Integers:
        """The numbers of the shards that share an element with ``box``, in ascending order.

        The time depends on the number of pieces of each dimension, not of all shards.
        """
        if not box.numel:
            return np.empty(0, np.int64)
        chosen = np.zeros(1, np.int64)
        for dimension, parts in self.parts.items():
            pieces = pieces_of(shape[dimension], parts)
            begin, end = box.offsets[dimension], box.offsets[dimension] + box.lengths[dimension]
            touched = (pieces.begins < end) & (pieces.begins + pieces.lengths > begin) & (pieces.lengths > 0)
            numbers = np.unravel_index(np.flatnonzero(touched), parts)
            weights = [self._weight(place) for place, cut in enumerate(self.cuts) if cut.dimension == dimension]
            part = sum((axis * weight for axis, weight in zip(numbers, weights, strict=True)), np.zeros(1, np.int64))
            chosen = (chosen[:, None] + part[None, :]).ravel()
        return np.sort(chosen)

    def _weight(self, place: int) -> int:
        """What one piece further of the cut at ``place`` adds to the number of a shard."""
        return prod(self.sizes[place + 1 :])

    def to_json(self) -> dict[str, Any]:
        return {"mesh": list(self.mesh), "cuts": [list(cut) for cut in self.cuts]}


@dataclass(frozen=True, eq=False)
class Layout:
    """How tensors lie over the ranks of one mesh, or of several of the same form."""

    form: Form
    ranks: RankTable
    """Ranks of the job, of shape [meshes, cells of a mesh in row-major order]. None stands there twice."""

    @property
    def replicas(self) -> int:
        """How many ranks hold each shard."""
        return int(self.ranks.size) // self.form.shards

    @cached_property
    def holders(self) -> RankTable:
        """The rank that holds each shard as each replica: of shape [replicas, shards]."""
        mesh, cuts = self.form
        behind = [1 + cut.mesh for cut in cuts]
        front = [axis for axis in range(1 + len(mesh)) if axis not in behind]
        arranged = self.ranks.reshape(-1, *mesh).transpose(*front, *behind)
        return np.ascontiguousarray(arranged.reshape(-1, self.form.shards))

    def place_of(self, rank: int) -> Place | None:
        """Which replica of which shard a rank of the job holds; ``None``: it holds nothing."""
        found = np.flatnonzero(self.holders.ravel() == rank)
        return Place(*divmod(int(found[0]), self.form.shards)) if len(found) else None

    def boxes(self, shape: Sequence[int], owner: int) -> Iterator[tuple[int, Box]]:
        """What each rank writes of a tensor of which the replica ``owner`` is written: rank and box, shard by shard.

        The shards that hold elements; of a tensor without elements, the first shard.
        """
        for shard in range(self.form.shards):
            box = self.form.box(shape, shard)
            if box.numel or (shard == 0 and 0 in shape):
                yield int(self.holders[owner, shard]), box


def parse_layout(raw: object, ranks: NDArray[Any], world_size: int, where: str) -> Layout:
    """Read a layout from anywhere. ``ranks``: all its ranks, one mesh behind the other.

    Raises:
        CorruptCheckpointError: it is none.
    """
    fields = strict_json.mapping(raw, where)
    mesh = strict_json.integers(fields.get("mesh"), f"mesh of {where}")
    pairs = [strict_json.integers(pair, f"cut of {where}") for pair in strict_json.array(fields.get("cuts"), where)]
    if not 1 <= len(mesh) <= MAX_MESH_DIMENSIONS or 0 in mesh or prod(mesh) > world_size:
        raise CorruptCheckpointError(f"{where} has a mesh of sizes {str(mesh)[:100]} in a job of {world_size} ranks")
    if len(pairs) > MAX_CUTS or any(len(pair) != 2 for pair in pairs):
        raise CorruptCheckpointError(f"{where} has cuts that are no pairs, or more than {MAX_CUTS}")
    cuts = tuple(Cut(*pair) for pair in pairs)
    if len({cut.mesh for cut in cuts}) != len(cuts) or any(cut.mesh >= len(mesh) for cut in cuts):
        raise CorruptCheckpointError(f"{where} cuts along a mesh dimension twice, or along one that is not there")
    if any(cut.dimension >= MAX_TENSOR_DIMENSIONS for cut in cuts):
        raise CorruptCheckpointError(f"{where} cuts a dimension that no tensor has")
    return Layout(Form(mesh, cuts), _checked(ranks, prod(mesh), world_size, where))


def _checked(ranks: NDArray[Any], cells: int, world_size: int, where: str) -> RankTable:
    flat = ranks.ravel()
    if not 0 < len(flat) <= world_size or len(flat) % cells:
        raise CorruptCheckpointError(f"{where} has {len(flat)} ranks for meshes of {cells} in a job of {world_size}")
    in_order = np.sort(flat)
    if in_order[0] < 0 or in_order[-1] >= world_size or (in_order[1:] == in_order[:-1]).any():
        raise CorruptCheckpointError(f"{where} names a rank twice, or one that a job of {world_size} does not have")
    return flat.astype(np.int32).reshape(-1, cells)


# ------------------------------------------------------------------------------------ pieces of a dimension


def piece(size: int, parts: int, number: int) -> tuple[int, int]:
    """Where piece ``number`` of ``parts`` begins in a dimension of ``size``, and its length."""
    step = -(-size // parts)
    begin = min(step * number, size)
    return begin, min(step, size - begin)


@lru_cache(maxsize=1 << 8)  # a model has few different sizes; each entry has a number for every rank
def pieces_of(size: int, parts: tuple[int, ...]) -> Pieces:
    """All pieces of a dimension that is cut again and again, in row-major order of the cuts."""
    pieces = Pieces(np.zeros(1, np.int64), np.full(1, size, np.int64))
    for count in parts:
        begins, lengths = _cut(pieces.lengths[:, None], count, np.arange(count, dtype=np.int64))
        pieces = Pieces((pieces.begins[:, None] + begins).ravel(), lengths.ravel())
    return pieces


def _cut(lengths: Integers, parts: int, number: Integers | int) -> Pieces:
    """Piece ``number`` of each of ``lengths``. No product here is larger than the length itself."""
    step = np.maximum(-(-lengths // parts), 1)
    full = lengths // step
    begins = np.where(number <= full, step * np.minimum(number, full), lengths)
    return Pieces(begins, np.minimum(step, lengths - begins))


def digits(number: int, sizes: Sequence[int]) -> list[int]:
    """``number`` in the mixed radix of ``sizes``, the first of which counts most."""
    found: list[int] = []
    for size in reversed(sizes):
        number, digit = divmod(number, size)
        found.append(digit)
    return found[::-1]


# ------------------------------------------------------------------------------------ a table of tensors


class TensorColumns(NamedTuple):
    """The tensors of a class of ranks, in columns."""

    sizes: Integers
    """The shapes, one behind the other."""
    starts: Integers
    """Where each shape begins in ``sizes``, and behind the last one where it ends: one more than tensors."""
    layout: Integers
    """The number of each tensor's layout."""
    owner: Integers
    """Which of the replicas wrote it."""


class BoxColumns(NamedTuple):
    """Boxes of some tensors, in columns."""

    tensors: Integers
    """Numbers of tensors, ascending."""
    offsets: Integers
    """One behind the other, as the shapes."""
    lengths: Integers
    starts: Integers
    """Where each box begins in ``offsets`` and ``lengths``, and behind the last one where it ends."""


def check_columns(table: TensorColumns, layouts: Sequence[Layout], where: str) -> None:
    """Check that each tensor's layout is there, fits its shape, and has the replica that wrote it.

    Then the boxes that ranks wrote cover every tensor exactly once: pieces are made by cutting.

    Raises:
        CorruptCheckpointError: one of them does not.
    """
    dimensions = np.diff(table.starts)
    if not len(dimensions) == len(table.layout) == len(table.owner):
        raise CorruptCheckpointError(f"{where} has columns of different lengths")
    if len(dimensions) and not 0 <= int(table.layout.min()) <= int(table.layout.max()) < len(layouts):
        raise CorruptCheckpointError(f"{where} names a layout that is not there")
    least = np.array([max(layout.form.parts, default=-1) + 1 for layout in layouts], np.int64)
    replicas = np.array([layout.replicas for layout in layouts], np.int64)
    wrong = dimensions < least[table.layout] if len(dimensions) else np.zeros(0, bool)
    if wrong.any():
        raise CorruptCheckpointError(f"{where}: tensor {int(wrong.argmax())} is cut along a dimension that it lacks")
    if len(dimensions) and ((table.owner < 0) | (table.owner >= replicas[table.layout])).any():
        raise CorruptCheckpointError(f"{where} names a replica that is not there")


def written_by(rank: int, table: TensorColumns, layouts: Sequence[Layout]) -> BoxColumns:
    """The boxes that a rank of the job wrote, of a table that :func:`check_columns` has accepted."""
    return written_at([layout.place_of(rank) for layout in layouts], table, [layout.form for layout in layouts])


def written_at(places: Sequence[Place | None], table: TensorColumns, forms: Sequence[Form]) -> BoxColumns:
    """The boxes that a rank writes which stands at ``places``, one for each form: no other rank has to be known."""
    replica = np.array([-1 if place is None else place.replica for place in places], np.int64)
    shard = np.array([-1 if place is None else place.shard for place in places], np.int64)
    mine = np.flatnonzero(table.owner == replica[table.layout])
    counts = table.starts[mine + 1] - table.starts[mine]
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    lengths = table.sizes[np.arange(starts[-1]) + np.repeat(table.starts[mine] - starts[:-1], counts)]
    empty = _holds_nothing(lengths, starts)
    offsets = np.zeros_like(lengths)
    layout_of = table.layout[mine]
    for number, (form, place) in enumerate(zip(forms, places, strict=True)):
        if place is not None and form.cuts:
            _cut_rows(offsets, lengths, starts[:-1][layout_of == number], form, place.shard)
    kept = np.where(empty, shard[layout_of] == 0, ~_holds_nothing(lengths, starts))
    return _rows(BoxColumns(mine, offsets, lengths, starts), np.flatnonzero(kept))


def _cut_rows(offsets: Integers, lengths: Integers, first: Integers, form: Form, shard: int) -> None:
    """Cut the rows that begin at ``first`` down to one shard."""
    for cut, number in zip(form.cuts, digits(shard, form.sizes), strict=True):
        where = first + cut.dimension
        pieces = _cut(lengths[where], form.mesh[cut.mesh], number)
        offsets[where] += pieces.begins
        lengths[where] = pieces.lengths


def _holds_nothing(lengths: Integers, starts: Integers) -> NDArray[np.bool_]:
    """For each row whether a length is 0. (``reduceat`` is wrong where a row is empty.)"""
    zeros = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths == 0)])
    found: NDArray[np.bool_] = zeros[starts[1:]] != zeros[starts[:-1]]
    return found


def _rows(boxes: BoxColumns, chosen: Integers) -> BoxColumns:
    if len(chosen) == len(boxes.tensors):
        return boxes
    counts = boxes.starts[chosen + 1] - boxes.starts[chosen]
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    where = np.arange(starts[-1]) + np.repeat(boxes.starts[chosen] - starts[:-1], counts)
    return BoxColumns(boxes.tensors[chosen], boxes.offsets[where], boxes.lengths[where], starts)
