"""The position in the data at another number of ranks: no sample is skipped, none repeated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from checkpointer import CheckpointManager
from checkpointer.data import ResumableLoader
from checkpointer.errors import IncompatibleStateError
from tests.support.ranks import run

SAMPLES = 96


def loader_of(rank: int, world: int, batch: int = 4) -> ResumableLoader[Any]:
    data = TensorDataset(torch.arange(SAMPLES))
    sampler = DistributedSampler(data, num_replicas=world, rank=rank, seed=5)
    return ResumableLoader(DataLoader(data, batch_size=batch, sampler=sampler))


def epoch(loaders: list[ResumableLoader[Any]], number: int, batches: int | None = None) -> list[int]:
    """What all ranks together see of an epoch."""
    for loader in loaders:
        loader.set_epoch(number)
    iterators = [iter(loader) for loader in loaders]
    seen: list[int] = []
    while batches is None or batches > 0:
        batches = None if batches is None else batches - 1
        found = [next(iterator, None) for iterator in iterators]
        if found[0] is None:
            break
        seen += [int(value) for part in found if part is not None for value in part[0]]
    return seen


@pytest.mark.parametrize("before,after,batch", [(2, 4, 4), (4, 2, 4), (3, 1, 4), (4, 2, 8), (2, 3, 4)])
def test_every_sample_of_the_epoch_is_seen_once(before, after, batch):
    old = [loader_of(rank, before) for rank in range(before)]
    seen = epoch(old, 3, batches=6)
    state = old[0].state_dict()
    new = [loader_of(rank, after, batch) for rank in range(after)]
    for loader in new:
        loader.load_state_dict(state)
    seen += epoch(new, 4)
    assert sorted(seen) == list(range(SAMPLES))
    assert sorted(epoch(new, 4)) == list(range(SAMPLES))  # and the next epoch is whole


def test_a_position_between_epochs_is_carried_over():
    old = [loader_of(rank, 2) for rank in range(2)]
    epoch(old, 0)
    new = [loader_of(rank, 4) for rank in range(4)]
    for loader in new:
        loader.load_state_dict(old[0].state_dict())
    assert sorted(epoch(new, 1)) == list(range(SAMPLES))
    assert new[0].epoch == 2


def test_a_position_that_no_number_of_batches_reaches_is_refused_with_the_numbers():
    old = [loader_of(rank, 2) for rank in range(2)]
    epoch(old, 0, batches=1)
    with pytest.raises(IncompatibleStateError, match=r"seen 8 samples.* take 16 at a time"):
        loader_of(0, 4).load_state_dict(old[0].state_dict())


def test_another_seed_is_still_another_loader():
    old = [loader_of(rank, 2) for rank in range(2)]
    epoch(old, 0, batches=2)
    new = loader_of(0, 4)
    new.sampler.seed = 6
    with pytest.raises(IncompatibleStateError, match="not the one that was saved"):
        new.load_state_dict(old[0].state_dict())


def consume(root: str, batches: int | None) -> list[list[int]]:
    import torch.distributed as dist

    torch.manual_seed(dist.get_rank())
    loader = loader_of(dist.get_rank(), dist.get_world_size())
    with CheckpointManager(root, loader=loader) as mgr:
        mgr.restore_latest()
        loader.set_epoch(0)
        seen = []
        for number, (values,) in enumerate(loader, start=1):
            seen += values.tolist()
            if number == batches:
                mgr.save(1)
                break
        drawn = torch.randint(0, 10**6, (2,)).tolist()
    return [seen, drawn]


def test_a_run_goes_on_at_twice_the_ranks_where_its_data_was(tmp_path):
    before = run(2, consume, str(tmp_path), 6)
    after = run(4, consume, str(tmp_path), None)
    seen = [value for row in (*before, *after) for value in row[0]]
    assert sorted(seen) == list(range(SAMPLES))
    assert len({tuple(row[1]) for row in after}) == 4  # and no two ranks draw the same numbers
