"""Where ranks see that they wait for different managers: each would wait for the others until its time is over."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from typing import NamedTuple

from torch.distributed.distributed_c10d import Store

from checkpointer.distributed.encoding import decode, encode
from checkpointer.distributed.store import StoreClient
from checkpointer.errors import ConfigError

LOOKS = 3
"""In a row that have to find the same: what a rank has said may be about to change."""

MOST = 16
"""Ranks that are looked at: to find one is enough."""


class Purpose(NamedTuple):
    """What the ranks that make the same manager agree on by themselves."""

    components: str
    """Names, one behind the other."""
    number: int
    """Of this process's managers of these components."""


class Refusal(NamedTuple):
    """Managers that cannot meet: who waits for this rank with one of them gives up."""

    purposes: list[Purpose]
    why: str


class Posted(NamedTuple):
    """What a rank says of itself while it waits."""

    beat: int
    """Another number each time."""
    waits: list[Purpose]
    """What its threads wait for."""
    refused: Refusal | None = None


class Board:
    """What this rank waits for to begin with, and what the other ranks wait for meanwhile."""

    def __init__(self, store: Store, rank: int, purpose: Purpose) -> None:
        self._store_client = StoreClient(store, "checkpointer/managers")
        self._rank = rank
        self._purpose = purpose
        self._beats: dict[int, int] = {}
        self._found: dict[int, int] = {}
        """For each rank, how many looks in a row have found that it waits for others alone."""

    def begin(self) -> None:
        """This rank waits from now on."""
        with _guard:
            _waits.append(self._purpose)

    def end(self) -> None:
        """It does so no more."""
        with _guard:
            _waits.remove(self._purpose)

    def look(self, silent: Sequence[int]) -> None:
        """Tell the others what this rank waits for, and see what the ``silent`` ones wait for.

        Raises:
            ConfigError: one of them waits for another manager, and so will never come.
        """
        self._say(None)
        for rank in silent[:MOST]:
            if self._store_client.there(str(rank)):
                said = decode(self._store_client.hear(str(rank)), Posted, f"rank {rank}")
                if self._alive(rank, said):
                    self._compare(rank, said)

    def _compare(self, rank: int, said: Posted) -> None:
        refused = said.refused
        if refused is not None and (self._purpose in refused.purposes or self._found.get(rank)):
            self._say(refused)  # to those that wait for this rank
            raise ConfigError(refused.why)
        apart = bool(said.waits) and self._purpose not in said.waits
        self._found[rank] = self._found.get(rank, 0) + 1 if apart else 0
        if self._found[rank] >= LOOKS:
            told = self._told(rank, said.waits[0])
            self._say(Refusal([self._purpose, *said.waits], told))
            raise ConfigError(told)

    def _alive(self, rank: int, said: Posted) -> bool:
        """Whether it has said something since the last look: a rank of an earlier life of this job has not."""
        before, self._beats[rank] = self._beats.get(rank), said.beat
        return before is not None and before != said.beat

    def _say(self, refused: Refusal | None) -> None:
        with _guard:
            waits = list(_waits)
        self._store_client.say(str(self._rank), encode(Posted(next(_beats), waits, refused)))

    def _told(self, rank: int, other: Purpose) -> str:
        mine = self._purpose
        if other.components != mine.components:
            return (
                f"rank {rank} has a manager of the components {_names(other)}, and rank {self._rank} one of "
                f"{_names(mine)}: register the same components, in the same order, on every rank"
            )
        return (
            f"rank {rank} uses manager number {other.number} of the components {_names(mine)}, and rank {self._rank} "
            f"number {mine.number}: make the same managers, and call them, in the same order on every rank"
        )


def _names(purpose: Purpose) -> str:
    return purpose.components.replace(",", ", ")


_guard = threading.Lock()
_waits: list[Purpose] = []
"""What the threads of this process wait for."""
_beats = itertools.count(1)
