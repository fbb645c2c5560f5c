"""Every optimizer of ``torch.optim``, each flag of its constructor turned, and its other habits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from tests.campaign.exact_resume.runs import Case, Run, noise, train

EXCLUDED_CLASSES = {
    "Optimizer": "the base class, which has no step of its own",
}
EXCLUDED_FLAGS = {
    "capturable": "for CUDA graphs: refused for parameters on the CPU",
    "differentiable": "state is part of the autograd graph of all earlier steps, which no checkpoint can hold",
}
OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9},  # without it there is no state
    "RMSprop": {"momentum": 0.9},
    "LBFGS": {"max_iter": 4, "history_size": 3},
}
"""What a class is given beside the learning rate."""
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "SGD": [{"momentum": 0}, {"dampening": 0.5}],
    "Adagrad": [{"lr_decay": 0.1}, {"initial_accumulator_value": 0.5}],
    "LBFGS": [{"line_search_fn": "strong_wolfe"}],
    "Muon": [{"adjust_lr_fn": "match_rms_adamw"}],
}
"""What turning the flags of a signature does not reach."""


def classes() -> dict[str, type[torch.optim.Optimizer]]:
    """Every optimizer class that torch has."""
    found = {name: cls for name, cls in vars(torch.optim).items() if inspect.isclass(cls)}
    return {name: cls for name, cls in found.items() if issubclass(cls, torch.optim.Optimizer)}


def cases() -> Iterator[Case]:
    """One case for each class, then the variants of each."""
    for name, cls in classes().items():
        if name in EXCLUDED_CLASSES:
            continue
        yield Case(name, "optimizers", partial(_make, cls, {}))
        for title, options in _variants(cls):
            yield Case(f"{name}({title})", "optimizers", partial(_make, cls, options), long=True)
        if name != "LBFGS":  # which has one group, says its constructor
            yield Case(f"{name} with two groups", "optimizers", partial(_make, cls, {}, groups=2), long=True)


def _variants(cls: type) -> Iterator[tuple[str, dict[str, Any]]]:
    given = OPTIONS.get(cls.__name__, {})
    parameters = inspect.signature(cls).parameters
    for name, parameter in parameters.items():
        flag = isinstance(parameter.default, bool) or "bool" in str(parameter.annotation)
        if flag and name not in EXCLUDED_FLAGS:
            for value in (True, False) if parameter.default is None else (not parameter.default,):
                yield f"{name}={value}", {name: value}
        elif name in ("weight_decay", "momentum") and parameter.default == 0 and name not in given:
            yield f"{name}=0.1", {name: 0.1}
    if "Tensor" in str(parameters["lr"].annotation):
        yield "lr=tensor", {"lr": torch.tensor(0.01)}
    for options in VARIANTS.get(cls.__name__, []):
        yield ", ".join(f"{key}={value}" for key, value in options.items()), options


def _make(cls: type[torch.optim.Optimizer], options: dict[str, Any], groups: int = 1) -> Run:
    model, batch = _sparse() if cls.__name__ == "SparseAdam" else _dense()
    if cls.__name__ == "Muon":  # takes matrices only
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.register_parameter("bias", None)
    given: Any = list(model.parameters())
    if groups == 2:
        given = [{"params": given[:1], "lr": 0.02}, {"params": given[1:]}]
    settings = {"lr": 0.01, **OPTIONS.get(cls.__name__, {}), **options}
    if isinstance(settings["lr"], torch.Tensor):
        settings["lr"] = settings["lr"].clone()
    return train(model, cls(given, **settings), batch)


def _dense() -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3)), lambda: noise(8, 4)


def _sparse() -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    model = nn.ModuleList([nn.Embedding(7, 4, sparse=True), nn.Embedding(5, 4, sparse=True)])

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tables = model

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            first, second = self.tables
            output: torch.Tensor = first(rows % 7) + second(rows % 5)
            return output

    return Sum(), lambda: (noise(9) * 100).long().abs()
