"""Loaders that accelerate or Lightning's Fabric has prepared resume exactly, and so do accelerate's samplers alone."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from checkpointer import CheckpointManager
from checkpointer.data import ResumableLoader
from checkpointer.errors import CorruptCheckpointError, IncompatibleStateError, UnsupportedStateError
from checkpointer.state.tree.decode import decode
from checkpointer.state.tree.encode import encode
from tests.support.loading import (
    CONFIG,
    Augmented,
    Items,
    StatefulStream,
    Stream,
    assert_exact,
    drops,
    places,
    resumed,
    uninterrupted,
)
from tests.support.ranks import run

pytestmark = [
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # torchdata calls it
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # on a machine with one core
    pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning"),  # Python 3.12 and later
]


@pytest.fixture
def accelerate() -> Any:
    return pytest.importorskip("accelerate", reason="prepares loaders with accelerate, which is not installed")


@pytest.fixture
def fabric() -> Any:
    module = pytest.importorskip("lightning.fabric", reason="prepares loaders with Lightning, which is not installed")
    return module.Fabric(accelerator="cpu", devices=1)


def preparing(accelerate: Any, *, seedable: bool = False, **options: Any) -> Any:
    """A function that makes a prepared loader of a dataset."""
    configuration = accelerate.utils.DataLoaderConfiguration(use_seedable_sampler=seedable, **options)

    def prepare(dataset: Any, **more: Any) -> Any:
        accelerator = accelerate.Accelerator(cpu=True, dataloader_config=configuration)
        return accelerator.prepare(DataLoader(dataset, 4, **more))

    return prepare


@pytest.mark.parametrize("seedable", [False, True])
def test_a_loader_of_accelerate_that_reads_one_batch_ahead_resumes_with_the_batch_that_the_loop_wants(
    accelerate: Any, seedable: bool, tmp_path: Any
) -> None:
    """Its items draw random numbers as they are read: ahead of the loop, too."""
    prepare = preparing(accelerate, seedable=seedable)
    assert_exact(lambda: prepare(Augmented(), shuffle=True), tmp_path)


@pytest.mark.parametrize("seedable", [False, True])
def test_a_loader_of_accelerate_with_workers_resumes(accelerate: Any, seedable: bool, tmp_path: Any) -> None:
    prepare = preparing(accelerate, seedable=seedable)
    assert_exact(lambda: prepare(Items(), shuffle=True, num_workers=2), tmp_path, where=("middle", "last batch"))


def test_a_loader_of_accelerate_goes_back_with_persistent_workers_which_end_when_it_is_dropped(accelerate: Any) -> None:
    options = {"shuffle": True, "num_workers": 1, "persistent_workers": True}
    loader = ResumableLoader(preparing(accelerate)(Items(), **options))
    list(loader)
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    rest = list(iterator)
    loader.load_state_dict(state)
    assert all(torch.equal(*pair) for pair in zip(loader, rest, strict=True))
    workers = loader.base_dataloader._iterator._workers
    del loader, iterator
    assert not any(worker.is_alive() for worker in workers)


def test_a_stream_with_a_state_that_accelerate_reads_ahead_goes_on_where_the_loop_was(
    accelerate: Any, tmp_path: Any
) -> None:
    prepare = preparing(accelerate, dispatch_batches=False)
    assert_exact(lambda: prepare(StatefulStream()), tmp_path)


class LiveState(StatefulStream):
    """Hands out, as its state, the list that it goes on with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __iter__(self) -> Any:
        while len(self.seen) < self.length:
            self.seen.append(len(self.seen))
            yield torch.full((3,), float(self.seen[-1]))
        self.seen = []

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


def test_a_stream_whose_state_is_live_is_not_saved_as_it_was_read_ahead(accelerate: Any, tmp_path: Any) -> None:
    prepare = preparing(accelerate, dispatch_batches=False)
    assert_exact(lambda: prepare(LiveState()), tmp_path, where=("start", "middle"))


def test_a_stream_without_a_state_is_drawn_again_under_accelerate_too(accelerate: Any, tmp_path: Any) -> None:
    prepare = preparing(accelerate, dispatch_batches=False)
    assert_exact(lambda: prepare(Stream()), tmp_path, expect=drops)


def test_a_sampler_that_makes_its_generator_when_it_is_first_asked_resumes(accelerate: Any, tmp_path: Any) -> None:
    def make() -> DataLoader[Any]:
        dataset = Augmented()
        return DataLoader(dataset, 4, sampler=accelerate.data_loader.SeedableRandomSampler(dataset))

    assert_exact(make, tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_of_fabric_resumes(fabric: Any, workers: int, tmp_path: Any) -> None:
    dataset = Items if workers else Augmented
    assert_exact(
        lambda: fabric.setup_dataloaders(DataLoader(dataset(), 4, shuffle=True, num_workers=workers)), tmp_path
    )


def test_no_item_that_the_loop_has_seen_is_read_again(accelerate: Any, tmp_path: Any) -> None:
    prepare = preparing(accelerate)
    whole = uninterrupted(lambda: prepare(Items()), tmp_path / "run")
    part = resumed(lambda: prepare(Items()), tmp_path / "run", places(whole)["middle"])
    reads = part.loader.dataset.reads
    assert [int(count) for count in reads[:8]] == [1] * 8, "two of three epochs were seen, and two batches of one"
    assert [int(count) for count in reads[8:]] == [2] * 6


def test_accelerate_learns_where_a_resumed_epoch_ends(accelerate: Any) -> None:
    """Accumulation and ``gather_for_metrics`` go by it."""
    prepare = preparing(accelerate)
    loader = ResumableLoader(prepare(Items()))
    iterator = iter(loader)
    next(iterator)
    again = ResumableLoader(prepare(Items()))
    again.load_state_dict(loader.state_dict())
    ends = [again.gradient_state.end_of_dataloader for _ in again]
    assert ends == [False, False, True]


def test_a_state_between_iter_and_the_first_batch_is_the_one_before(accelerate: Any) -> None:
    loader = ResumableLoader(preparing(accelerate)(Items(), shuffle=True))
    list(loader)
    before = loader.epoch, loader.next_epoch
    iterator = iter(loader)
    state = loader.state_dict()
    assert (loader.epoch, loader.next_epoch, state["running"]) == (*before, False)
    next(iterator)
    assert loader.epoch == 2


def test_set_epoch_reaches_a_prepared_loader(accelerate: Any) -> None:
    prepare = preparing(accelerate, seedable=True)
    orders = []
    for first in (0, 3):
        torch.manual_seed(0)
        loader = ResumableLoader(prepare(Items(), shuffle=True))
        for epoch in range(first, 5):
            loader.set_epoch(epoch)
            orders.append((epoch, torch.cat([*loader])[:, 0].tolist()))
    assert orders[3:5] == orders[5:7]
    assert len({tuple(order) for _, order in orders}) == 5


def test_the_state_is_plain_values_and_reading_it_changes_nothing(accelerate: Any) -> None:
    loader = ResumableLoader(preparing(accelerate, seedable=True)(Augmented(), shuffle=True))
    next(iter(loader))
    numbers = torch.get_rng_state()
    state = loader.state_dict()
    assert torch.equal(torch.get_rng_state(), numbers)
    tree, tensors = encode(state, "loader")
    assert decode(tree, tensors).keys() == state.keys()


def test_the_position_of_another_kind_of_loader_is_refused(accelerate: Any) -> None:
    plain = ResumableLoader(DataLoader(Items(), 4))
    with pytest.raises(IncompatibleStateError, match="live DataLoaderShard of accelerate"):
        ResumableLoader(preparing(accelerate)(Items())).load_state_dict(plain.state_dict())


def test_an_epoch_that_is_set_after_a_restore_at_a_boundary_counts(accelerate: Any) -> None:
    prepare = preparing(accelerate, seedable=True)
    orders = []
    for interrupted in (False, True):
        torch.manual_seed(0)
        loader = ResumableLoader(prepare(Items(), shuffle=True))
        loader.set_epoch(3)
        list(loader)
        if interrupted:
            state = loader.state_dict()
            loader = ResumableLoader(prepare(Items(), shuffle=True))
            loader.load_state_dict(state)
        loader.set_epoch(8)
        assert loader.state_dict()["prepared"]["count"] == 8
        orders.append(torch.cat([*loader])[:, 0].tolist())
    assert orders[0] == orders[1]


@pytest.mark.parametrize("change", [None, {}, {"count": -1, "before": None}, {"count": 0, "before": 3}, {"count": 0}])
def test_a_forged_state_is_refused(accelerate: Any, change: Any) -> None:
    loader = ResumableLoader(preparing(accelerate)(Items()))
    state = {**loader.state_dict(), "prepared": change}
    with pytest.raises(CorruptCheckpointError):
        loader.load_state_dict(state)


def test_another_number_of_processes_is_refused(accelerate: Any) -> None:
    def shard(of: int) -> ResumableLoader[Any]:
        batches = DataLoader(Items(), 4).batch_sampler
        sampler = accelerate.data_loader.BatchSamplerShard(batches, num_processes=of, process_index=0)
        return ResumableLoader(DataLoader(Items(), batch_sampler=sampler))

    with pytest.raises(IncompatibleStateError, match="num_processes=2"):
        shard(3).load_state_dict(shard(2).state_dict())


@pytest.mark.parametrize("kind", ["dispatcher", "stateful", "skipping a stream"])
def test_what_cannot_be_followed_is_refused_with_the_way_out(accelerate: Any, kind: str) -> None:
    advice = {
        "dispatcher": r"dispatch_batches=False",
        "stateful": "leave out use_stateful_dataloader",
        "skipping a stream": "Wrap the loader that it was given",
    }
    if kind == "dispatcher":
        loader = preparing(accelerate)(Stream())
    elif kind == "stateful":
        pytest.importorskip("torchdata", reason="prepares a StatefulDataLoader, and torchdata is not installed")
        loader = preparing(accelerate, use_stateful_dataloader=True)(Items())
    else:
        prepared = preparing(accelerate, dispatch_batches=False)(Stream())
        loader = accelerate.data_loader.skip_first_batches(prepared, 2)
    with pytest.raises(UnsupportedStateError, match=advice[kind]):
        ResumableLoader(loader)


def _two_ranks(root: str, seedable: bool) -> list[str]:
    """Train whole, then from several saves; says where a resumed run differs from the whole one."""
    import accelerate

    rank = dist.get_rank()
    os.environ["ACCELERATE_USE_CPU"] = "true"

    def train(seed: int, at: int | None) -> dict[int, Any]:
        random.seed(seed + rank)
        np.random.seed(seed + rank)
        torch.manual_seed(seed)
        loader = ResumableLoader(preparing(accelerate, seedable=seedable)(Augmented(30), shuffle=True))
        options = {"config": CONFIG, "read_only": at is not None, "loader": loader}
        seen: dict[int, Any] = {}
        with CheckpointManager(root, **options) as mgr:
            restored = mgr.restore_latest() if at is None else mgr.restore(at)
            step = restored.step + 1 if restored else 0
            for epoch in range(loader.next_epoch, 2):
                for batch in loader:
                    ends = loader.gradient_state.end_of_dataloader
                    seen[step] = (epoch, ends, batch.tolist(), torch.rand(()).item())
                    if at is None:
                        mgr.save(step)
                    step += 1
        return seen

    whole = train(1, None)
    last = len(whole) - 1
    wrong = []
    for at in (0, last // 2 - 1, last // 2, last - 1, last):
        rest = {step: batch for step, batch in whole.items() if step > at}
        wrong += [f"seedable {seedable}, rank {rank}, step {at}"] if train(7, at) != rest else []
    return wrong


@pytest.mark.parametrize("seedable", [False, True])
def test_two_ranks_resume_exactly(accelerate: Any, seedable: bool, tmp_path: Any) -> None:
    """The order comes from a generator that rank 0 sends around, or from the seed that each process began with."""
    assert run(2, _two_ranks, str(tmp_path), seedable) == [[], []]
