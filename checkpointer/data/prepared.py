"""Loaders that accelerate and Lightning's Fabric put around a ``DataLoader``, and what they read ahead of the loop.

Such a loader numbers its epochs itself, builds the iterator of the loader inside when the first batch is asked for, and
(accelerate's, to know the last batch) reads one batch more than it has given. The position is what the loop has got:
for that, the state that each read began from is remembered until the loop has the batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch.utils.data import DataLoader

from checkpointer.data.checks import is_stateful
from checkpointer.errors import UnsupportedStateError


class _Kind(NamedTuple):
    """Of a class of loaders: the attribute that holds the loader inside, and the one that numbers the next epoch."""

    inside: str
    counter: str
    advice: str


_KINDS = {
    "DataLoaderShard": _Kind(
        "base_dataloader", "iteration", "leave out use_stateful_dataloader: ResumableLoader keeps the position itself"
    ),
    "_FabricDataLoader": _Kind("_dataloader", "_num_iter_calls", "give Fabric a DataLoader of torch"),
}
_REFUSED = {
    "DataLoaderDispatcher": "it reads on one rank for all of them. Make "
    "Accelerator(dataloader_config=DataLoaderConfiguration(dispatch_batches=False)) prepare the loader, so that each "
    "rank reads for itself",
    "SkipDataLoader": "it leaves out batches. Wrap the loader that skip_first_batches was given: a resume passes over "
    "what was seen",
}
_LIBRARIES = ("accelerate", "lightning", "lightning_fabric")


@dataclass(eq=False)
class Prepared:
    """A loader around a ``DataLoader``."""

    outer: Any
    kind: _Kind

    @property
    def name(self) -> str:
        """Its class, for the settings that must not change."""
        return f"{type(self.outer).__name__} of {type(self.outer).__module__.partition('.')[0]}"

    @property
    def loader(self) -> DataLoader[Any]:
        """The loader inside."""
        loader: DataLoader[Any] = vars(self.outer)[self.kind.inside]
        return loader

    @property
    def count(self) -> int:
        """The number that the next epoch gets."""
        return int(getattr(self.outer, self.kind.counter))

    @count.setter
    def count(self, number: int) -> None:
        setattr(self.outer, self.kind.counter, number)

    def first(self, iterator: Iterator[Any], start: Callable[[], Iterator[Any]]) -> Any:
        """The first batch of an iterator of ``outer``, which takes that of the loader inside from ``start``.

        Raises:
            StopIteration: there is none.
            UnsupportedStateError: it did not ask for that iterator.
        """
        attributes = vars(self.outer)
        inside = attributes[self.kind.inside]
        watched = attributes[self.kind.inside] = _Watched(inside, start)
        try:
            return next(iterator)
        except StopIteration:
            if watched.asked:
                raise
            raise UnsupportedStateError(
                f"{self.name} does not take its batches from the DataLoader inside, so its position cannot be "
                "followed: wrap a plain DataLoader"
            ) from None
        finally:
            attributes[self.kind.inside] = inside


def prepared(loader: object) -> Prepared | None:
    """What ``loader`` is, if one of those libraries has made it; ``None`` for all others.

    Raises:
        UnsupportedStateError: its position cannot be followed.
    """
    name, library = type(loader).__name__, type(loader).__module__.partition(".")[0]
    if library not in _LIBRARIES:
        return None
    if name in _REFUSED:
        raise UnsupportedStateError(f"the position of a {name} of {library} cannot be followed: {_REFUSED[name]}")
    if name not in _KINDS:
        return None
    found = Prepared(loader, _KINDS[name])
    if not isinstance(found.loader, DataLoader) or is_stateful(found.loader):
        inside = type(found.loader).__qualname__
        raise UnsupportedStateError(
            f"the position of the {inside} inside a {name} of {library} cannot be followed: {found.kind.advice}"
        )
    if getattr(loader, "skip_batches", 0):
        raise UnsupportedStateError(
            "a loader of skip_first_batches leaves out batches in every epoch. Wrap the loader that it was given: a "
            "resume passes over what was seen"
        )
    return found


class _Watched:
    """Stands for the loader inside while the first batch is asked for: its iterator is one of ours."""

    def __init__(self, loader: DataLoader[Any], start: Callable[[], Iterator[Any]]) -> None:
        self._loader = loader
        self._start = start
        self.asked = False

    def __iter__(self) -> Iterator[Any]:
        self.asked = True
        return self._start()

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    @property  # type: ignore[misc]  # what accelerate's loader passes on as its own
    def __class__(self) -> type:
        return type(self._loader)


@dataclass(frozen=True)
class Before:
    """What a read began from."""

    drawn: int
    """Index batches that the sampler had given out."""
    sources: dict[str, Any]
    dataset: Any
    ended: bool


class Reads:
    """An iterator without workers, which remembers what its reads began from until the loop has their batches."""

    def __init__(
        self, iterator: Iterator[Any], number: int, look: Callable[[], Before], then: Callable[[], object] | None
    ) -> None:
        """``number``: of the first batch, in its epoch. ``then`` is called once that is read, or cannot be."""
        self._iterator = iterator
        self._next = number
        self._look = look
        self._then = then
        self._kept: deque[tuple[int, Before]] = deque()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self._kept.append((self._next, self._look()))
        self._next += 1
        try:
            return next(self._iterator)
        finally:
            if self._then is not None:
                self._then()
                self._then = None

    def forget(self, number: int) -> None:
        """Forget the batches before ``number``."""
        while self._kept and self._kept[0][0] < number:
            self._kept.popleft()

    def before(self, number: int) -> Before | None:
        """What the read of batch ``number`` began from; ``None``: it was not read."""
        return next((before for kept, before in self._kept if kept == number), None)
