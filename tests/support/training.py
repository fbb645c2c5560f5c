"""A training run small enough to be done hundreds of times: a model, AdamW, a schedule and a dict.

``make()`` begins one, ``at(5)`` has done five steps, ``assert_at(run, 5)`` compares one with that, bit for bit.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tests.support.compare import assert_identical


@dataclass
class Training:
    """One run's live objects."""

    model: nn.Sequential
    optimizer: torch.optim.AdamW
    scheduler: torch.optim.lr_scheduler.StepLR
    progress: dict[str, Any]

    @property
    def components(self) -> dict[str, Any]:
        """What a manager is given, by keyword."""
        return vars(self).copy()

    def step(self) -> float:
        """Train on one random batch; returns the loss."""
        self.optimizer.zero_grad()
        loss = self.model(torch.randn(4, 3)).square().mean()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.progress["steps"] += 1
        value = float(loss.item())
        self.progress["losses"].append(value)
        return value

    def advance(self, steps: int) -> Training:
        """Train several steps."""
        for _ in range(steps):
            self.step()
        return self

    def snapshot(self) -> dict[str, Any]:
        """A copy of everything, the global random generator included."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "progress": self.progress,
            "random": torch.get_rng_state(),
            "frozen": [parameter.requires_grad for parameter in self.model.parameters()],
        }
        return copy.deepcopy(state)


def make(seed: int = 0, *, frozen: bool = False) -> Training:
    """A run at its start. ``frozen`` freezes the first layer, so that the model is stored in two shards."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    if frozen:
        model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
    return Training(model, optimizer, scheduler, {"steps": 0, "losses": []})


def at(steps: int, seed: int = 0, *, frozen: bool = False) -> Training:
    """A run after ``steps`` steps: the same, bit for bit, whenever it is called."""
    return make(seed, frozen=frozen).advance(steps)


def assert_at(training: Training, steps: int, seed: int = 0, *, frozen: bool = False) -> None:
    """Fail unless ``training``, and the global random generator, are exactly as after ``steps`` steps."""
    found = training.snapshot()
    assert_identical(found, at(steps, seed, frozen=frozen).snapshot(), f"training after {steps} steps")
