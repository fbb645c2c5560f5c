"""The position in the data: resume in the middle of an epoch, with the very batches that come next.

```python
loader = ResumableLoader(DataLoader(dataset, batch_size=32, shuffle=True, num_workers=4))
mgr = CheckpointManager("runs/vit", model=model, optimizer=optimizer, loader=loader)
restored = mgr.restore_latest()                    # before iter(loader)
step = restored.step + 1 if restored else 0
with mgr:
    for epoch in range(loader.next_epoch, epochs):
        for batch in loader:
            ...
            mgr.save(step, epoch=epoch)
            step += 1
```

**What makes it exact.** Batches are counted as the loop receives them, so prefetched ones are neither lost nor
repeated. The order of an epoch is drawn when the sampler is first asked, so the state of all random generators at that
moment is kept. A resume sets it, lets the sampler draw the same order again, passes over the *indices* of what was seen
without reading an item, and sets the generators to their state at the save.

**Where an epoch ends.** Saved inside the loop body on the last batch, the resumed epoch is empty, and the code after
the loop runs as it would have; saved after the loop, the next epoch begins. Saved after a ``break``, the rest of that
epoch comes first.

**Random augmentation.** In worker processes the global generators are out of reach: nobody can read their state at the
batch that the loop has just received, as they are ahead of it by what they prefetch, and fresh ones start from a new
seed. So nothing that is drawn from them can be repeated. :class:`SeededDataset` derives the randomness of an item from
(seed, epoch, index) instead: exact, whichever worker handles the item and whatever came before. Without workers the
global generators are those of the training process, and exact anyway.
"""

from __future__ import annotations

import hashlib
import itertools
import operator
import random
import warnings
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from checkpointer.errors import (
    CheckpointerWarning,
    CorruptCheckpointError,
    IncompatibleStateError,
    UnsupportedStateError,
)
from checkpointer.index import Component
from checkpointer.state import Adapter, RestoreOptions, RestorePlan, RngState, SavedState
from checkpointer.state.codec import encode
from checkpointer.state.decoding import decode
from checkpointer.state.rng import GENERATORS, GeneratorAdapter, generator_state
from checkpointer.state.tensors import spec_of

T = TypeVar("T")

_NAME = "loader"
_SAMPLER_LINKS = ("batch_sampler", "sampler")
_DATA_LINKS = ("dataset", "transform")
#: What decides which items a sampler gives; compared between save and restore.
_SAMPLER_SETTINGS = (
    "batch_size",
    "drop_last",
    "num_replicas",
    "num_samples",
    "rank",
    "replacement",
    "seed",
    "shuffle",
)
_STATE_TYPES: Mapping[str, tuple[type, ...]] = {
    "settings": (dict,),
    "epoch": (int,),
    "batch": (int,),
    "running": (bool,),
    "label": (int, type(None)),
    "label_given": (bool,),
    "set_epoch": (int, type(None)),
    "drawn": (int,),
    "exhausted": (bool,),
    "ended": (bool,),
    "workers_persist": (bool,),
    "start": (dict, type(None)),
    "now": (dict,),
    "dataset": (object,),
    "inner": (dict, type(None)),
}

#: Restored loaders whose epoch has not been taken up again.
_WAITING: weakref.WeakSet[ResumableLoader[Any]] = weakref.WeakSet()


class ResumableLoader(Generic[T]):
    """Makes a ``DataLoader``, or a torchdata ``StatefulDataLoader``, a component that resumes exactly.

    It is iterated like the loader inside, has its length and its attributes, and knows the position: see the module's
    docstring. Restore before the first ``iter(loader)``. One iterator at a time: a new one begins a new epoch, and the
    old one then refuses to go on.

    How the position comes back depends on the data:

    - map-style: the sampler is replayed, no item is read again, and ``num_workers`` may change;
    - iterable with ``state_dict()`` and ``load_state_dict()``, no workers: the dataset's state is saved and restored;
    - iterable in a ``StatefulDataLoader``: its own ``state_dict()`` is;
    - other iterables: the batches seen are drawn again and dropped, with a warning.

    Generators (torch, NumPy, Python) that are attributes of the samplers, of the dataset or of its ``transform`` are
    saved too, and so are samplers with ``state_dict()``. Not exact are: what workers draw from their own generators
    (see :class:`SeededDataset`), samplers that draw from the *global* generators for each index while workers prefetch,
    and iterable datasets without ``state_dict()`` that draw from them for each item.
    """

    def __init__(self, loader: DataLoader[T]) -> None:
        """Wrap ``loader``; iterate over the wrapper alone from now on.

        Raises:
            UnsupportedStateError: not a ``DataLoader``, or one whose workers deliver in any order, or one of torchdata
                that keeps the state of its dataset in persistent workers.
        """
        if not isinstance(loader, DataLoader):
            raise UnsupportedStateError(f"ResumableLoader wraps a torch DataLoader, not a {type(loader).__qualname__}")
        if loader.num_workers and not getattr(loader, "in_order", True):
            raise UnsupportedStateError(
                "a DataLoader with in_order=False has no position: which batches were seen depends on timing. "
                "Leave in_order=True"
            )
        self._loader = loader
        self._iterable = isinstance(loader.dataset, IterableDataset)
        if self._owns_position and _persists(loader):
            raise UnsupportedStateError(
                "a StatefulDataLoader does not bring back datasets inside persistent workers at the end of an epoch "
                "(torchdata 0.11: what the new workers prefetch is lost); use persistent_workers=False"
            )
        self._sources = _Sources(loader)
        self._indices = _Indices(
            loader.sampler if loader.batch_sampler is None else loader.batch_sampler, self._sources
        )
        self._seeded = _seeded_datasets(loader.dataset)
        self._dataset_epoch = torch.zeros((), dtype=torch.int64)
        if self._seeded:
            self._dataset_epoch.share_memory_()  # persistent workers see it change
        self._current: weakref.ref[_EpochIterator[T]] | None = None
        self._epoch = 0
        self._batch = 0
        self._failed = 0
        self._running = False
        self._ended = False
        self._label: int | None = None
        self._label_given = False
        self._set_epoch: int | None = None
        self._start: dict[str, Any] | None = None
        self._iterator: Iterator[T] | None = None
        self._restored: dict[str, Any] | None = None

    # ----------------------------------------------------------------------------------------------- the DataLoader

    def __iter__(self) -> Iterator[T]:
        """Take up the restored epoch, or begin a new one."""
        restored = self._restored
        if restored is not None and restored["running"]:
            self._iterator = self._resume(restored)
        else:
            self._iterator = self._begin(restored)
            self._epoch += 1
            self._batch = 0
        self._failed = 0
        self._running = True
        self._restored = None
        _WAITING.discard(self)
        epoch = _EpochIterator(self, self._iterator)
        self._current = weakref.ref(epoch)
        return epoch

    def __len__(self) -> int:
        """The number of batches of a whole epoch."""
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":  # not made yet: a copy or an unpickled object
            raise AttributeError(name)
        return getattr(self._loader, name)

    def set_epoch(self, epoch: int) -> None:
        """Hand the number of the coming epoch to the sampler, as ``DistributedSampler`` needs it, and to the dataset.

        An epoch that is taken up again keeps the number that it began with.
        """
        self._set_epoch = operator.index(epoch)
        self._pass_epoch(self._set_epoch)

    @property
    def epoch(self) -> int:
        """Epochs begun, over the whole run."""
        return self._epoch

    @property
    def next_epoch(self) -> int:
        """The number, from 0, of the epoch that the next ``iter`` gives: one restored in its middle, or a new one."""
        resumes = self._restored is not None and self._restored["running"]
        return self._epoch - 1 if resumes else self._epoch

    @property
    def batch(self) -> int:
        """Batches yielded in the running epoch; 0 when it is over. ``enumerate(loader, loader.batch)`` counts on."""
        return self._batch

    # --------------------------------------------------------------------------------------------------- the state

    def state_dict(self) -> dict[str, Any]:
        """The position after the batch yielded last: plain values, tensors and arrays. Reads no data."""
        now = self._sources.snapshot()
        if self._restored is not None:
            return {**self._restored, "set_epoch": self._set_epoch, "now": now}
        return {
            "settings": self._settings(),
            "epoch": self._epoch,
            "batch": self._batch,
            "running": self._running,
            "label": self._label,
            "label_given": self._label_given,
            "set_epoch": self._set_epoch,
            "drawn": self._indices.drawn if self._running else 0,
            "exhausted": self._running and self._indices.exhausted,
            "ended": self._running and self._has_ended(),
            "workers_persist": self._epoch > 0 and _persists(self._loader),
            "start": self._epoch_start() if self._running else None,
            "now": now,
            "dataset": self._dataset_state(),
            "inner": self._loader.state_dict() if self._owns_position and self._epoch else None,  # type: ignore[attr-defined]
        }

    def check_state_dict(self, state_dict: object) -> None:
        """Refuse a state that does not fit, before a restore changes anything; errors as of ``load_state_dict``."""
        self._refuse_while_iterating()
        if isinstance(state_dict, dict) and isinstance(state_dict.get("settings"), dict):
            _check_settings(state_dict["settings"], self._settings())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a position; the next ``iter`` goes on from it.

        Raises:
            IncompatibleStateError: an iterator of this loader is in use, or the loader is not the one that was saved.
            CorruptCheckpointError: not the state of a ``ResumableLoader``.
        """
        self._refuse_while_iterating()
        _check_state(state_dict)
        _check_settings(state_dict["settings"], self._settings())
        self._sources.check(state_dict["now"])
        if state_dict["start"] is not None:
            self._sources.check(state_dict["start"])
        self._drop_iterator()
        self._load_sources(state_dict)
        self._epoch, self._batch = state_dict["epoch"], state_dict["batch"]
        self._running, self._ended = state_dict["running"], state_dict["ended"]
        self._label, self._label_given = state_dict["label"], state_dict["label_given"]
        self._set_epoch = state_dict["set_epoch"]
        self._restored = dict(state_dict)
        _WAITING.add(self)

    # ------------------------------------------------------------------------------------------- beginning, resuming

    def _begin(self, restored: Mapping[str, Any] | None) -> Iterator[T]:
        """A new epoch's iterator. ``restored``: the state at the boundary before it, if that was just restored."""
        before = self._sources.snapshot()
        self._label_given = self._set_epoch is not None
        self._label = self._epoch if self._set_epoch is None else self._set_epoch
        self._set_epoch, self._ended = None, False
        self._start = before if self._iterable else None
        if restored is not None and restored["inner"] is not None:
            with self._indices_installed(None):
                self._loader.state_dict()  # type: ignore[attr-defined] # builds the iterator of the finished epoch
            self._sources.set_random(before)
        # Living workers draw no seed at the start of an epoch, new ones do: go on as if they had not.
        workers_lived = restored is not None and restored["workers_persist"]
        iterator = self._build(_Replay(before) if workers_lived else None)
        if workers_lived and self._iterable:
            self._sources.set_random(before)
        return iterator

    def _resume(self, restored: Mapping[str, Any]) -> Iterator[T]:
        """The iterator of a restored epoch, placed after the batch yielded last."""
        # The first loader puts back the generators of the save, whatever was drawn since the restore (by an evaluation,
        # say). Those that follow find training under way, and leave the generators as they are.
        after = restored["now"] if self in _WAITING else self._sources.snapshot()
        self._set_epoch = None
        if self._label_given and self._label is not None:
            self._pass_epoch(self._label)
        if restored["start"] is not None:
            self._sources.set_samplers(restored["start"])
        iterator = self._replay_data(restored, after) if self._iterable else self._replay_indices(restored, after)
        _WAITING.clear()
        return iterator

    def _replay_indices(self, restored: Mapping[str, Any], after: dict[str, Any]) -> Iterator[T]:
        """Map-style: have the sampler draw the epoch's order again, and pass over what was seen."""
        replay = None
        if restored["start"] is not None:
            consumed = 0 if self._owns_position else restored["batch"]  # else the loader inside passes over them
            replay = _Replay(restored["start"], consumed, restored["drawn"], restored["exhausted"], after)
        iterator = self._build(replay)
        if replay is None:
            self._sources.set_random(after)
        return iterator

    def _replay_data(self, restored: Mapping[str, Any], after: dict[str, Any]) -> Iterator[T]:
        """Iterable: the dataset, or the loader inside, knows its position; else draw and drop what was seen."""
        self._start = restored["start"]
        if restored["ended"]:
            self._sources.set_random(after)
            return iter(())
        if self._start is not None:
            self._sources.set_random(self._start)
        iterator = self._build(None)
        if not self._owns_position and not self._dataset_positions:
            self._drop(iterator, restored["batch"])
        self._sources.set_random(after)
        return iterator

    def _build(self, replay: _Replay | None) -> Iterator[T]:
        """The loader's own iterator, over our indices where it takes any."""
        assert self._label is not None
        self._dataset_epoch.fill_(self._label)
        self._attach_epoch()
        with self._indices_installed(replay):
            iterator = iter(self._loader)
        if not self._iterable and not self._indices.in_use:
            raise UnsupportedStateError(
                f"{type(self._loader).__qualname__} builds its iterator in its own way, so its position cannot be "
                "followed; wrap a plain DataLoader"
            )
        if replay is not None and not self._iterable and not self._loader.num_workers:
            self._indices.advance()
        return iterator

    @contextmanager
    def _indices_installed(self, replay: _Replay | None) -> Iterator[None]:
        """While an iterator is built: our stand-in in the place of the index sampler, which iterables have none of."""
        if self._iterable:
            yield
            return
        self._indices.prepare(replay)
        name = "sampler" if self._loader.batch_sampler is None else "batch_sampler"
        attributes = vars(self._loader)  # a DataLoader refuses ordinary assignment
        original = attributes[name]
        attributes[name] = self._indices
        try:
            yield
        finally:
            attributes[name] = original

    def _drop(self, iterator: Iterator[T], count: int) -> None:
        if count:
            warnings.warn(
                f"{count} batches are drawn again and dropped: {type(self._loader.dataset).__qualname__} cannot be "
                "placed. Give it state_dict() and load_state_dict() and use no workers, or use a StatefulDataLoader",
                CheckpointerWarning,
                stacklevel=5,
            )
        dropped = sum(1 for _ in itertools.islice(iterator, count))
        if dropped < count:
            raise IncompatibleStateError(f"the dataset ended after {dropped} batches; {count} had been seen when saved")

    def _next(self, epoch: _EpochIterator[T], iterator: Iterator[T]) -> T:
        """The next batch, counted; called by the iterator that the loop holds."""
        if self._current is None or self._current() is not epoch:
            raise UnsupportedStateError(
                "a newer iterator of this ResumableLoader exists, or another position was restored: only one position "
                "can be saved. Use the newest iterator, or a second loader"
            )
        if not self._loader.num_workers:
            self._attach_epoch()  # another loader may share the dataset
        self._batch += self._failed  # the loop went on after a batch that could not be read: it is passed over
        self._failed = 0
        try:
            batch = next(iterator)
        except StopIteration:
            self._running, self._batch, self._start = False, 0, None
            raise
        except Exception:
            self._failed = 1
            raise
        self._batch += 1
        return batch

    # ------------------------------------------------------------------------------------------------- small parts

    @property
    def _owns_position(self) -> bool:
        """Whether the loader inside is one with ``state_dict()`` that knows what only it can know."""
        if not _is_stateful(self._loader):
            return False
        return self._iterable or (bool(self._loader.num_workers) and _is_stateful(self._loader.dataset))

    @property
    def _dataset_positions(self) -> bool:
        """Whether the restored state of an iterable dataset holds its position."""
        return _is_stateful(self._loader.dataset) and not self._loader.num_workers

    def _epoch_start(self) -> dict[str, Any] | None:
        return self._start if self._iterable else self._indices.start

    def _dataset_state(self) -> Any:
        """The state of this process's copy of the dataset."""
        dataset: Any = self._loader.dataset
        return dataset.state_dict() if _is_stateful(dataset) and not self._owns_position else None

    def _has_ended(self) -> bool:
        """Whether an iterable dataset ended inside the last, short batch: asked once more, it might begin anew."""
        if not self._iterable or self._owns_position or not self._dataset_positions:
            return False
        fetcher = getattr(self._iterator, "_dataset_fetcher", None)
        return self._ended or bool(getattr(fetcher, "ended", False))

    def _settings(self) -> dict[str, Any]:
        """What must not change between save and restore."""
        loader = self._loader
        settings: dict[str, Any] = {
            "loader": "StatefulDataLoader" if _is_stateful(loader) else "DataLoader",
            "dataset": "iterable" if self._iterable else "map-style",
            "batch_size": loader.batch_size,
            "drop_last": loader.drop_last,
        }
        if not self._iterable:
            settings["length of the dataset"] = _length(loader.dataset)
            settings |= {path: _describe_sampler(sampler) for path, sampler in self._sources.samplers.items()}
        if self._iterable or self._owns_position:
            settings["num_workers"] = loader.num_workers
        return settings

    def _refuse_while_iterating(self) -> None:
        current = self._current() if self._current is not None else None
        if current is not None and self._running:
            raise IncompatibleStateError(
                "the loader is being iterated, so its position cannot be restored: call restore_latest() before "
                "iter(loader); to go back during a run, leave the loop and drop its iterator first"
            )

    def _drop_iterator(self) -> None:
        """Forget the iterator and its persistent workers: those of a resumed run are new ones."""
        self._current = None
        self._iterator = None
        if getattr(self._loader, "_iterator", None) is not None:
            self._loader._iterator = None  # noqa: SLF001 - the only handle on persistent workers

    def _load_sources(self, state: Mapping[str, Any]) -> None:
        if self._owns_position:
            if state["inner"] is not None:
                if state["running"] and _worker_starts_anew(state["inner"]):
                    warnings.warn(
                        "saved when the dataset of a worker had ended inside a short batch: a StatefulDataLoader asks "
                        "it once more, so one that begins anew then repeats its items in this epoch",
                        CheckpointerWarning,
                        stacklevel=2,
                    )
                self._loader.load_state_dict(state["inner"])  # type: ignore[attr-defined]
        elif _is_stateful(self._loader.dataset):
            dataset: Any = self._loader.dataset
            dataset.load_state_dict(state["dataset"])
        self._sources.set_samplers(state["now"])
        self._sources.set_generators(state["now"])

    def _pass_epoch(self, epoch: int) -> None:
        dataset = self._loader.dataset
        others = [] if isinstance(dataset, SeededDataset) else [dataset]  # which follows the number of ours
        for target in (*self._sources.samplers.values(), *others):
            setter = getattr(target, "set_epoch", None)
            if callable(setter):
                setter(epoch)

    def _attach_epoch(self) -> None:
        for dataset in self._seeded:
            dataset.follow(self._dataset_epoch)


class _EpochIterator(Generic[T]):
    """What the loop holds: one pass over the loader's batches."""

    def __init__(self, owner: ResumableLoader[T], iterator: Iterator[T]) -> None:
        self._owner = owner
        self._iterator = iterator

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        try:
            return self._owner._next(self, self._iterator)  # noqa: SLF001 - the other half of one thing
        except StopIteration:
            self._iterator = iter(())
            raise


# ------------------------------------------------------------------------------------------------------------- indices


@dataclass(frozen=True)
class _Replay:
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


class _Indices:
    """Stands in for a loader's index sampler: can be replayed, and knows how far it has been drawn.

    The sampler is asked at the first index, not at ``iter``: a DataLoader with workers calls that twice.
    """

    def __init__(self, sampler: Any, sources: _Sources) -> None:
        self._sampler = sampler
        self._sources = sources
        self._replay: _Replay | None = None
        self._running: _IndexIterator | None = None

    def prepare(self, replay: _Replay | None) -> None:
        """Set what the next iterator does first."""
        self._replay = replay
        self._running = None

    def __iter__(self) -> _IndexIterator:
        self._running = _IndexIterator(self._sampler, self._sources, self._replay)
        return self._running

    def __len__(self) -> int:
        return len(self._sampler)

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


class _IndexIterator:
    """One pass over the sampler's indices."""

    def __init__(self, sampler: Any, sources: _Sources, replay: _Replay | None) -> None:
        self._sampler = sampler
        self._sources = sources
        self._replay = replay
        self._iterator: Iterator[Any] | None = None
        self._ready: deque[Any] = deque()
        self.start: dict[str, Any] | None = None
        self.drawn = 0
        self.exhausted = False

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

    def _run(self, replay: _Replay) -> None:
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


# ------------------------------------------------------------------------------------------- what the order depends on


class _Sources:
    """Everything that the order of the data depends on: global generators, those of samplers and dataset, samplers.

    Looked up anew each time, as attributes may be replaced. Only those that a DataLoader fixes are kept: while an
    iterator is built, its index sampler is our stand-in.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader
        self._fixed = SimpleNamespace(batch_sampler=loader.batch_sampler, sampler=loader.sampler)

    @property
    def samplers(self) -> dict[str, Any]:
        """The loader's samplers, inner ones too, by the path of attributes that leads to them."""
        return {} if isinstance(self._loader.dataset, IterableDataset) else _reachable(self._fixed, _SAMPLER_LINKS)

    def snapshot(self) -> dict[str, Any]:
        """All states, copied."""
        rng = RngState().capture()
        return {
            "rng": decode(rng.tree, rng.tensors),
            "generators": {name: generator_state(name, live) for name, live in self._generators().items()},
            "samplers": {name: sampler.state_dict() for name, sampler in self._stateful_samplers().items()},
            "epochs": {name: sampler.epoch for name, sampler in self._samplers_with_epoch().items()},
        }

    def check(self, snapshot: Mapping[str, Any]) -> None:
        """Raise unless :meth:`snapshot` could have made it here. Changes nothing."""
        parts = {"generators": self._generators(), "samplers": self._stateful_samplers()}
        for part, live in {**parts, "epochs": self._samplers_with_epoch()}.items():
            saved = snapshot.get(part)
            if not isinstance(saved, dict):
                raise CorruptCheckpointError(f"{_NAME}: not the state of a ResumableLoader: no {part}")
            if set(saved) != set(live):
                names = f"{part} {sorted(saved)} were saved, live are {sorted(live)}"
                raise IncompatibleStateError(f"the loader is not the one that was saved: {names}")
        _plan(RngState(), snapshot.get("rng"))
        for name, live in self._generators().items():
            _plan(GeneratorAdapter(name, live), snapshot["generators"][name])

    def set_random(self, snapshot: Mapping[str, Any]) -> None:
        """Set the global generators, and those of samplers and dataset."""
        _plan(RngState(), snapshot["rng"]).apply()
        self.set_generators(snapshot)

    def set_generators(self, snapshot: Mapping[str, Any]) -> None:
        """Set the generators of samplers and dataset."""
        for name, live in self._generators().items():
            _plan(GeneratorAdapter(name, live), snapshot["generators"][name]).apply()

    def set_samplers(self, snapshot: Mapping[str, Any]) -> None:
        """Set the samplers' own states and epoch numbers."""
        for name, sampler in self._stateful_samplers().items():
            sampler.load_state_dict(snapshot["samplers"][name])
        for name, sampler in self._samplers_with_epoch().items():
            sampler.set_epoch(snapshot["epochs"][name])

    def _generators(self) -> dict[str, Any]:
        owners = {"": self._loader, **self.samplers, **_reachable(self._loader, _DATA_LINKS)}
        found: dict[int, tuple[str, Any]] = {}
        for path, owner in owners.items():
            for name, value in getattr(owner, "__dict__", {}).items():
                if isinstance(value, GENERATORS) and not isinstance(value, random.SystemRandom):
                    found.setdefault(id(value), (f"{path}.{name}".lstrip("."), value))
        return dict(found.values())

    def _stateful_samplers(self) -> dict[str, Any]:
        """Those that know where they are. A distributed one depends on its epoch number alone."""
        samplers = self.samplers.items()
        return {
            name: sampler
            for name, sampler in samplers
            if _is_stateful(sampler) and not isinstance(sampler, DistributedSampler)
        }

    def _samplers_with_epoch(self) -> dict[str, Any]:
        return {
            name: sampler
            for name, sampler in self.samplers.items()
            if callable(getattr(sampler, "set_epoch", None)) and type(getattr(sampler, "epoch", None)) is int
        }


def _reachable(root: Any, links: tuple[str, ...]) -> dict[str, Any]:
    """Every object that attributes named in ``links`` lead to from ``root``, by path; each once."""
    found: dict[str, Any] = {}
    waiting = [("", root)]
    while waiting:
        path, owner = waiting.pop(0)
        for name in links:
            value = getattr(owner, "__dict__", {}).get(name)
            if value is not None and all(value is not other for other in found.values()):
                found[f"{path}.{name}".lstrip(".")] = value
                waiting.append((f"{path}.{name}", value))
    return found


def _plan(adapter: Adapter, value: Any) -> RestorePlan:
    """The checked and filled plan that sets what ``adapter`` stands for to ``value``."""
    name = _NAME
    tree, tensors = encode(value, name)
    component = Component(adapter.kind, tree, {key: spec_of(tensor) for key, tensor in tensors.items()})
    plan = adapter.prepare(SavedState(name, component), RestoreOptions())
    for key, target in plan.reads.items():
        target.copy_(tensors[key])
    return plan


# -------------------------------------------------------------------------------------------------------------- checks


def _check_state(state: Any) -> None:
    if not isinstance(state, dict) or set(state) != set(_STATE_TYPES):
        raise CorruptCheckpointError(f"{_NAME}: not the state of a ResumableLoader")
    for key, types in _STATE_TYPES.items():
        if not isinstance(state[key], types) or (type(state[key]) is int and state[key] < 0 and "epoch" not in key):
            raise CorruptCheckpointError(f"{_NAME}[{key!r}]: {state[key]!r} is no state of a ResumableLoader")


def _check_settings(saved: Mapping[str, Any], live: Mapping[str, Any]) -> None:
    names = [*live, *(name for name in saved if name not in live)]
    changed = [name for name in names if saved.get(name) != live.get(name)]
    if changed:
        rows = "; ".join(f"{name}: saved {saved.get(name)}, live {live.get(name)}" for name in changed)
        raise IncompatibleStateError(
            f"the loader is not the one that was saved ({rows}), so its position means other data. Build it as it was, "
            "or restore the other components alone: components=[...]"
        )


def _describe_sampler(sampler: Any) -> str:
    plain = {name: getattr(sampler, name, None) for name in _SAMPLER_SETTINGS}
    shown = (f"{name}={value}" for name, value in plain.items() if isinstance(value, (bool, int)))
    return f"{type(sampler).__qualname__}({', '.join(shown)})"


def _length(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except TypeError:
        return None


def _is_stateful(value: Any) -> bool:
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


def _worker_starts_anew(inner: Mapping[str, Any]) -> bool:
    """Whether a ``StatefulDataLoader`` restores a worker's ended dataset as one that has not ended (torchdata 0.11)."""
    workers = inner.get("_snapshot", {}).get("_worker_snapshots", {}).values()
    fetchers = [worker.get("fetcher_state") or {} for worker in workers]
    return any(fetcher.get("fetcher_ended") and fetcher.get("dataset_iter_state") is None for fetcher in fetchers)


def _persists(loader: DataLoader[Any]) -> bool:
    return bool(loader.persistent_workers and loader.num_workers)


# ------------------------------------------------------------------------------------------------------- augmentation


class SeededDataset(Dataset[T]):
    """A map-style dataset whose items draw the same random numbers for the same (seed, epoch, index).

    While an item is made, the global generators of Python, NumPy and torch (CPU) are seeded from the three; afterwards
    they are as they were. So a random transform gives the same item in every process, after any resume, with any number
    of workers. Generators that the transform owns are not reached. Batched reading (``__getitems__``) is not used, as
    each item has a seed of its own.

    A :class:`ResumableLoader` sets the epoch: the number given to ``loader.set_epoch``, else it counts them from 0.
    Without one call :meth:`set_epoch`, or every epoch gives the same items.
    """

    def __init__(self, dataset: Dataset[T], *, seed: int = 0) -> None:
        """``seed``: any integer; another one gives other random numbers."""
        self._dataset = dataset
        self._seed = operator.index(seed)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see it change

    def __getitem__(self, index: Any) -> T:
        with _seeded_generators(self._seed, int(self._epoch), index):
            return self._dataset[index]

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type] # as for every map-style dataset

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_dataset", "__getitems__"):
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def set_epoch(self, epoch: int) -> None:
        """Make the items of another epoch."""
        self._epoch.fill_(operator.index(epoch))

    def follow(self, epoch: torch.Tensor) -> None:
        """Read the epoch from ``epoch``, a shared int64 scalar, from now on: how a loader tells its workers."""
        self._epoch = epoch


def seeded(dataset: Dataset[T], *, seed: int = 0) -> SeededDataset[T]:
    """``dataset`` with random numbers that depend on (seed, epoch, index) alone; see :class:`SeededDataset`."""
    return SeededDataset(dataset, seed=seed)


@contextmanager
def _seeded_generators(seed: int, epoch: int, index: Any) -> Iterator[None]:
    """Seed the global generators, and put them back."""
    key: object
    try:
        key = operator.index(index)
    except TypeError:
        key = repr(index)
    digest = hashlib.blake2b(repr((seed, epoch, key)).encode(), digest_size=24).digest()
    python, default = random.getstate(), torch.get_rng_state()
    legacy = np.random.get_state(legacy=False)  # noqa: NPY002 - transforms draw from the global one
    try:
        random.seed(digest[:8])
        np.random.seed(np.frombuffer(digest[8:16], dtype="<u4"))  # noqa: NPY002
        torch.default_generator.manual_seed(int.from_bytes(digest[16:], "little") >> 1)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
        torch.set_rng_state(default)


def _seeded_datasets(dataset: Any) -> list[SeededDataset[Any]]:
    """Every seeded dataset inside ``dataset``: through Subset, ConcatDataset and what is built like them."""
    if isinstance(dataset, SeededDataset):
        return [dataset]
    attributes = getattr(dataset, "__dict__", {})
    inner = [attributes["dataset"]] if "dataset" in attributes else attributes.get("datasets", ())
    return [found for item in inner for found in _seeded_datasets(item)] if isinstance(inner, (list, tuple)) else []


__all__ = ["ResumableLoader", "SeededDataset", "seeded"]
