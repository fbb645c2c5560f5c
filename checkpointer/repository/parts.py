"""The parts of a checkpoint that several ranks have written, each read when somebody needs what it describes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from checkpointer.errors import CorruptCheckpointError
from checkpointer.format.boxes import Box
from checkpointer.format.index import Chunk, Index, Placement, RankPart, Tensors

if TYPE_CHECKING:
    from checkpointer.format.layouts import Layout


class Parts(Mapping[tuple[str, str], "tuple[Chunk, ...]"]):
    """Where the tensors of an index with a placement lie: as ``Index.chunks``, by component and key.

    To ask for a tensor reads the parts of all ranks that have written some of it; :meth:`overlapping` only those that a
    box needs. Safe to use from several threads.
    """

    def __init__(self, index: Index, placement: Placement, part: Callable[[int], RankPart]) -> None:
        """``part`` gives the part of a rank, checked against the index: the same each time, from any thread."""
        self._index, self._placement, self._part = index, placement, part
        self.read: dict[int, RankPart] = {}
        """The parts that somebody has needed."""

    def __getitem__(self, place: tuple[str, str]) -> tuple[Chunk, ...]:
        number = self._number(place)
        layout, owner = self._placed(number)
        shape = self._index.components[place[0]].tensors[place[1]].shape
        return tuple([self.part(rank).written[number] for rank, _ in layout.boxes(shape, owner)])

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return ((name, key) for name, component in self._index.components.items() for key in component.tensors)

    def __len__(self) -> int:
        return sum(len(component.tensors) for component in self._index.components.values())

    def overlapping(self, place: tuple[str, str], box: Box) -> list[Chunk]:
        """The chunks of a tensor that share an element with ``box``."""
        number = self._number(place)
        layout, owner = self._placed(number)
        shape = self._index.components[place[0]].tensors[place[1]].shape
        shards = layout.form.overlapping(shape, box).tolist()
        return [self.part(int(layout.holders[owner, shard])).written[number] for shard in shards]

    def part(self, rank: int) -> RankPart:
        """The part of one rank."""
        found = self.read.get(rank)
        if found is None:
            found = self.read[rank] = self._part(rank)
        return found

    def written_by(self, rank: int) -> Iterator[tuple[tuple[str, str], Chunk]]:
        """Every tensor of which a rank has written some, by component and key, and where that lies."""
        for number, chunk in self.part(rank).written.items():
            yield self._places[number], chunk

    @cached_property
    def _places(self) -> list[tuple[str, str]]:
        """Component and key of each tensor of the table."""
        return list(self)

    def _number(self, place: tuple[str, str]) -> int:
        tensors = self._index.components[place[0]].tensors
        if not isinstance(tensors, Tensors):
            raise CorruptCheckpointError(f"{place[0]}.{place[1]} is not described by the table of all ranks")
        return tensors.number(place[1])

    def _placed(self, number: int) -> tuple[Layout, int]:
        return self._placement.layouts[int(self._placement.layout[number])], int(self._placement.owner[number])
