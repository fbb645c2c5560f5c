"""``.grad`` of every parameter as a component, for runs that are cut in the middle of gradient accumulation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from checkpointer.errors import ConfigError, CorruptCheckpointError, IncompatibleStateError
from checkpointer.format.index import Json
from checkpointer.state.containers import merge, place_leaves
from checkpointer.state.destinations import Destinations, check_kind, nearest
from checkpointer.state.module.match import refusal
from checkpointer.state.module.names import Names, unwrap
from checkpointer.state.protocol import Captured, ComponentReport, RestoreOptions, RestorePlan, SavedState
from checkpointer.state.tensors import dtype_name
from checkpointer.state.tree.decode import Decoder, Leaf, skeleton
from checkpointer.state.tree.encode import Encoder


class Gradients:
    """The gradients of a module, as a component of their own.

    Needed only where a save falls between ``backward()`` and ``optimizer.step()``, as in gradient accumulation:

    ```python
    CheckpointManager("runs/gpt", model=model, optimizer=optimizer, gradients=Gradients(model))
    ```
    """

    __module__ = "checkpointer"

    def __init__(self, module: nn.Module) -> None:
        """Save ``.grad`` of every parameter of ``module``, dense or sparse; ``None`` comes back as ``None``.

        Raises:
            ConfigError: not a module.
        """
        if not isinstance(module, nn.Module):
            raise ConfigError(f"Gradients takes a torch.nn.Module, got {type(module).__name__}")
        self.module = module


@dataclass(frozen=True)
class _Pair:
    """A saved gradient and the live parameter that it belongs to."""

    key: str
    node: Json
    parameter: nn.Parameter


class GradientsAdapter:
    """Stores gradients by parameter name, and restores them into the live ones where there are any."""

    kind = "gradients"

    def __init__(self, name: str, live: Gradients) -> None:
        self.name = name
        self.live = live

    def capture(self) -> Captured:
        """Tree: what is not simply the tensor of the parameter's name. Raises :class:`UnsupportedStateError`."""
        encoder = Encoder(self.name)
        tree: dict[str, Json] = {}
        plain: set[str] = set()
        for key, parameter in self._parameters().items():
            grad = parameter.grad
            node = None if grad is None else encoder.encode_at([("[]", key)], grad)
            if node == {"$tensor": key}:
                plain.add(key)
            else:
                tree[key] = node
        meta: dict[str, Json] = {INNER: [key for key in encoder.tensors if key not in plain]}
        return Captured(self.kind, tree, encoder.tensors, meta)

    def prepare(self, saved: SavedState, options: RestoreOptions) -> RestorePlan:
        """Match by parameter name. Raises :class:`IncompatibleStateError` with all mismatches."""
        check_kind(saved, self.kind, self.live)
        return _GradientsRestore(self.name, self._parameters(), saved, options).plan()

    def _parameters(self) -> dict[str, nn.Parameter]:
        """Each parameter under the first of its names."""
        found: dict[int, tuple[str, nn.Parameter]] = {}
        for key, parameter in Names(unwrap(self.live.module)).parameters():
            found.setdefault(id(parameter), (key, parameter))
        return dict(found.values())


INNER = "inner"
"""A member of meta: the keys of tensors that are parts of a gradient, as of a sparse one, and no gradients."""


class _GradientsRestore:
    def __init__(self, name: str, live: dict[str, nn.Parameter], saved: SavedState, options: RestoreOptions) -> None:
        self.name = name
        self.live = live
        self.component = saved.component
        self.options = options
        self.report = ComponentReport(name)
        self.places = Destinations(name, saved.component.tensors, options.map_location)
        self.problems: list[str] = []
        self.convert: set[str] = set()
        """Live names of gradients whose saved dtype or shape is another."""

    def plan(self) -> RestorePlan:
        pairs = [pair for pair in self._pairs() if self._place(pair)]
        if self.options.strict and self.problems:
            raise IncompatibleStateError(refusal(self.name, self.problems))
        self.report.restored += [pair.key for pair in pairs]

        def apply() -> None:
            reads = self.places.tensors()
            specs = {key: self.component.tensors[key] for key in reads}
            with torch.no_grad():
                for pair in pairs:
                    decoder = Decoder(specs, reads, place=self._where(pair))
                    self._put(pair, None if pair.node is None else decoder.run(pair.node, pair.parameter.grad))

        return RestorePlan(self.places.reads, apply, self.report)

    def _pairs(self) -> list[_Pair]:
        found: dict[str, _Pair] = {}
        for saved, node in self._nodes().items():
            key = self.options.renamed(saved)
            if self._ignored(saved) or self._ignored(key):
                continue
            if key not in self.live:
                self.report.unexpected.append(saved)
                continue
            if key in found:
                self.problems.append(f"two saved gradients would be restored to {key!r}")
            if key != saved:
                self.report.renamed.append((saved, key))
            found[key] = _Pair(key, node, self.live[key])
        self.report.missing += [key for key in self.live if key not in found and not self._ignored(key)]
        missing, unexpected = self.report.missing, self.report.unexpected
        self.problems += [f"missing from the checkpoint: {key!r}{nearest(key, unexpected)}" for key in missing]
        self.problems += [f"not in the live module: {key!r}{nearest(key, missing)}" for key in unexpected]
        return list(found.values())

    def _nodes(self) -> dict[str, Json]:
        """The saved gradient of each parameter, as a tree."""
        tree, inner = self.component.tree, self.component.meta.get(INNER, [])
        if type(tree) is not dict or type(inner) is not list or not all(type(key) is str for key in inner):
            raise CorruptCheckpointError(f"{self.name}: the saved gradients are not well formed")
        hidden = {*map(str, inner), *tree}
        return {**{key: {"$tensor": key} for key in self.component.tensors if key not in hidden}, **tree}

    def _ignored(self, key: str) -> bool:
        return self.options.ignored(self.name, key)

    def _place(self, pair: _Pair) -> bool:
        """Choose where the gradient is read to; False where it does not fit."""
        if pair.node is None:
            return True
        live = pair.parameter.grad
        value, used = skeleton(pair.node, self.component.tensors, live, place=self._where(pair))
        if not isinstance(value, Leaf):
            raise CorruptCheckpointError(f"{self._where(pair)}: not a gradient")
        if not self._fits(pair, value):
            return False
        if pair.key not in self.convert:
            place_leaves(self.places, value, live, set())
        device = None if self.options.map_location or pair.parameter.is_meta else pair.parameter.device
        for key in sorted(used):
            self.places.allocate(key, device)
        return True

    def _fits(self, pair: _Pair, value: Leaf) -> bool:
        """Compare shape and dtype; what differs is adapted, cast (if not strict) or a problem."""
        parameter = pair.parameter
        shape, dtype = _saved_form(pair.node, value)
        wanted = dtype_name((parameter if parameter.grad is None else parameter.grad).dtype)
        if shape != tuple(parameter.shape):
            if self.options.adapt is not None and value.kind == "tensor":
                self.report.adapted.append((pair.key, f"{list(shape)} -> {list(parameter.shape)}"))
                self.convert.add(pair.key)
                return True
            problem = f"{pair.key!r}: saved with shape {list(shape)}, live has {list(parameter.shape)}"
            self.problems.append(problem)
            self.report.changed.append(f"not restored: {problem}")
            return False
        if dtype is not None and dtype != wanted:
            self.convert.add(pair.key)
            self.report.cast.append((pair.key, f"{dtype} -> {wanted}"))
            self.problems.append(f"{pair.key!r}: saved as {dtype}, live is {wanted}")
        return True

    def _put(self, pair: _Pair, value: torch.Tensor | None) -> None:
        parameter = pair.parameter
        if value is not None and pair.key in self.convert:
            value = self._converted(pair, value)
        try:
            parameter.grad = None if value is None else merge(value, parameter.grad, set())
        except (RuntimeError, TypeError) as error:
            raise IncompatibleStateError(f"{self._where(pair)}: torch refuses the saved gradient: {error}") from error

    def _converted(self, pair: _Pair, value: torch.Tensor) -> torch.Tensor:
        target = torch.zeros_like(pair.parameter if pair.parameter.grad is None else pair.parameter.grad)
        if value.shape != target.shape and self.options.adapt is not None:
            value = self.options.adapt(pair.key, value, target)
        if not isinstance(value, torch.Tensor) or value.shape != target.shape:
            raise IncompatibleStateError(f"{self._where(pair)}: adapt must give shape {list(target.shape)}")
        return target if value is target else target.copy_(value)

    def _where(self, pair: _Pair) -> str:
        return f"{self.name}[{pair.key!r}]"


def _saved_form(node: Any, value: Leaf) -> tuple[tuple[int, ...], str | None]:
    """Shape of a saved gradient, and its dtype where that is known before it is read."""
    if value.spec is not None:
        return value.spec.shape, value.spec.dtype
    sparse = node.get("$sparse") if type(node) is dict else None
    return tuple(sparse["shape"]) if sparse is not None else (), None
