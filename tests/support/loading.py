"""A training loop over a resumable loader, run whole and resumed at several places, and the data for it."""

from __future__ import annotations

import random
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from checkpointer import CheckpointManager
from checkpointer.data import ResumableLoader
from checkpointer.errors import CheckpointerWarning
from tests.support.compare import assert_identical

ITEMS = 14
EPOCHS = 3
CONFIG = {"write": {"mode": "sync", "durable": False}}


# ------------------------------------------------------------------------------------------------------------ the data


class Items(Dataset[Any]):
    """Numbers; counts, in every process, how often each was read."""

    def __init__(self, length=ITEMS):
        self.length = length
        self.reads = torch.zeros(length, dtype=torch.int64).share_memory_()

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        self.reads[index] += 1
        return torch.full((3,), float(index))


class Augmented(Items):
    """Every item draws from all three global generators."""

    def __getitem__(self, index):
        return super().__getitem__(index) + torch.rand(3) + random.random() + float(np.random.rand())


class Stream(IterableDataset[Any]):
    """Numbers, divided among the workers."""

    def __init__(self, length=ITEMS):
        self.length = length
        self.reads = torch.zeros(length, dtype=torch.int64).share_memory_()

    def _mine(self):
        worker = get_worker_info()
        return range(self.length) if worker is None else range(worker.id, self.length, worker.num_workers)

    def __iter__(self):
        for number in self._mine():
            self.reads[number] += 1
            yield torch.full((3,), float(number))


class StatefulStream(Stream):
    """Knows where it is; begins anew once it has ended; the order changes from pass to pass."""

    def __init__(self, length=ITEMS):
        super().__init__(length)
        self.position = 0
        self.passes = 0

    def __iter__(self):
        numbers = [*self._mine()]
        while self.position < len(numbers):
            number = numbers[(self.position + self.passes) % len(numbers)]
            self.position += 1
            self.reads[number] += 1
            yield torch.full((3,), float(number))
        self.position = 0
        self.passes += 1

    def state_dict(self):
        return {"position": self.position, "passes": self.passes}

    def load_state_dict(self, state):
        self.position, self.passes = state["position"], state["passes"]


# -------------------------------------------------------------------------------------------------------- the training


@dataclass
class Run:
    """One process's objects, and what it has seen."""

    loader: ResumableLoader[Any]
    trace: list[Any] = field(default_factory=list)
    saved_at: dict[int, int] = field(default_factory=dict)
    """Length of the trace at each step saved."""

    def __post_init__(self):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 1))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9)
        self.progress = {"step": 0}

    @property
    def components(self):
        return {name: getattr(self, name) for name in ("model", "optimizer", "progress", "loader")}

    def train(self, mgr=None, epochs=EPOCHS):
        """Every epoch from the one that comes next; saves after every batch and after every epoch."""
        for epoch in range(self.loader.next_epoch, epochs):
            self.loader.set_epoch(epoch)
            for batch in self.loader:
                self.learn(batch)
                self.save(mgr)
            self.trace.append(("end", epoch, torch.rand(()).item()))
            self.save(mgr)
        return self

    def learn(self, batch):
        self.optimizer.zero_grad()
        loss = self.model(batch).square().mean()
        loss.backward()
        self.optimizer.step()
        self.trace.append((batch.clone(), loss.item(), random.random(), float(np.random.rand())))

    def save(self, mgr):
        if mgr is not None:
            mgr.save(self.progress["step"])
            self.saved_at[self.progress["step"]] = len(self.trace)
        self.progress["step"] += 1

    def final(self):
        return {
            "model": self.model.state_dict(),
            "momentum": self.optimizer.state_dict()["state"],
            "epoch": self.loader.epoch,
            "random": (random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()),
        }


def scramble():
    """Generators as in a process that has done something else so far."""
    seed = random.SystemRandom().randrange(2**32)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def new_run(make):
    """Fresh objects, made while the generators are anywhere; the model is always the same."""
    scramble()
    return Run(ResumableLoader(make()))


def uninterrupted(make, root):
    run = new_run(make)
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    with CheckpointManager(root, config=CONFIG, **run.components) as mgr:
        run.train(mgr)
    return run


def resumed(make, root, step, *, disturb=lambda: None, expect=nullcontext):
    run = new_run(make)
    with CheckpointManager(root, config=CONFIG, read_only=True, **run.components) as mgr:
        scramble()
        mgr.restore(step)
        run.progress["step"] += 1
        disturb()
        with expect():
            run.train()
    return run


def assert_same(whole, part, step):
    assert_identical(part.trace, whole.trace[whole.saved_at[step] :], f"resumed after step {step}")
    assert_identical(part.final(), whole.final(), f"resumed after step {step}")


def places(run):
    """Steps to resume at: in the second epoch its first, a middle and its last batch, and after it; the very first."""
    ends = [index for index, entry in enumerate(run.trace) if entry[0] == "end" and type(entry[0]) is str]
    return {"start": ends[0] + 1, "middle": ends[0] + 2, "last batch": ends[1] - 1, "boundary": ends[1], "first": 0}


def assert_exact(make, tmp_path, expect=nullcontext, where=None):
    whole = uninterrupted(make, tmp_path / "run")
    original = whole.final()
    for name, step in places(whole).items():
        if where is None or name in where:
            part = resumed(make, tmp_path / "run", step, expect=nullcontext if name == "boundary" else expect)
            assert_identical(part.trace, whole.trace[whole.saved_at[step] :], name)
            assert_identical(part.final(), original, name)


def drops():
    return pytest.warns(CheckpointerWarning, match="drawn again and dropped")
