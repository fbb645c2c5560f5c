"""Gradients that a save leaves out though the next step uses them: the save fell between backward() and step().

Whether it did is known at that step alone: gradients that a step has used lie around until the loop drops them, and
those that flow into another optimizer's parameters are dropped unused. So a save remembers which tensor it has found,
and the step looks whether it uses that very tensor. A loop that zeroes gradients in place keeps one tensor for ever,
and is told nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch._compile import _disable_dynamo
from torch.utils.hooks import RemovableHandle

from checkpointer.state.classes import attributes, unwrapped
from checkpointer.state.gradients import Gradients

_hooks: list[tuple[weakref.ref[_Watch], RemovableHandle]] = []
"""The hooks that are registered, and whose they are."""


class PendingGradients:
    """Tells, once for each optimizer among the components, of saves without gradients that were needed."""

    def __init__(self, components: Mapping[str, object]) -> None:
        self._components = components
        self._watches: dict[str, _Watch] | None = None

    def told(self) -> Iterator[str]:
        """What to say of the saves before this one. The first call registers the hooks."""
        if self._watches is None:
            self._watches = self._registered()
        for name, watch in self._watches.items():
            if watch.lost and not watch.said:
                watch.said = True
                yield (
                    f"a save fell between backward() and the step of optimizer {name!r}: the gradients that the step "
                    "then used are not in that checkpoint, so a resume from it goes on without them. Save after the "
                    "step, or save them too: CheckpointManager(root, ..., gradients=checkpointer.Gradients(model))"
                )
            watch.save()

    def _registered(self) -> dict[str, _Watch]:
        if any(isinstance(part, Gradients) for part in self._components.values()):
            return {}
        _remove_hooks_of_the_forgotten()
        optimizers = {name: unwrapped(part) for name, part in self._components.items()}
        # An object that only looks like an optimizer, and has not called its constructor, has no place for hooks.
        usual = {name: part for name, part in optimizers.items() if "_optimizer_step_pre_hooks" in attributes(part)}
        return {name: _Watch(part) for name, part in usual.items() if isinstance(part, torch.optim.Optimizer)}


class _Watch:
    """One optimizer: the gradient of its first parameter that has one, at saves and at steps."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._used: weakref.ref[torch.Tensor] | None = None
        """The gradient that the last step used; ``None`` before the first step that was seen."""
        self._at_save: weakref.ref[torch.Tensor] | None = None
        """The gradient at the last save, if no step had used it."""
        self.lost = False
        self.said = False
        watch = weakref.ref(self)

        def before_step(optimizer: Any, args: Any, kwargs: Any) -> None:  # noqa: ARG001  as torch calls it
            found = watch()
            if found is not None:
                found.step(closure=any(part is not None for part in (*args[1:], kwargs.get("closure"))))

        # A compiled step is not to trace it; torch.compiler.disable would import the compiler right now.
        _hooks.append((watch, optimizer.register_step_pre_hook(_disable_dynamo(before_step))))

    def save(self) -> None:
        found = self._gradient()
        fresh = found is not None and self._used is not None and self._used() is not found
        self._at_save = weakref.ref(found) if found is not None and fresh else None

    def step(self, *, closure: bool) -> None:
        """Before a step; with a ``closure`` it makes the gradients that it uses."""
        found = None if closure else self._gradient()
        if self._at_save is not None and found is not None and self._at_save() is found:
            self.lost = True
        self._at_save = None
        self._used = None if found is None else weakref.ref(found)

    def _gradient(self) -> torch.Tensor | None:
        parameters = (item for group in self._optimizer.param_groups for item in group["params"])
        return next((item.grad for item in parameters if item.grad is not None), None)


def _remove_hooks_of_the_forgotten() -> None:
    """Of managers that are gone. Removing a hook when its manager goes would disturb a step that walks through them."""
    for pair in _hooks.copy():
        watch, hook = pair
        if watch() is None:
            hook.remove()
            _hooks.remove(pair)
