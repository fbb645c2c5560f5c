"""Who writes what, as a function of a class of ranks and what they have: all of them come to the same by themselves.

Every tensor gets an owner, one of its replicas. A rank writes what it holds of the tensors whose owner it is, so that
each element is written once, whatever the layout. Pure, and no step takes longer with more ranks.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from checkpointer.distributed.classes import ClassSummary, ComponentSummary, Seat, name_digest, summary_rows
from checkpointer.distributed.description import Entry, Section, Sort
from checkpointer.format.index import ITEM_SIZES, TensorSpec
from checkpointer.format.layouts import BoxColumns, Form, Place, TensorColumns, pieces_of, written_at
from checkpointer.format.tensor_files import PAGE, ComponentTensors, FileNaming, count_files

FEW_RANKS = 16
WORTH_A_FILE = 64 << 20
"""Bytes. Beyond ``FEW_RANKS``, this much is given to a rank before another one is used: a restore opens the files
of all that wrote, and thousands of them that hold a step count each take longer than what they save."""


class PlannedTensor(NamedTuple):
    """One tensor of a class."""

    component: str
    sort: Sort
    entry: Entry


@dataclass(frozen=True, eq=False)
class ClassPlan:
    """What the ranks of one class write."""

    tensors: Sequence[PlannedTensor]
    """In the order of component and name: the table of the class has them in this order."""
    kinds: Mapping[str, str]
    """Of the components that the class has, those without tensors included."""
    forms: Sequence[Form]
    """How tensors are cut."""
    table: TensorColumns
    seats: int
    """Ranks in the class."""

    def written_at(self, group: int, cell: int) -> BoxColumns:
        """What the rank at a cell of a mesh of the class writes."""
        return written_at([form.place(group, cell) for form in self.forms], self.table, self.forms)

    def summary(self) -> ClassSummary:
        """What the describer tells the coordinator."""
        count = Counter(tensor.component for tensor in self.tensors)
        parts = {name: ComponentSummary(kind, name in self.cut, count[name]) for name, kind in self.kinds.items()}
        return ClassSummary(summary_rows(self.tensors), parts)

    @cached_property
    def cut(self) -> frozenset[str]:
        """Components of which a tensor is in more than one piece."""
        return frozenset(
            tensor.component
            for tensor, number in zip(self.tensors, self.table.layout.tolist(), strict=True)
            if _is_cut(tensor.entry.shape, self.forms[number])
        )

    @cached_property
    def files(self) -> Mapping[str, Mapping[int, int]]:
        """How many files of its own each rank, by position in the class, gets of each component that is not cut."""
        shares: dict[tuple[str, int], list[Entry]] = {}
        positions = {
            (number, owner): self.forms[number].position(Place(owner, 0))
            for number, owner in set(zip(self.table.layout.tolist(), self.table.owner.tolist(), strict=True))
        }
        where = zip(self.table.layout.tolist(), self.table.owner.tolist(), strict=True)
        for tensor, place in zip(self.tensors, where, strict=True):
            if tensor.component not in self.cut:
                shares.setdefault((tensor.component, positions[place]), []).append(tensor.entry)
        found: dict[str, dict[int, int]] = {}
        for (component, position), entries in shares.items():
            found.setdefault(component, {})[position] = _count(self.kinds[component], entries)
        return found

    def naming(self, component: str, rank: int, seat: Seat, by_rank: Collection[str]) -> FileNaming:
        """How a rank's files of a component are called. ``by_rank``: as in :class:`Verdict`."""
        if component in by_rank:
            return FileNaming(rank, cut=True)
        of_ranks = self.files.get(component, {})
        before = sum(count for position, count in of_ranks.items() if position < seat.position)
        return FileNaming(rank, first=1 + before, total=sum(of_ranks.values()))


def _is_cut(shape: Sequence[int], form: Form) -> bool:
    """Whether more than one shard holds elements."""
    if 0 in shape:
        return False
    return any(int(np.count_nonzero(pieces_of(shape[axis], parts).lengths)) > 1 for axis, parts in form.parts.items())


def _count(kind: str, entries: Sequence[Entry]) -> int:
    specs = {entry.name: TensorSpec(entry.dtype, entry.shape) for entry in entries}
    return count_files(ComponentTensors(kind, specs, frozenset(entry.name for entry in entries if entry.frozen)))


def assign_owners(sections: Sequence[Section], seat: Seat, elsewhere: Collection[bytes] = ()) -> ClassPlan:
    """Let each tensor be written by the replica with the least to write of what is laid out alike; the largest first.

    What is frozen is divided by itself: most saves share it with an earlier checkpoint, and write the rest alone.

    Args:
        sections: those of this rank that are of the class.
        seat: this rank's, or any other rank's of the class: the plan is the same.
        elsewhere: names, as :func:`name_digest` has them, of tensors that a class before this one writes.
    """
    found = [
        PlannedTensor(section.component, section.sort, entry)
        for section in sections
        for entry in section.entries
        if not elsewhere or name_digest(section.component, entry.name) not in elsewhere
    ]
    tensors = sorted(found, key=lambda tensor: (tensor.component, tensor.entry.name))
    mesh = next((section.mesh for section in sections if section.mesh), (seat.cells,))
    numbers: dict[Form, int] = {}
    layout = [numbers.setdefault(Form(mesh, tensor.entry.cuts), len(numbers)) for tensor in tensors]
    forms = list(numbers)
    copies = [seat.groups * form.cells // form.shards for form in forms]
    owner = _owners(tensors, layout, copies)
    kinds = {section.component: section.kind for section in sections}
    return ClassPlan(tensors, kinds, forms, _columns(tensors, layout, owner), seat.groups * seat.cells)


def _columns(tensors: Sequence[PlannedTensor], layout: Sequence[int], owner: Sequence[int]) -> TensorColumns:
    shapes = [tensor.entry.shape for tensor in tensors]
    starts = np.zeros(len(shapes) + 1, np.int64)
    np.cumsum([len(shape) for shape in shapes], out=starts[1:])
    sizes = np.array([size for shape in shapes for size in shape], np.int64)
    return TensorColumns(sizes, starts, np.array(layout, np.int64), np.array(owner, np.int64))


def _owners(tensors: Sequence[PlannedTensor], layout: Sequence[int], copies: Sequence[int]) -> list[int]:
    owner = [0] * len(tensors)
    divided: dict[int, tuple[list[int], list[int]]] = {}
    sizes = [_bytes(tensor.entry) for tensor in tensors]
    for number, (tensor, form) in enumerate(zip(tensors, layout, strict=True)):
        if copies[form] > 1 and sizes[number] and tensor.sort != "own":
            divided.setdefault(form, ([], []))[tensor.entry.frozen].append(number)
    for form, (trained, frozen) in divided.items():
        done = [0] * min(copies[form], len(trained) + len(frozen))
        _divide(trained, sizes, done, owner)
        _divide(frozen, sizes, done, owner)
    return owner


def _bytes(entry: Entry) -> int:
    size = ITEM_SIZES[entry.dtype]
    for length in entry.shape:
        size *= length
    return size


def _divide(numbers: Sequence[int], sizes: Sequence[int], done: list[int], owner: list[int]) -> None:
    """Give each tensor to the replica with the least of them; first come those with the least ``done`` before."""
    total = sum(sizes[number] for number in numbers)
    count = min(len(done), len(numbers), max(min(FEW_RANKS, total // PAGE), total // WORTH_A_FILE, 1))
    heap = [(0, before, replica) for before, replica in sorted((before, r) for r, before in enumerate(done))[:count]]
    for number in sorted(numbers, key=lambda number: (-sizes[number], number)):
        load, before, replica = heap[0]
        owner[number] = replica
        heapq.heapreplace(heap, (load + sizes[number], before, replica))
    for load, before, replica in heap:
        done[replica] = before + load
