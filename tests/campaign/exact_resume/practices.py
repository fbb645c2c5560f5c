"""What training loops do beside stepping one optimizer: mixed precision, averages, frozen layers, own generators."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import Parameter
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from checkpointer import Gradients
from tests.campaign.exact_resume.runs import Case, Run, noise, size_of, train


def _network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 2))


def _sgd(*models: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for model in models for p in model.parameters()], lr=0.05, momentum=0.9)


def _adamw(*models: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for model in models for p in model.parameters()], lr=0.01)


def _scaled(dtype: torch.dtype) -> Callable[[], Run]:
    """Automatic mixed precision with a gradient scaler that grows, and backs off from an overflow in step 1."""

    def make() -> Run:
        model = _network()
        optimizer = _adamw(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3)

        def step(number: int) -> float:
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype):
                loss = size_of(model(noise(8, 4)))
            scaler.scale(loss * (float("inf") if number == 1 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            return loss.item()

        return Run({"model": model, "optimizer": optimizer, "scaler": scaler}, step)

    return make


def _autocast() -> Run:
    model = _network()
    optimizer = _adamw(model)

    def step(number: int) -> float:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = size_of(model(noise(8, 4)))
        loss.backward()
        optimizer.step()
        return loss.item()

    return Run({"model": model, "optimizer": optimizer}, step)


def _bfloat16() -> Run:
    model = _network().bfloat16()
    return train(model, _adamw(model), lambda: noise(8, 4).bfloat16())


def _double() -> Run:
    model = _network().double()
    return train(model, _adamw(model), lambda: noise(8, 4).double())


class _Wave(nn.Module):
    """A matrix of complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = Parameter(torch.randn(4, 3, dtype=torch.complex64))

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        return data.to(torch.complex64) @ self.weight


def _complex() -> Run:
    model = _Wave()
    return train(model, _adamw(model), lambda: noise(8, 4))


def _channels_last() -> Run:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3))
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return train(model, _adamw(model), lambda: noise(2, 3, 7, 7).to(memory_format=torch.channels_last))


def _averaged(average: Callable[[], Any] | None, *, buffers: bool = False) -> Callable[[], Run]:
    def make() -> Run:
        model = _network()
        options = {"multi_avg_fn": average()} if average else {}
        averaged = AveragedModel(model, use_buffers=buffers, **options)
        optimizer = _sgd(model)
        scheduler = SWALR(optimizer, 0.01, anneal_epochs=4)
        inner = train(model, optimizer, lambda: noise(8, 4), scheduler)

        def step(number: int) -> float:
            loss = inner.step(number)
            averaged.update_parameters(model)
            with torch.no_grad():
                output = averaged(noise(8, 4))
            total: float = loss + size_of(output).item()
            return total

        return Run({**inner.components, "averaged": averaged}, step)

    return make


def _hand_made_average() -> Run:
    """An exponential average as a dict of tensors, written by hand."""
    model = _network()
    average = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    inner = train(model, _sgd(model), lambda: noise(8, 4))

    def step(number: int) -> float:
        loss = inner.step(number)
        for name, parameter in model.named_parameters():
            average[name].lerp_(parameter.detach(), 0.1)
        return loss

    return Run({**inner.components, "average": average}, step)


def _frozen_in_mid_run() -> Run:
    """The first layer is frozen, and the normalization put into eval mode, before the save."""
    model = _network()

    def before(number: int) -> None:
        if number == 1:
            model[0].requires_grad_(requires_grad=False)
            model[1].eval()

    return train(model, _adamw(model), lambda: noise(8, 4), before=before)


def _unfrozen_in_mid_run() -> Run:
    """Built frozen; trains from step 1 on."""
    model = _network()
    model[0].requires_grad_(requires_grad=False)

    def before(number: int) -> None:
        if number == 1:
            model[0].requires_grad_(requires_grad=True)

    return train(model, _adamw(model), lambda: noise(8, 4), before=before)


class _Tied(nn.Module):
    """A language model whose output layer is its table."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.middle, self.output = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
        self.output.weight = self.table.weight

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.output(self.middle(self.table((data * 100).long().abs() % 9)))
        return output


def _tied() -> Run:
    model = _Tied()
    return train(model, _adamw(model), lambda: noise(5))


def _hidden_state() -> Run:
    """Truncated backpropagation through time: the hidden state of a batch is the start of the next."""
    model = nn.GRU(4, 3)
    optimizer = _adamw(model)
    carried: dict[str, Any] = {"hidden": torch.zeros(1, 2, 3), "batches": 0}

    def step(number: int) -> float:
        optimizer.zero_grad()
        output, hidden = model(noise(5, 2, 4), carried["hidden"])
        loss = size_of(output)
        loss.backward()
        optimizer.step()
        carried.update(hidden=hidden.detach(), batches=carried["batches"] + 1)
        return loss.item()

    return Run({"model": model, "optimizer": optimizer, "carried": carried}, step)


def _own_generators() -> Run:
    """Generators of one's own; the constructor's seeds differ from run to run."""
    model = _network()
    tensors = torch.Generator().manual_seed(random.randrange(2**32))
    arrays = np.random.default_rng(random.randrange(2**32))
    numbers = random.Random(random.random())

    def batch() -> torch.Tensor:
        return torch.randn(8, 4, generator=tensors) * numbers.random() + float(arrays.normal())

    return train(model, _adamw(model), batch, tensors=tensors, arrays=arrays, numbers=numbers)


def _two_optimizers() -> Run:
    """A generator and a discriminator that train in turn, each with its optimizer and one schedule."""
    maker, judge = _network(), nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Dropout(), nn.Linear(4, 1))
    making, judging = _adamw(maker), torch.optim.RMSprop(judge.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(making, 2)

    def step(number: int) -> float:
        made = maker(noise(8, 4))
        optimizer, sign = (making, 1) if number % 2 else (judging, -1)
        loss: torch.Tensor = sign * judge(made).sigmoid().mean() + size_of(judge(noise(8, 2)))
        making.zero_grad()
        judging.zero_grad()
        loss.backward()
        optimizer.step()
        if optimizer is making:
            schedule.step()
        return loss.item()

    parts = {"maker": maker, "judge": judge, "making": making, "judging": judging, "schedule": schedule}
    return Run(parts, step)


class _Counting(nn.Module):
    """A module with state that is no tensor, exchanged through ``get_extra_state``."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(4, 2), 0

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        output: torch.Tensor = self.linear(data) / self.calls
        return output

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]


def _extra_state() -> Run:
    model = _Counting()
    return train(model, _adamw(model), lambda: noise(8, 4))


def _changed_settings() -> Run:
    """Layers whose learning rates, weight decay and betas differ, changed by hand in step 1."""
    model = _network()
    groups = [
        {"params": model[0].parameters(), "lr": 0.03, "betas": (0.8, 0.9)},
        {"params": [*model[1].parameters(), *model[4].parameters()], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01)

    def before(number: int) -> None:
        if number == 1:
            optimizer.param_groups[0].update(lr=0.002, betas=(0.7, 0.95))

    return train(model, optimizer, lambda: noise(8, 4), before=before)


def _accumulation() -> Run:
    """Gradients of three batches are summed up before a step; a save comes in between."""
    model = _network()
    optimizer = _adamw(model)

    def step(number: int) -> float:
        loss = size_of(model(noise(8, 4)))
        loss.backward()
        if number % 3 == 1:
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    return Run({"model": model, "optimizer": optimizer, "gradients": Gradients(model)}, step)


PRACTICES: dict[str, Callable[[], Run]] = {
    "bfloat16 autocast": _autocast,
    "bfloat16 autocast with a GradScaler": _scaled(torch.bfloat16),
    "float16 autocast with a GradScaler": _scaled(torch.float16),
    "bfloat16 parameters": _bfloat16,
    "float64 parameters": _double,
    "complex parameters": _complex,
    "channels_last": _channels_last,
    "AveragedModel": _averaged(None),
    "AveragedModel (SWA, foreach)": _averaged(get_swa_multi_avg_fn),
    "AveragedModel (EMA)": _averaged(lambda: get_ema_multi_avg_fn(0.9), buffers=True),
    "an average made by hand": _hand_made_average,
    "frozen in mid-run": _frozen_in_mid_run,
    "unfrozen in mid-run": _unfrozen_in_mid_run,
    "tied weights": _tied,
    "hidden state carried over": _hidden_state,
    "generators of one's own": _own_generators,
    "two optimizers": _two_optimizers,
    "extra state": _extra_state,
    "settings of groups changed by hand": _changed_settings,
    "gradient accumulation cut in the middle": _accumulation,
}


def cases() -> Iterator[Case]:
    """One case for each practice."""
    for name, make in PRACTICES.items():
        yield Case(name, "practices", make)
