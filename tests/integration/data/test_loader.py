"""A run resumed at any place of an epoch sees the batches, losses and random numbers of the uninterrupted one."""

from __future__ import annotations

import gc
import random
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    Subset,
    WeightedRandomSampler,
)
from torchdata.stateful_dataloader import StatefulDataLoader

from checkpointer import CheckpointManager, Stateful, data
from checkpointer.data import ResumableLoader, SeededDataset, seeded
from checkpointer.errors import (
    CheckpointerWarning,
    CorruptCheckpointError,
    IncompatibleStateError,
    UnsupportedStateError,
)
from checkpointer.state.tree.decode import decode
from checkpointer.state.tree.encode import encode
from tests.support import processes
from tests.support.compare import assert_identical
from tests.support.loading import (
    CONFIG,
    ITEMS,
    Augmented,
    Items,
    StatefulStream,
    Stream,
    assert_exact,
    assert_same,
    drops,
    new_run,
    places,
    resumed,
    scramble,
    uninterrupted,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # torchdata calls it
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # on a machine with one core
    pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning"),  # Python 3.12 and later
]


class EagerBatches(Sampler[Any]):
    """A batch sampler that shuffles with Python's global generator as soon as it is asked for an iterator."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return (self.length + 3) // 4

    def __iter__(self):
        order = [*range(self.length)]
        random.shuffle(order)
        return iter([order[at : at + 4] for at in range(0, self.length, 4)])


class OwnGenerator(Sampler[Any]):
    """Draws each index with a generator that lives from epoch to epoch."""

    def __init__(self, length):
        self.length = length
        self.numbers = np.random.default_rng(5)

    def __len__(self):
        return self.length

    def __iter__(self):
        return (int(self.numbers.integers(self.length)) for _ in range(self.length))


class KnowsItsEpoch(Sampler[Any]):
    """Counts its epochs by itself, and has a state."""

    def __init__(self, length):
        self.length, self.shift = length, 0

    def __len__(self):
        return self.length

    def __iter__(self):
        self.shift += 1
        return iter([(index * 3 + self.shift) % self.length for index in range(self.length)])

    def state_dict(self):
        return {"shift": self.shift}

    def load_state_dict(self, state):
        self.shift = state["shift"]


def _generator(seed=3):
    return torch.Generator().manual_seed(seed + int(torch.randint(1000, ())))  # another one in every process


def _with_replacement(dataset, generator):
    return RandomSampler(dataset, replacement=True, num_samples=70, generator=generator)


def _several_passes(dataset, generator):
    return RandomSampler(dataset, num_samples=2 * ITEMS + 4, generator=generator)


def _sampled(make, dataset, w, **options):
    generator = _generator()
    return DataLoader(dataset, 4, sampler=make(dataset, generator), generator=generator, num_workers=w, **options)


MAP_STYLE: dict[str, Callable[[Any, int], DataLoader[Any]]] = {
    "sequential": lambda d, w: DataLoader(d, 4, num_workers=w),
    "shuffled": lambda d, w: DataLoader(d, 4, shuffle=True, num_workers=w),
    "shuffled with a generator": lambda d, w: DataLoader(d, 4, shuffle=True, generator=_generator(), num_workers=w),
    "whole batches": lambda d, w: DataLoader(d, 4, shuffle=True, drop_last=True, num_workers=w),
    "no batches": lambda d, w: DataLoader(d, None, shuffle=True, num_workers=w),
    "distributed": lambda d, w: DataLoader(d, 2, sampler=DistributedSampler(d, 2, 1), num_workers=w),
    "weighted": lambda d, w: DataLoader(d, 4, sampler=WeightedRandomSampler([*range(1, ITEMS + 1)], 13), num_workers=w),
    "with replacement": lambda d, w: _sampled(_with_replacement, d, w),
    "several passes": lambda d, w: _sampled(_several_passes, d, w),
    "a batch sampler": lambda d, w: DataLoader(d, batch_sampler=EagerBatches(len(d)), num_workers=w),
    "inner sampler": lambda d, w: DataLoader(
        d, batch_sampler=BatchSampler(OwnGenerator(len(d)), 4, True), num_workers=w
    ),
    "stateful sampler": lambda d, w: DataLoader(d, 4, sampler=KnowsItsEpoch(len(d)), num_workers=w),
    "StatefulDataLoader": lambda d, w: StatefulDataLoader(d, 4, shuffle=True, num_workers=w),
}


# -------------------------------------------------------------------------------------------------------- exact resume


@pytest.mark.parametrize("name", MAP_STYLE)
def test_a_resume_without_workers_is_exact(name, tmp_path):
    assert_exact(lambda: MAP_STYLE[name](Augmented(), 0), tmp_path)


@pytest.mark.parametrize(
    "name, workers",
    [
        ("shuffled", 1),
        ("shuffled", 2),
        ("shuffled with a generator", 2),
        ("no batches", 2),
        ("distributed", 2),
        ("weighted", 1),
        ("with replacement", 2),
        ("several passes", 1),
        ("a batch sampler", 2),
        ("inner sampler", 1),
        ("StatefulDataLoader", 2),
    ],
)
def test_a_resume_with_workers_is_exact(name, workers, tmp_path):
    make = lambda: MAP_STYLE[name](seeded(Augmented(), seed=9), workers)
    assert_exact(make, tmp_path, where=("start", "middle", "last batch", "boundary"))


@pytest.mark.parametrize(
    "kind, generator",
    [(DataLoader, _generator), (DataLoader, lambda: None), (StatefulDataLoader, lambda: None)],
    ids=["own generator", "default generator", "StatefulDataLoader"],
)
def test_a_resume_with_persistent_workers_is_exact(kind, generator, tmp_path):
    def make():
        dataset = seeded(Augmented(), seed=9)
        return kind(dataset, 4, shuffle=True, num_workers=1, persistent_workers=True, generator=generator())

    assert_exact(make, tmp_path, where=("middle", "last batch", "boundary"))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_iterable_dataset_without_state_is_drawn_again_with_a_warning(workers, tmp_path):
    make = lambda: DataLoader(Stream(), 4, num_workers=workers)
    assert_exact(make, tmp_path, expect=drops, where=("middle", "last batch", "boundary"))


@pytest.mark.parametrize("length", [12, 14])
def test_an_iterable_dataset_with_state_goes_on_where_it_was(length, tmp_path):
    assert_exact(lambda: DataLoader(StatefulStream(length), 4), tmp_path)


def test_an_iterable_dataset_with_state_reads_nothing_twice(tmp_path):
    make = lambda: DataLoader(StatefulStream(), 4)
    whole = uninterrupted(make, tmp_path / "run")
    part = resumed(make, tmp_path / "run", places(whole)["middle"])
    assert part.loader.dataset.reads.sum() == 2 * ITEMS - 8


@pytest.mark.parametrize("length, workers", [(14, 0), (16, 0), (16, 1), (16, 2)])
def test_the_state_of_a_stateful_loader_of_an_iterable_is_used(length, workers, tmp_path):
    make = lambda: StatefulDataLoader(StatefulStream(length), 4, num_workers=workers)
    assert_exact(make, tmp_path, where=("start", "middle", "last batch", "boundary"))


def test_a_stateful_loader_that_would_repeat_the_items_of_an_ended_worker_warns():
    loader, fresh = (ResumableLoader(StatefulDataLoader(StatefulStream(7), 4, num_workers=1)) for _ in range(2))
    batches = iter(loader)
    next(batches), next(batches)
    with pytest.warns(CheckpointerWarning, match="ended inside a short batch"):
        fresh.load_state_dict(loader.state_dict())


def test_datasets_in_the_persistent_workers_of_a_stateful_loader_are_refused():
    with pytest.raises(UnsupportedStateError, match="persistent_workers=False"):
        ResumableLoader(StatefulDataLoader(StatefulStream(), 4, num_workers=1, persistent_workers=True))


class StatefulItems(Items):
    """Items that count up from pass to pass of the worker that reads them."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __getitem__(self, index):
        self.calls += 1
        return super().__getitem__(index) + self.calls

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


@pytest.mark.parametrize("sampler", [EagerBatches, None])
def test_the_state_of_a_map_style_dataset_in_the_workers_of_a_stateful_loader_comes_back(sampler, tmp_path):
    def make():
        if sampler is None:
            return StatefulDataLoader(StatefulItems(), 4, shuffle=True, num_workers=2)
        return StatefulDataLoader(StatefulItems(), batch_sampler=sampler(ITEMS), num_workers=2)

    assert_exact(make, tmp_path, where=("start", "middle", "last batch", "boundary"))


def test_the_state_of_a_map_style_dataset_comes_back_without_workers(tmp_path):
    assert_exact(lambda: DataLoader(StatefulItems(), 4, shuffle=True), tmp_path, where=("middle", "boundary"))


@pytest.mark.parametrize("name", ["shuffled", "shuffled with a generator", "with replacement", "several passes"])
@pytest.mark.parametrize("before, after", [(2, 0), (0, 2), (1, 2)])
def test_another_number_of_workers_changes_nothing(name, before, after, tmp_path):
    whole = uninterrupted(lambda: MAP_STYLE[name](Items(), before), tmp_path / "run")
    step = places(whole)["middle"]
    part = resumed(lambda: MAP_STYLE[name](Items(), after), tmp_path / "run", step)
    assert_same(whole, part, step)


def test_what_is_drawn_between_restore_and_the_first_iterator_changes_nothing(tmp_path):
    make = lambda: MAP_STYLE["shuffled"](Augmented(), 0)
    whole = uninterrupted(make, tmp_path / "run")
    step = places(whole)["middle"]
    assert_same(whole, resumed(make, tmp_path / "run", step, disturb=scramble), step)


def random_states():
    return random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["shuffled", "a batch sampler", "iterable"])
def test_a_restore_that_does_not_name_rng_leaves_it_alone_at_the_first_iterator_too(name, workers, tmp_path):
    def make():
        if name == "iterable":
            return StatefulDataLoader(Stream(), 4, num_workers=workers)
        return MAP_STYLE[name](Items(), workers)

    whole = uninterrupted(make, tmp_path / "run")
    step = places(whole)["middle"]
    run = new_run(make)
    with CheckpointManager(tmp_path / "run", config=CONFIG, read_only=True, **run.components) as mgr:
        mgr.restore(step)  # lets the first iterator set the generators, unless another restore comes between
        mgr.restore(step, components=["model", "loader"])
    scramble()
    before = random_states()
    iterator = iter(run.loader)
    first = next(iterator, None)
    assert_identical(random_states(), before)
    rest = [entry[0] for entry in whole.trace[whole.saved_at[step] :]]
    for batch in [] if first is None else [first, *iterator]:
        assert_identical(batch, rest.pop(0))
    assert type(rest[0]) is str  # the epoch is over


def test_a_restore_that_names_rng_sets_it_at_the_first_iterator(tmp_path):
    make = lambda: MAP_STYLE["shuffled"](Items(), 0)
    whole = uninterrupted(make, tmp_path / "run")
    step = places(whole)["middle"]
    run = new_run(make)
    with CheckpointManager(tmp_path / "run", config=CONFIG, read_only=True, **run.components) as mgr:
        mgr.restore(step, components=["loader", "rng"])
        restored = random_states()
    scramble()
    iter(run.loader)
    assert_identical(random_states(), restored)


def test_a_resume_of_a_resume_is_exact(tmp_path):
    make = lambda: MAP_STYLE["several passes"](Augmented(), 0)
    whole = uninterrupted(make, tmp_path / "run")
    first, second = places(whole)["start"], places(whole)["middle"] + 1
    run = new_run(make)
    with CheckpointManager(tmp_path / "run", config=CONFIG, **run.components) as mgr:
        mgr.restore(first)
        run.progress["step"] += 1
        for batch in run.loader:
            run.learn(batch)
            run.save(mgr)
            if run.progress["step"] > second:
                break
    assert_same(whole, resumed(make, tmp_path / "run", second), second)


def test_a_save_before_the_first_batch_of_a_restored_loader_keeps_its_position(tmp_path):
    make = lambda: MAP_STYLE["shuffled with a generator"](Augmented(), 0)
    whole = uninterrupted(make, tmp_path / "run")
    step = places(whole)["middle"]
    run = new_run(make)
    with CheckpointManager(tmp_path / "run", config=CONFIG, **run.components) as mgr:
        mgr.restore(step)
        mgr.save(step, overwrite=True)
    assert_same(whole, resumed(make, tmp_path / "run", step), step)


def test_two_loaders_resumed_one_after_the_other_do_not_rewind_each_other(tmp_path):
    def play(root, restore_step=None):
        scramble()
        first, second = (ResumableLoader(DataLoader(Augmented(), 2, shuffle=True)) for _ in range(2))
        seen = []
        with CheckpointManager(root, config=CONFIG, first=first, second=second) as mgr:
            if restore_step is not None:
                scramble()
                mgr.restore(restore_step)
            one = iter(first)
            two = None
            for step in range(0 if restore_step is None else restore_step + 1, 5):
                seen.append(next(one))
                two = iter(second) if two is None else two
                seen.append(next(two))
                mgr.save(step)
        return seen

    whole = play(tmp_path / "run")
    assert_identical(play(tmp_path / "run", 2), whole[6:])


def test_the_loop_of_the_documentation_is_exact_as_written(tmp_path):
    def train(total_steps):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), nn.Dropout())
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        loader = ResumableLoader(DataLoader(Augmented(), 4, shuffle=True))

        def forever():
            while True:
                yield from loader

        batches = forever()
        losses = []

        def train_step(step):
            optimizer.zero_grad()
            loss = model(next(batches)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())

        mgr = CheckpointManager(tmp_path / str(split), config=CONFIG, model=model, optimizer=optimizer, loader=loader)
        restored = mgr.restore_latest()
        start = restored.step + 1 if restored else 0
        with mgr:
            for step in range(start, total_steps):
                train_step(step)
                mgr.save(step)
        return losses, model.state_dict(), torch.get_rng_state()

    for split in (1, 2, 4, 5):  # an epoch has four batches
        random.seed(1)
        np.random.seed(1)
        head, _, _ = train(split)
        scramble()
        tail, weights, generator = train(10)
        (tmp_path / str(split)).rename(tmp_path / f"done-{split}")
        random.seed(1)
        np.random.seed(1)
        losses, expected_weights, expected_generator = train(10)
        assert_identical(head + tail, losses)
        assert_identical((weights, generator), (expected_weights, expected_generator))


CHILD = """
import pickle, sys
from tests.integration.data.test_loader import *
make = lambda: MAP_STYLE["shuffled"](seeded(Augmented(), seed=9), 2)
part = resumed(make, sys.argv[1], int(sys.argv[2]))
pickle.dump((part.trace, part.final()), open(sys.argv[3], "wb"))
"""


def test_a_resume_in_a_fresh_process_is_exact(tmp_path):
    import pickle

    whole = uninterrupted(lambda: MAP_STYLE["shuffled"](seeded(Augmented(), seed=9), 2), tmp_path / "run")
    step = places(whole)["middle"]
    command = [sys.executable, "-c", CHILD, str(tmp_path / "run"), str(step), str(tmp_path / "out")]
    processes.run(command, check=True)
    trace, final = pickle.loads((tmp_path / "out").read_bytes())
    assert_identical(trace, whole.trace[whole.saved_at[step] :])
    assert_identical(final, whole.final())


@pytest.mark.parametrize("workers", [0, 2])
def test_no_item_that_was_seen_is_read_again(workers, tmp_path):
    make = lambda: DataLoader(Items(), 4, shuffle=True, num_workers=workers)
    whole = uninterrupted(make, tmp_path / "run")
    step = places(whole)["middle"]
    part = resumed(make, tmp_path / "run", step)
    seen = torch.cat([entry[0][:, 0] for entry in whole.trace[5 : whole.saved_at[step]]]).long()
    assert len(seen) == 8
    expected = torch.full((ITEMS,), 2)
    expected[seen] = 1
    assert_identical(part.loader.dataset.reads, expected)


# ------------------------------------------------------------------------------------- each part of the state is needed


def _state_without(monkeypatch, change):
    load = ResumableLoader.load_state_dict
    monkeypatch.setattr(ResumableLoader, "load_state_dict", lambda self, state: load(self, {**state, **change(state)}))


def _no_offset(monkeypatch):
    _state_without(monkeypatch, lambda state: {"batch": 0})


def _no_epoch_start(monkeypatch):
    _state_without(monkeypatch, lambda state: {"start": state["now"]})


def _no_random_numbers_after(monkeypatch):
    replay = data.loader.Replay
    monkeypatch.setattr(data.loader, "Replay", lambda *arguments: replay(*arguments[:4]))


@pytest.mark.parametrize("name", ["shuffled", "shuffled with a generator"])
@pytest.mark.parametrize("mutate", [_no_offset, _no_epoch_start, _no_random_numbers_after])
def test_a_resume_that_leaves_out_a_part_of_the_state_is_noticed(mutate, name, tmp_path, monkeypatch):
    make = lambda: MAP_STYLE[name](Augmented(), 0)
    whole = uninterrupted(make, tmp_path / "run")
    step = places(whole)["middle"]
    assert_same(whole, resumed(make, tmp_path / "run", step), step)
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        assert_same(whole, resumed(make, tmp_path / "run", step), step)


# --------------------------------------------------------------------------------------------------- like a DataLoader


def _loader(**options):
    return ResumableLoader(DataLoader(Items(), **{"batch_size": 4, **options}))


def test_it_has_the_length_and_the_attributes_of_the_loader_inside():
    inner = DataLoader(Items(), 4, shuffle=True)
    loader = ResumableLoader(inner)
    assert len(loader) == len(inner) == 4
    for name in ("dataset", "sampler", "batch_sampler", "batch_size", "num_workers"):
        assert getattr(loader, name) is getattr(inner, name)
    with pytest.raises(AttributeError):
        _ = loader.nothing
    assert isinstance(loader, Stateful)


@pytest.mark.parametrize("name", ["sequential", "shuffled", "shuffled with a generator", "weighted"])
@pytest.mark.parametrize("workers", [0, 1])
def test_it_gives_the_batches_of_the_loader_inside(name, workers):
    def batches(wrap):
        torch.manual_seed(4)
        loader = wrap(MAP_STYLE[name](Items(), workers))
        return [[*loader], [*loader], torch.get_rng_state()]

    assert_identical(batches(ResumableLoader), batches(lambda loader: loader))


def test_it_counts_epochs_and_batches():
    loader = _loader()
    assert (loader.epoch, loader.next_epoch, loader.batch) == (0, 0, 0)
    for number, _ in enumerate(loader, 1):
        assert (loader.epoch, loader.next_epoch, loader.batch) == (1, 1, number)
    assert (loader.epoch, loader.next_epoch, loader.batch) == (1, 1, 0)
    next(iter(loader))
    assert (loader.epoch, loader.next_epoch, loader.batch) == (2, 2, 1)


def test_the_counts_come_back():
    loader = _loader()
    batches = iter(loader)
    next(batches)
    fresh = _loader()
    fresh.load_state_dict(loader.state_dict())
    assert (fresh.epoch, fresh.next_epoch, fresh.batch) == (1, 0, 1)
    assert [batch[0, 0].item() for batch in fresh] == [4, 8, 12]
    assert (fresh.epoch, fresh.next_epoch, fresh.batch) == (1, 1, 0)


def test_an_abandoned_iterator_makes_way_for_a_new_epoch():
    loader = _loader()
    for _ in loader:
        break
    assert [batch[0, 0].item() for batch in loader] == [0, 4, 8, 12]
    assert loader.epoch == 2


def test_an_old_iterator_refuses_to_go_on_beside_a_new_one():
    loader = _loader()
    old = iter(loader)
    next(old)
    new = iter(loader)
    with pytest.raises(UnsupportedStateError, match="newer iterator"):
        next(old)
    assert next(new)[0, 0] == 0


def test_an_ended_iterator_stays_ended():
    batches = iter(_loader())
    assert len([*batches]) == 4
    assert [*batches] == []


class Broken(Items):
    broken = True

    def __getitem__(self, index):
        if index == 5 and self.broken:
            raise ValueError("unreadable")
        return super().__getitem__(index)


def test_a_batch_that_could_not_be_read_comes_again_unless_the_loop_went_on():
    loader = ResumableLoader(DataLoader(Broken(), 4))
    batches = iter(loader)
    next(batches)
    with pytest.raises(ValueError, match="unreadable"):
        next(batches)
    at_failure = loader.state_dict()
    assert next(batches)[0, 0] == 8
    for state, first in ((at_failure, 4), (loader.state_dict(), 12)):
        fresh = ResumableLoader(DataLoader(Items(), 4))
        fresh.load_state_dict(state)
        assert next(iter(fresh))[0, 0] == first


def test_set_epoch_reaches_the_distributed_sampler():
    dataset = Items()
    sampler = DistributedSampler(dataset, 2, 0)
    ResumableLoader(DataLoader(dataset, 4, sampler=sampler)).set_epoch(7)
    assert sampler.epoch == 7


def test_a_resumed_epoch_keeps_the_number_that_it_began_with():
    def make():
        dataset = Items()
        return ResumableLoader(DataLoader(dataset, 2, sampler=DistributedSampler(dataset, 2, 0)))

    loader, fresh = make(), make()
    loader.set_epoch(3)
    batches = iter(loader)
    next(batches)
    fresh.load_state_dict(loader.state_dict())
    fresh.set_epoch(4)
    assert_identical([*fresh], [*batches])
    assert fresh.sampler.epoch == 3


# ------------------------------------------------------------------------------------------------------------- refusals


def test_restoring_under_a_running_iterator_is_refused(tmp_path):
    loader = _loader()
    with CheckpointManager(tmp_path / "run", config=CONFIG, loader=loader) as mgr:
        batches = iter(loader)
        next(batches)
        mgr.save(0)
        with pytest.raises(IncompatibleStateError, match=r"restore_latest\(\) before iter\(loader\)"):
            mgr.restore(0)
        assert next(batches)[0, 0] == 4


def test_a_run_goes_back_after_leaving_the_loop(tmp_path):
    loader = _loader(shuffle=True)
    with CheckpointManager(tmp_path / "run", config=CONFIG, loader=loader) as mgr:
        seen = []
        for step, batch in enumerate(loader):
            mgr.save(step)
            seen.append(batch)
        mgr.restore(1)
        assert_identical([*loader], seen[2:])


def test_persistent_workers_end_at_once_when_the_loader_is_dropped():
    """In a cycle the garbage collector takes the queues apart before the workers are told: torch then waits for 5 s."""
    loader = _loader(shuffle=True, num_workers=1, persistent_workers=True)
    for _ in range(2):
        assert len([*loader]) == 4
    workers = loader._iterator._workers
    begin = time.monotonic()
    gc.disable()
    try:
        del loader
        assert not any(worker.is_alive() for worker in workers)
    finally:
        gc.enable()
    assert time.monotonic() - begin < 4


def test_a_run_with_persistent_workers_goes_back_after_leaving_the_loop(tmp_path):
    loader = _loader(shuffle=True, num_workers=1, persistent_workers=True)
    with CheckpointManager(tmp_path / "run", config=CONFIG, loader=loader) as mgr:
        seen = []
        for step, batch in enumerate(loader):
            mgr.save(step)
            seen.append(batch)
        seen += [*loader]
        mgr.restore(1)
        assert_identical([*loader, *loader], seen[2:])


def _distributed(replicas, rank):
    dataset = Items()
    return ResumableLoader(DataLoader(dataset, 2, sampler=DistributedSampler(dataset, replicas, rank)))


CHANGED = {
    "batch_size: saved 4, live 2": (_loader, lambda: _loader(batch_size=2)),
    "length of the dataset: saved 14, live 15": (_loader, lambda: ResumableLoader(DataLoader(Items(15), 4))),
    "drop_last: saved False, live True": (_loader, lambda: _loader(drop_last=True)),
    r"saved SequentialSampler\(\), live RandomSampler": (_loader, lambda: _loader(shuffle=True)),
    "num_replicas=2, .*rank=1.*, live .*num_replicas=3": (lambda: _distributed(2, 1), lambda: _distributed(3, 1)),
    "rank=1.*, live .*rank=0": (lambda: _distributed(2, 1), lambda: _distributed(2, 0)),
    "saved map-style, live iterable": (_loader, lambda: ResumableLoader(DataLoader(Stream(), 4))),
    "num_workers: saved 0, live 2": (
        lambda: ResumableLoader(DataLoader(Stream(), 4)),
        lambda: ResumableLoader(DataLoader(Stream(), 4, num_workers=2)),
    ),
    "saved DataLoader, live StatefulDataLoader": (_loader, lambda: ResumableLoader(StatefulDataLoader(Items(), 4))),
    r"generators \[\] were saved, live are \['generator'\]": (_loader, lambda: _loader(generator=torch.Generator())),
}


@pytest.mark.parametrize("message", CHANGED)
def test_a_loader_that_was_changed_is_refused(message):
    saved, live = (make() for make in CHANGED[message])
    next(iter(saved))
    before = live.state_dict()
    with pytest.raises(IncompatibleStateError, match=message):
        live.load_state_dict(saved.state_dict())
    assert_identical(live.state_dict(), before)


def test_a_dataset_that_became_shorter_is_noticed_when_its_batches_are_drawn_again():
    saved, live = (ResumableLoader(DataLoader(Stream(length), 4)) for length in (14, 5))
    batches = iter(saved)
    for _ in range(3):
        next(batches)
    live.load_state_dict(saved.state_dict())
    with drops(), pytest.raises(IncompatibleStateError, match="ended after 2 batches; 3 had been seen"):
        iter(live)


def test_a_sampler_that_gives_less_than_before_is_noticed():
    saved, live = (ResumableLoader(DataLoader(Items(), batch_sampler=EagerBatches(length))) for length in (14, 5))
    batches = iter(saved)
    for _ in range(3):
        next(batches)
    live.load_state_dict(saved.state_dict())
    with pytest.raises(IncompatibleStateError, match="gave 2 batches of indices"):
        iter(live)


@pytest.mark.parametrize(
    "change",
    [{"batch": -1}, {"batch": "1"}, {"running": None}, {"now": {}}, {"start": []}, {"more": 1}, {"label": 0.5}],
)
def test_a_forged_state_is_refused(change):
    loader = _loader()
    with pytest.raises(CorruptCheckpointError):
        _loader().load_state_dict({**loader.state_dict(), **change})


def test_only_a_data_loader_is_wrapped():
    with pytest.raises(UnsupportedStateError, match="not a list"):
        ResumableLoader([1, 2])


def test_workers_that_deliver_in_any_order_are_refused():
    with pytest.raises(UnsupportedStateError, match="in_order=False"):
        _loader(num_workers=2, in_order=False)


class Lazy(DataLoader[Any]):
    def __iter__(self):
        yield from super().__iter__()


def test_a_loader_that_builds_its_iterator_late_is_refused():
    with pytest.raises(UnsupportedStateError, match="builds its iterator in its own way"):
        iter(ResumableLoader(Lazy(Items(), 4)))


def test_a_bare_data_loader_is_refused_as_a_component_with_the_way_out(tmp_path):
    with pytest.raises(UnsupportedStateError, match=r"checkpointer\.data\.ResumableLoader"):
        CheckpointManager(tmp_path, loader=DataLoader(Items()))


@pytest.mark.parametrize("make", [MAP_STYLE["several passes"], lambda d, w: StatefulDataLoader(StatefulStream(), 4)])
def test_the_state_is_made_of_plain_values(make):
    loader = ResumableLoader(make(Items(), 0))
    next(iter(loader))
    state = loader.state_dict()
    assert_identical(decode(*encode(state)), state)


def test_reading_the_state_draws_no_random_numbers_and_no_data():
    scramble()
    loader = ResumableLoader(StatefulDataLoader(StatefulStream(), 4))
    before = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()
    loader.state_dict()
    after = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()
    assert_identical(after, before)
    assert loader.dataset.reads.sum() == 0


# -------------------------------------------------------------------------------------------------------- augmentation


def test_a_seeded_item_depends_on_seed_epoch_and_index_alone():
    items = {}
    for seed in (0, 1):
        for epoch in (0, 1):
            dataset = seeded(Augmented(), seed=seed)
            dataset.set_epoch(epoch)
            for index in (3, 4):
                scramble()
                items[seed, epoch, index] = dataset[index] - index
                assert_identical(dataset[index] - index, items[seed, epoch, index])
    assert len({tuple(item.tolist()) for item in items.values()}) == len(items)


@pytest.mark.parametrize("index", [3, np.int64(3), torch.tensor(3)])
def test_an_index_of_any_integer_type_seeds_the_same_item(index):
    assert_identical(seeded(Augmented())[index], seeded(Augmented())[3])


def test_a_seeded_item_leaves_the_global_generators_alone():
    scramble()
    random.gauss(0, 1)
    before = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()
    dataset = seeded(Augmented())
    _ = dataset[0]
    with pytest.raises(IndexError):
        _ = dataset[ITEMS]
    after = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()
    assert_identical(after, before)


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_see_the_epoch_of_their_own_loader(persistent):
    def epochs(workers):
        dataset = seeded(Augmented(), seed=2)
        make = lambda items: ResumableLoader(
            DataLoader(items, 5, num_workers=workers, persistent_workers=persistent and workers > 0)
        )
        whole, part = make(dataset), make(Subset(ConcatDataset([dataset]), range(6)))
        part.set_epoch(5)
        return [*zip(whole, part, strict=False), *zip(whole, part, strict=False)]

    assert_identical(epochs(0), epochs(1))


def test_epochs_are_counted_for_a_seeded_dataset():
    loader = ResumableLoader(DataLoader(seeded(Augmented()), None))
    first, second = [*loader], [*loader]
    loader.set_epoch(0)
    third = [*loader]
    assert_identical(first, third)
    assert all(not torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_seeded_dataset_has_the_attributes_of_the_one_inside():
    dataset = SeededDataset(Items())
    assert len(dataset) == ITEMS
    assert dataset.length == ITEMS
    with pytest.raises(AttributeError):
        _ = dataset.nothing
