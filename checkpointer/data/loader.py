"""The wrapper around a ``DataLoader`` that counts batches, and takes an epoch up again."""

from __future__ import annotations

import copy
import functools
import itertools
import operator
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset

from checkpointer.data.augmentation import SeededDataset, seeded_datasets
from checkpointer.data.checks import (
    check_settings,
    check_state,
    describe_sampler,
    is_stateful,
    length_of,
    persists,
    type_of,
    worker_starts_anew,
)
from checkpointer.data.prepared import Before, Prepared, Reads, prepared
from checkpointer.data.replay import Indices, Replay
from checkpointer.data.resharding import carried_over
from checkpointer.data.sources import Sources
from checkpointer.errors import IncompatibleStateError, UnsupportedStateError
from checkpointer.state.modes import outside_inference_mode
from checkpointer.state.unregistered import position_is_safe, position_moves
from checkpointer.system import messages

T = TypeVar("T")

#: Loaders restored together with the global generators, whose epoch has not been taken up again.
_WAITING: weakref.WeakSet[ResumableLoader[Any]] = weakref.WeakSet()


class ResumableLoader(Generic[T]):
    """Makes a ``DataLoader``, or a torchdata ``StatefulDataLoader``, a component that resumes exactly.

    It is iterated like the loader inside, has its length and its attributes, and knows the position: see the package's
    docstring. Restore before the first ``iter(loader)``. One iterator at a time: a new one begins a new epoch, and the
    old one then refuses to go on.

    How the position comes back depends on the data:

    - map-style: the sampler is replayed, no item is read again, and ``num_workers`` may change;
    - iterable with ``state_dict()`` and ``load_state_dict()``, no workers: the dataset's state is saved and restored;
    - iterable in a ``StatefulDataLoader``: its own ``state_dict()`` is;
    - other iterables: the batches seen are drawn again and dropped, with a warning.

    A loader that ``accelerator.prepare`` or ``fabric.setup_dataloaders`` has returned is wrapped like any other.
    First prepare, then wrap: accelerate passes by what is no ``DataLoader``, and would not learn where an epoch ends.

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
        self._outer = loader
        self._prepared = prepared(loader)
        if self._prepared is not None:
            loader = self._prepared.loader
        if not isinstance(loader, DataLoader):
            raise UnsupportedStateError(f"ResumableLoader wraps a torch DataLoader, not a {type(loader).__qualname__}")
        if loader.num_workers and not getattr(loader, "in_order", True):
            raise UnsupportedStateError(
                "a DataLoader with in_order=False has no position: which batches were seen depends on timing. "
                "Leave in_order=True"
            )
        self._loader = loader
        self._iterable = isinstance(loader.dataset, IterableDataset)
        if self._owns_position and persists(loader):
            raise UnsupportedStateError(
                "a StatefulDataLoader does not bring back datasets inside persistent workers at the end of an epoch "
                "(torchdata 0.11: what the new workers prefetch is lost); use persistent_workers=False"
            )
        self._sources = Sources(loader)
        self._indices = Indices(loader.sampler if loader.batch_sampler is None else loader.batch_sampler, self._sources)
        self._seeded = seeded_datasets(loader.dataset)
        with outside_inference_mode():
            self._dataset_epoch = torch.zeros((), dtype=torch.int64, device="cpu")
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
        self._reads: Reads | None = None
        self._count = 0
        """The number that the running epoch has in a prepared loader."""
        self._restored: dict[str, Any] | None = None
        self._asked = False
        """Whether anybody has asked for its state: else a save says that it is not saved."""

    # ----------------------------------------------------------------------------------------------- the DataLoader

    def __iter__(self) -> Iterator[T]:
        """Take up the restored epoch, or begin a new one. A prepared loader does it when it is asked for a batch."""
        epoch = _EpochIterator(self, None if self._prepared else self._start_epoch())
        self._current = weakref.ref(epoch)
        return epoch

    def _start_epoch(self) -> Iterator[T]:
        """The iterator of the loader inside, for an epoch that has begun, or goes on."""
        restored = self._restored
        resumes = restored is not None and restored["running"]
        if restored is not None and resumes:
            self._iterator = self._resume(restored)
        else:
            self._iterator = self._begin(restored)
            self._epoch += 1
            self._batch = 0
        self._failed = 0
        self._running = True
        self._restored = None
        _WAITING.discard(self)
        if not self._asked:
            position_moves(self)
        return self._iterator if self._reads is None else self._reads

    def __len__(self) -> int:
        """The number of batches of a whole epoch."""
        return len(self._outer)

    def __getattr__(self, name: str) -> Any:
        if name == "_outer":  # not made yet: a copy or an unpickled object
            raise AttributeError(name)
        return getattr(self._outer, name)

    def set_epoch(self, epoch: int) -> None:
        """Hand the number of the coming epoch to the sampler, as ``DistributedSampler`` needs it, and to the dataset.

        An epoch that is taken up again keeps the number that it began with.
        """
        self._set_epoch = operator.index(epoch)
        self._pass_epoch(self._set_epoch)
        if self._prepared is not None:
            self._prepared.count = self._set_epoch

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
        self._is_held()
        now = self._sources.snapshot()
        if self._restored is not None:
            place = {**self._restored, "set_epoch": self._set_epoch, "now": now}
            if self._prepared is not None and not place["running"]:
                place["prepared"] = {"count": self._prepared.count, "before": None}
            return place
        state = {
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
            "workers_persist": self._epoch > 0 and persists(self._loader),
            "start": self._epoch_start() if self._running else None,
            "now": now,
            "dataset": self._dataset_state(),
            "inner": self._loader.state_dict() if self._owns_position and self._epoch else None,  # type: ignore[attr-defined]
        }
        return state if self._prepared is None else self._without_what_was_read_ahead(state, self._prepared)

    def check_state_dict(self, state_dict: object) -> None:
        """Refuse a state that does not fit, before a restore changes anything; errors as of ``load_state_dict``."""
        self._refuse_while_iterating()
        if isinstance(state_dict, dict) and isinstance(state_dict.get("settings"), dict):
            live = self._settings()
            if state_dict["settings"] != live:
                check_state(state_dict)
                state_dict = carried_over(state_dict, live) or state_dict
            check_settings(state_dict["settings"], live)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a position; the next ``iter`` goes on from it.

        Raises:
            IncompatibleStateError: an iterator of this loader is in use, or the loader is not the one that was saved.
            CorruptCheckpointError: not the state of a ``ResumableLoader``.
        """
        self._is_held()
        self._refuse_while_iterating()
        check_state(state_dict)
        moved = carried_over(state_dict, self._settings())
        state_dict = moved or state_dict
        check_settings(state_dict["settings"], self._settings())
        self._sources.check(state_dict["now"])
        ahead = state_dict.get("prepared", {}).get("before")
        for earlier in filter(None, (state_dict["start"], ahead)):
            self._sources.check(earlier)
        self._drop_iterator()
        self._load_sources(state_dict)
        self._epoch, self._batch = state_dict["epoch"], state_dict["batch"]
        self._running, self._ended = state_dict["running"], state_dict["ended"]
        self._label, self._label_given = state_dict["label"], state_dict["label_given"]
        self._set_epoch = state_dict["set_epoch"]
        self._restored = dict(state_dict)
        if self._prepared is not None:
            self._prepared.count = state_dict["prepared"]["count"]
        if moved is None:  # else the generators of one rank would be those of all
            _WAITING.add(self)

    def leave_rng(self) -> None:
        """Called after a restore without the global generators: the next ``iter`` leaves them as they are too."""
        _WAITING.discard(self)

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
        iterator = self._build(Replay(before) if workers_lived else None)
        if workers_lived and self._iterable:
            self._sources.set_random(before)
        self._reads = self._watched(iterator, 0, None)
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
        ahead = restored.get("prepared", {}).get("before")
        place = ahead or after
        iterator = self._replay_data(restored, place) if self._iterable else self._replay_indices(restored, place)
        then = None if ahead is None else functools.partial(self._sources.set_random, after)
        self._reads = self._watched(iterator, self._batch, then)
        _WAITING.clear()
        return iterator

    def _replay_indices(self, restored: Mapping[str, Any], after: dict[str, Any]) -> Iterator[T]:
        """Map-style: have the sampler draw the epoch's order again, and pass over what was seen."""
        replay = None
        if restored["start"] is not None:
            consumed = 0 if self._owns_position else restored["batch"]  # else the loader inside passes over them
            replay = Replay(restored["start"], consumed, restored["drawn"], restored["exhausted"], after)
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

    def _build(self, replay: Replay | None) -> Iterator[T]:
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
    def _indices_installed(self, replay: Replay | None) -> Iterator[None]:
        """While an iterator is built: our stand-in in the place of the index sampler, which iterables have none of."""
        if self._iterable:
            yield
            return
        self._indices.prepare(replay)
        name = "sampler" if self._loader.batch_sampler is None else "batch_sampler"
        attributes = vars(self._loader)  # a DataLoader refuses ordinary assignment
        original = attributes[name]
        attributes[name] = self._indices.stand_in()
        try:
            yield
        finally:
            attributes[name] = original

    def _drop(self, iterator: Iterator[T], count: int) -> None:
        if count:
            messages.warn(
                f"{count} batches are drawn again and dropped: {type(self._loader.dataset).__qualname__} cannot be "
                "placed. Give it state_dict() and load_state_dict() and use no workers, or use a StatefulDataLoader",
            )
        dropped = sum(1 for _ in itertools.islice(iterator, count))
        if dropped < count:
            raise IncompatibleStateError(f"the dataset ended after {dropped} batches; {count} had been seen when saved")

    def _next(self, epoch: _EpochIterator[T]) -> T:
        """The next batch, counted; called by the iterator that the loop holds."""
        if self._current is None or self._current() is not epoch:
            raise UnsupportedStateError(
                "a newer iterator of this ResumableLoader exists, or another position was restored: only one position "
                "can be saved. Use the newest iterator, or a second loader"
            )
        if not self._loader.num_workers:
            self._attach_epoch()  # another loader may share the dataset
        if epoch.iterator is not None:
            self._batch += self._failed  # the loop went on after a batch that could not be read: it is passed over
            self._failed = 0
        try:
            batch = self._first(epoch) if epoch.iterator is None else next(epoch.iterator)
        except StopIteration:
            self._end_epoch()
            raise
        except Exception:
            self._failed = int(epoch.iterator is not None)
            raise
        self._batch += 1
        if self._reads is not None:
            self._reads.forget(self._batch)
        return batch

    def _first(self, epoch: _EpochIterator[T]) -> T:
        """The first batch that is asked of a prepared loader: only now it builds its iterator."""
        assert self._prepared is not None
        if self._restored is not None and self._restored["running"]:  # else set_epoch may have been called since
            self._prepared.count = self._restored["prepared"]["count"]
        self._count = self._prepared.count
        iterator = iter(self._outer)

        def start() -> Iterator[T]:
            inside = self._start_epoch()
            epoch.iterator = iterator
            return inside

        batch: T = self._prepared.first(iterator, start)
        return batch

    def _end_epoch(self) -> None:
        position_is_safe(self)
        self._running, self._batch, self._start, self._reads = False, 0, None, None
        if self._prepared is not None:  # which does not count an epoch of which no batch was left
            self._prepared.count = self._count + 1

    # ------------------------------------------------------------------------------------------------- small parts

    @property
    def _owns_position(self) -> bool:
        """Whether the loader inside is one with ``state_dict()`` that knows what only it can know."""
        if not is_stateful(self._loader):
            return False
        return self._iterable or (bool(self._loader.num_workers) and is_stateful(self._loader.dataset))

    @property
    def _dataset_positions(self) -> bool:
        """Whether the restored state of an iterable dataset holds its position."""
        return is_stateful(self._loader.dataset) and not self._loader.num_workers

    def _watched(self, iterator: Iterator[T], number: int, then: Callable[[], object] | None) -> Reads | None:
        """What a prepared loader without workers is to read from, beginning with batch ``number``."""
        if self._prepared is None or self._loader.num_workers:
            return None
        return Reads(iterator, number, self._before_read, then)

    def _before_read(self) -> Before:
        dataset = copy.deepcopy(self._dataset_state())  # which may be what the dataset itself goes on with
        return Before(self._indices.drawn, self._sources.snapshot(), dataset, self._has_ended())

    def _without_what_was_read_ahead(self, state: dict[str, Any], prepared: Prepared) -> dict[str, Any]:
        """The position of the loop, where the loader has read more than it has given."""
        before = self._reads.before(self._batch) if self._running and self._reads is not None else None
        count = self._count if self._running else prepared.count
        if before is None:
            return {**state, "prepared": {"count": count, "before": None}}
        place = {"drawn": before.drawn, "exhausted": False, "ended": before.ended, "dataset": before.dataset}
        return {**state, **place, "prepared": {"count": count, "before": before.sources}}

    def _epoch_start(self) -> dict[str, Any] | None:
        return self._start if self._iterable else self._indices.start

    def _dataset_state(self) -> Any:
        """The state of this process's copy of the dataset."""
        dataset: Any = self._loader.dataset
        return dataset.state_dict() if is_stateful(dataset) and not self._owns_position else None

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
            "loader": self._prepared.name if self._prepared else type_of(loader),
            "dataset": "iterable" if self._iterable else "map-style",
            "batch_size": loader.batch_size,
            "drop_last": loader.drop_last,
        }
        if not self._iterable:
            settings["length of the dataset"] = length_of(loader.dataset)
            settings |= {path: describe_sampler(sampler) for path, sampler in self._sources.samplers.items()}
        if self._iterable or self._owns_position:
            settings["num_workers"] = loader.num_workers
        return settings

    def _is_held(self) -> None:
        """Somebody cares for the position."""
        self._asked = True
        position_is_safe(self)

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
        self._iterator = self._reads = None
        if getattr(self._loader, "_iterator", None) is not None:
            self._loader._iterator = None  # noqa: SLF001 - the only handle on persistent workers

    def _load_sources(self, state: Mapping[str, Any]) -> None:
        if self._owns_position:
            if state["inner"] is not None:
                if state["running"] and worker_starts_anew(state["inner"]):
                    messages.warn(
                        "saved when the dataset of a worker had ended inside a short batch: a StatefulDataLoader asks "
                        "it once more, so one that begins anew then repeats its items in this epoch",
                    )
                self._loader.load_state_dict(state["inner"])  # type: ignore[attr-defined]
        elif is_stateful(self._loader.dataset):
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

    def __init__(self, owner: ResumableLoader[T], iterator: Iterator[T] | None) -> None:
        self._owner = owner
        self.iterator = iterator
        """``None``: a prepared loader that was not asked for a batch."""

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        try:
            return self._owner._next(self)  # noqa: SLF001 - the other half of one thing
        except StopIteration:
            self.iterator = iter(())
            raise
