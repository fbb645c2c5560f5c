"""What every case is made of: a run with components and a step, whose data come from all global generators."""

from __future__ import annotations

import contextlib
import copy
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from checkpointer import Gradients

TOLERATED = (
    r"`torch.nn.utils.weight_norm` is deprecated",
    r"`torch.nn.utils.spectral_norm` is deprecated",
    r"The epoch parameter in `scheduler.step\(\)` was not necessary",  # torch's own SequentialLR passes it
    r"Lazy modules are a new feature",
    r"This DataLoader will create",  # more workers than the machine has cores
    r".*use of fork",  # of its workers, since Python 3.12
)


@dataclass
class Run:
    """One run's live objects."""

    components: dict[str, Any]
    """What the manager is given, by keyword."""
    step: Callable[[int], float]
    """Train one step; returns the loss."""


@dataclass(frozen=True)
class Case:
    """One way of training whose resume must be exact."""

    name: str
    group: str
    make: Callable[[], Run]
    long: bool = False
    """Only in the long form: a variant of a case that the short form has."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Warnings are errors, but for what torch says of itself: what it has deprecated is tested all the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for message in TOLERATED:
            warnings.filterwarnings("ignore", message=message)
        yield


def seed(number: int) -> None:
    """Seed the three global generators."""
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def noise(*shape: int) -> torch.Tensor:
    """A batch of which each element depends on the generators of torch, Python and NumPy."""
    return torch.randn(*shape) * (1 + random.random()) + float(np.random.rand())


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Callable[[], torch.Tensor],
    scheduler: Any = None,
    before: Callable[[int], object] | None = None,
    **others: Any,
) -> Run:
    """A run that makes outputs small. ``before`` is called before each step; ``others`` are further components."""

    def step(number: int) -> float:
        if before is not None:
            before(number)
        data = batch()

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = size_of(model(data))
            loss.backward()
            return loss

        loss: float = optimizer.step(closure).item()  # type: ignore[arg-type,union-attr,attr-defined]
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            scheduler.step(loss)
        elif scheduler is not None:
            scheduler.step()
        return loss

    components = {"model": model, "optimizer": optimizer, **({"scheduler": scheduler} if scheduler else {})}
    return Run({**components, **others}, step)


def size_of(output: Any) -> torch.Tensor:
    """A loss of whatever a module returns: a tensor, or nested tuples of them (RNNs)."""
    if isinstance(output, torch.Tensor):
        return output.abs().square().float().mean()
    return torch.stack([size_of(item) for item in output]).sum()


def snapshot(run: Run) -> dict[str, Any]:
    """A copy of everything that must be identical: each component and the global generators."""
    state = {name: _state_of(component) for name, component in run.components.items()}
    rng = {"python": random.getstate(), "numpy": np.random.get_state(legacy=False), "torch": torch.get_rng_state()}
    return copy.deepcopy({**state, "rng": rng})


def _state_of(component: Any) -> Any:
    if isinstance(component, nn.Module):
        return {
            "state": dict(component.state_dict()),
            "buffers": {name: buffer.detach() for name, buffer in component.named_buffers()},
            "frozen": [name for name, parameter in component.named_parameters() if not parameter.requires_grad],
            "training": {name: module.training for name, module in component.named_modules()},
        }
    if isinstance(component, Gradients):
        return {name: parameter.grad for name, parameter in component.module.named_parameters()}
    if isinstance(component, torch.Generator):
        return component.get_state()
    if isinstance(component, np.random.Generator):
        return component.bit_generator.state
    if isinstance(component, random.Random):
        return component.getstate()
    return component.state_dict() if hasattr(component, "state_dict") else component
