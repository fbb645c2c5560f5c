"""A sampler asked again: the order of an epoch drawn once more, and what was seen passed over."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from checkpointer.data.sources import Sources
from checkpointer.errors import IncompatibleStateError


@dataclass(frozen=True)
class Replay:
    """How to bring a sampler back to where it was."""

    start: dict[str, Any]
    """Generators when it was first asked."""
    consumed: int = 0
    """Index batches to pass over: their data was seen."""
    drawn: int = 0
    """Index batches that it had given out, the prefetched ones too."""
    exhausted: bool = False
    """Whether it had been asked once more, after its last: that may draw random numbers as well."""
    after: dict[str, Any] | None = None
    """Generators to set when it is there."""


class Indices:
    """Stands in for a loader's index sampler: can be replayed, and knows how far it has been drawn.

    The sampler is asked at the first index, not at ``iter``: a DataLoader with workers calls that twice.
    """

    def __init__(self, sampler: Any, sources: Sources) -> None:
        self._sampler = sampler
        self._sources = sources
        self._replay: Replay | None = None
        self._running: _IndexIterator | None = None

    def prepare(self, replay: Replay | None) -> None:
        """Set what the next iterator does first."""
        self._replay = replay
        self._running = None

    def __iter__(self) -> _IndexIterator:
        self._running = _IndexIterator(self._sampler, self._sources, self._replay)
        return self._running

    def __len__(self) -> int:
        return len(self._sampler)

    def stand_in(self) -> StandIn:
        """What the loader is handed."""
        return StandIn(self, self._sampler)

    def advance(self) -> None:
        """Replay now, and not when the first index is asked for."""
        assert self._running is not None
        self._running.advance()

    @property
    def in_use(self) -> bool:
        """Whether the loader has taken an iterator since ``prepare``."""
        return self._running is not None

    @property
    def start(self) -> dict[str, Any] | None:
        """The sources when the sampler was first asked; ``None`` before that."""
        return self._running.start if self._running is not None else None

    @property
    def drawn(self) -> int:
        """Index batches that the sampler has given out in this epoch."""
        return self._running.drawn if self._running is not None else 0

    @property
    def exhausted(self) -> bool:
        """Whether the sampler has said that there are no more."""
        return self._running is not None and self._running.exhausted


class StandIn:
    """What a loader is handed in the place of its index sampler: ``Indices``, without keeping them alive.

    A loader with persistent workers keeps its iterator, and so this; ``Indices`` know the loader. In a cycle, the
    queues to the workers are taken apart by the garbage collector before those are told to end: 5 s of waiting.
    """

    def __init__(self, indices: Indices, sampler: Any) -> None:
        self._indices = weakref.ref(indices)
        self._sampler = sampler

    def __iter__(self) -> Iterator[Any]:
        indices = self._indices()
        return iter(self._sampler if indices is None else indices)

    def __len__(self) -> int:
        return len(self._sampler)


class _IndexIterator:
    """One pass over the sampler's indices."""

    def __init__(self, sampler: Any, sources: Sources, replay: Replay | None) -> None:
        self._sampler = sampler
        self._weak_sources = weakref.ref(sources)  # see StandIn
        self._replay = replay
        self._iterator: Iterator[Any] | None = None
        self._ready: deque[Any] = deque()
        self.start: dict[str, Any] | None = None
        self.drawn = 0
        self.exhausted = False

    @property
    def _sources(self) -> Sources:
        sources = self._weak_sources()
        assert sources is not None, "whoever asks holds the loader"
        return sources

    def __iter__(self) -> _IndexIterator:
        return self

    def __next__(self) -> Any:
        self.advance()
        return self._ready.popleft() if self._ready else self._draw()

    def advance(self) -> None:
        """Start the sampler, and bring it to where it was."""
        if self._iterator is not None:
            return
        replay = self._replay
        if replay is None:
            self.start = self._sources.snapshot()
            self._iterator = iter(self._sampler)
            return
        self.start = replay.start
        self._sources.set_random(replay.start)
        self._iterator = iter(self._sampler)
        self._run(replay)
        if replay.after is not None:
            self._sources.set_random(replay.after)

    def _run(self, replay: Replay) -> None:
        try:
            for number in range(replay.drawn):
                index = self._draw()
                if number >= replay.consumed:
                    self._ready.append(index)
        except StopIteration:
            raise IncompatibleStateError(
                f"the sampler gave {self.drawn} batches of indices when it was asked again, and {replay.drawn} before "
                "the save: it, or the dataset, has changed"
            ) from None
        if replay.exhausted:
            for _ in self._remaining():
                raise IncompatibleStateError("the sampler goes on where it had ended when saved: it has changed")

    def _remaining(self) -> Iterator[Any]:
        while not self.exhausted:
            try:
                yield self._draw()
            except StopIteration:
                return

    def _draw(self) -> Any:
        if self.exhausted:
            raise StopIteration
        assert self._iterator is not None
        try:
            index = next(self._iterator)
        except StopIteration:
            self.exhausted = True
            raise
        self.drawn += 1
        return index
