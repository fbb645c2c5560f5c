"""Every learning-rate scheduler of torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.optim import swa_utils

from tests.campaign.exact_resume.runs import Case, Run, noise, train

EXCLUDED = {
    "LRScheduler": "the base class, which has no schedule of its own",
    "_LRScheduler": "the old name of the base class",
}


class Ramp:
    """A callable object with state of its own, which LambdaLR stores."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, step: int) -> float:
        self.calls += 1
        return 1 / (1 + step + self.calls)


def _warm_up(optimizer: Any) -> Any:
    warm, main = schedulers.LinearLR(optimizer, total_iters=2), schedulers.CosineAnnealingLR(optimizer, 10)
    return schedulers.SequentialLR(optimizer, [warm, main], milestones=[2])


def _nested(optimizer: Any) -> Any:
    """A chain of a sequence (the other way round torch refuses), in which an object has state of its own."""
    parts = [schedulers.LambdaLR(optimizer, Ramp()), schedulers.MultiStepLR(optimizer, [2, 2, 3])]
    sequence = schedulers.SequentialLR(optimizer, [*parts, schedulers.StepLR(optimizer, 2)], milestones=[2, 4])
    return schedulers.ChainedScheduler([sequence, schedulers.ConstantLR(optimizer)])


def _chain(optimizer: Any) -> Any:
    return schedulers.ChainedScheduler(
        [schedulers.ConstantLR(optimizer), schedulers.MultiStepLR(optimizer, [2, 4]), schedulers.StepLR(optimizer, 3)]
    )


RECIPES: dict[str, Callable[[Any], Any]] = {
    "ChainedScheduler": _chain,
    "ConstantLR": lambda o: schedulers.ConstantLR(o, total_iters=4),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 7),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 2, T_mult=2),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 1 / (1 + step)),
    "LinearLR": lambda o: schedulers.LinearLR(o, total_iters=5),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [1, 2, 2, 4]),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.9 + step / 100),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=20),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, total_iters=6),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0, cooldown=1),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.05, anneal_epochs=4),
    "SequentialLR": _warm_up,
    "StepLR": lambda o: schedulers.StepLR(o, 2),
}
"""Each class once."""
HARDER: dict[str, Callable[[Any], Any]] = {
    "LambdaLR with an object": lambda o: schedulers.LambdaLR(o, Ramp()),
    "ChainedScheduler of a sequence and an object": _nested,
}
VARIANTS: dict[str, Callable[[Any], Any]] = {
    "CyclicLR exp_range": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, 2, mode="exp_range", gamma=0.9),
    "CyclicLR triangular2": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, 2, mode="triangular2"),
    "CyclicLR with a function": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, 2, scale_fn=lambda x: 1 / (1 + x)),
    "CosineAnnealingWarmRestarts T_mult=1": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR three_phase": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=20, three_phase=True),
    "OneCycleLR linear": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=20, anneal_strategy="linear"),
    "ReduceLROnPlateau max": lambda o: schedulers.ReduceLROnPlateau(o, "max", patience=1, threshold_mode="abs"),
    "SWALR linear": lambda o: swa_utils.SWALR(o, 0.05, anneal_epochs=4, anneal_strategy="linear"),
}


def classes() -> set[str]:
    """Every scheduler class that torch has."""
    found = {**vars(schedulers), **vars(swa_utils)}
    return {name for name, cls in found.items() if inspect.isclass(cls) and issubclass(cls, schedulers.LRScheduler)}


def cases() -> Iterator[Case]:
    """One case for each recipe; in the long form also with Adam, whose betas some of them turn."""
    for name, make in {**RECIPES, **HARDER}.items():
        yield Case(name, "schedulers", partial(_make, make, _sgd))
    for name, make in VARIANTS.items():
        yield Case(name, "schedulers", partial(_make, make, _sgd), long=True)
    for name, make in {**RECIPES, **HARDER, **VARIANTS}.items():
        yield Case(f"{name} on Adam", "schedulers", partial(_make, make, _adam), long=True)


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    first, *others = model.parameters()
    return torch.optim.SGD([{"params": [first], "lr": 0.02}, {"params": others}], lr=0.01, momentum=0.9)


def _adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01)


def _make(make: Callable[[Any], Any], choose: Callable[[nn.Module], torch.optim.Optimizer]) -> Run:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = choose(model)
    return train(model, optimizer, lambda: noise(6, 4), make(optimizer))
