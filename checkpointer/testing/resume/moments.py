"""The state after each step: of every component, and of what lies outside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from checkpointer.state import RngState, adapter_for
from checkpointer.testing.resume.describing import Values, describe, values
from checkpointer.testing.resume.outside import Outside


@dataclass
class StateAfterStep:
    """The state after a step, or before the first one."""

    loss: str = ""
    components: dict[str, Values] = field(default_factory=dict)
    outside: dict[str, str] = field(default_factory=dict)
    """What no component holds, and the step can reach."""
    kinds: dict[str, str] = field(default_factory=dict)
    """For each place in ``outside``: what it is; empty for plain values."""
    inputs: list[str] = field(default_factory=list)
    """What went into registered modules during the step."""
    calls: list[tuple[str, str, str]] = field(default_factory=list)
    """(layer, input, output), of a step that is traced."""


class Watch:
    """Describes the state of components and of what lies outside them."""

    def __init__(self, components: Mapping[str, Any], step: Callable[[int], Any]) -> None:
        self._components = components
        self._step = step
        self._modules = {name: part for name, part in components.items() if isinstance(part, nn.Module)}

    def moment(self, loss: Any = None) -> StateAfterStep:
        """The state as it is now."""
        adapters = {name: adapter_for(name, part, self._modules) for name, part in self._components.items()}
        captured = {name: adapter.capture() for name, adapter in {**adapters, "rng": RngState()}.items()}
        outside = Outside(self._components, self._modules)
        outside.look(self._step)
        value = loss.item() if isinstance(loss, torch.Tensor) and loss.numel() == 1 else loss
        components = {name: values(state) for name, state in captured.items()}
        return StateAfterStep(describe(value), components, outside.values, outside.kinds)

    @contextmanager
    def forwards(self, *, calls: bool) -> Iterator[tuple[list[str], list[tuple[str, str, str]]]]:
        """What goes into registered modules; with ``calls``, what goes into and comes out of each of their layers."""
        inputs: list[str] = []
        traced: list[tuple[str, str, str]] = []
        handles = [
            module.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: inputs.append(f"{name}({describe((args, kwargs))})"),
                with_kwargs=True,
            )
            for name, module in self._modules.items()
        ]
        for name, layer in self._layers() if calls else ():

            def record(_: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
                traced.append((name, describe((args, kwargs)), describe(output)))

            handles.append(layer.register_forward_hook(record, with_kwargs=True))
        try:
            yield inputs, traced
        finally:
            for handle in handles:
                handle.remove()

    def _layers(self) -> Iterator[tuple[str, nn.Module]]:
        for name, module in self._modules.items():
            for path, layer in module.named_modules():
                if not any(layer.children()):
                    yield f"{name}.{path}" if path else name, layer
