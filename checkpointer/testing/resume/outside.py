"""What the step of a training loop can reach and no component holds."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from checkpointer.errors import CheckpointerError
from checkpointer.state import adapter_for, inner_optimizers
from checkpointer.testing.resume.describing import PLAIN, describe, values

MAX_DEPTH = 5
MAX_BYTES = 64 * 2**20
"""Larger tensors outside components are taken for data sets, and not hashed."""
_FOREIGN = sys.stdlib_module_names | {"torch", "numpy", "checkpointer"}


class Outside:
    """Finds what a step can reach and no component holds."""

    def __init__(self, components: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> None:
        self.values: dict[str, str] = {}
        self.kinds: dict[str, str] = {}
        self._modules = modules
        self._seen = {id(part) for part in components.values()}
        parts = [part for module in modules.values() for part in (*module.modules(), *module.parameters())]
        self._seen |= {id(part) for part in parts}
        self._keep: list[Any] = []
        """Holds what was seen, so that no id is given twice."""
        for name, part in components.items():
            self._attributes_beside_state(name, part)
            for path, inner in inner_optimizers(part):
                self._visit(f"{name}.{path}", inner, 0, "")

    def look(self, step: Any) -> None:
        """Follow a function, a bound method or a callable object."""
        self._visit("", step, 0, "")

    def _attributes_beside_state(self, name: str, part: Any) -> None:
        """Plain values and tensors that ``state_dict()`` does not hold."""
        if isinstance(part, nn.Module):
            for path, module in part.named_modules():
                where = f"{name}.{path}" if path else name
                for key, value in vars(module).items():
                    if not key.startswith("_") and key != "training" and isinstance(value, (*PLAIN, torch.Tensor)):
                        self._leaf(f"{where}.{key}", value)
                for key in module._non_persistent_buffers_set:  # noqa: SLF001 - torch has no other way to ask
                    self._leaf(f"{where}.{key}", module._buffers[key])  # noqa: SLF001
        elif not _is_foreign(part):
            for key, value in getattr(part, "__dict__", {}).items():
                if isinstance(value, (*PLAIN, torch.Tensor, np.ndarray)):
                    self._leaf(f"{name}.{key}", value, kind="")

    def _visit(self, path: str, value: Any, depth: int, module: str) -> None:
        if isinstance(value, (*PLAIN, torch.Tensor, np.ndarray, np.generic)):
            if id(value) not in self._seen or isinstance(value, PLAIN):
                self._leaf(path, value)
            return
        if id(value) in self._seen or depth > MAX_DEPTH or isinstance(value, (type, types.ModuleType)):
            return
        self._seen.add(id(value))
        self._keep.append(value)
        if isinstance(value, (types.FunctionType, types.MethodType, functools.partial)):
            self._callable(path, value, depth, module)
        elif isinstance(value, (list, tuple, Mapping)):
            self._container(path, value, depth, module)
        elif not self._stateful(path, value):
            self._object(path, value, depth, module)

    def _callable(self, path: str, value: Any, depth: int, module: str) -> None:
        if isinstance(value, types.MethodType):
            self._visit(path, value.__func__, depth, module)
            self._visit(path, value.__self__, depth, module or value.__func__.__module__)
        elif isinstance(value, functools.partial):
            self._visit(path, (value.func, value.args, value.keywords), depth, module)
        elif value.__module__ == module or not module:  # helpers of other modules are libraries
            for name, item in _names_of(value):
                self._visit(_join(path if module else "", name), item, depth + 1, value.__module__)

    def _container(self, path: str, value: Any, depth: int, module: str) -> None:
        if len(value) > 1000:
            return  # a data set
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            self._visit(f"{path}[{key!r}]", item, depth + 1, module)

    def _stateful(self, path: str, value: Any) -> bool:
        """Whether the object has a state of its own, which could have been a component's."""
        if isinstance(value, nn.Module) and self._wraps_a_component(value):
            return True
        try:
            captured = adapter_for(path or "it", value, self._modules).capture()
        except (CheckpointerError, AttributeError, TypeError, ValueError):
            return False
        for key, text in values(captured).items():
            self.values[f"{path}: {key}"] = text
            self.kinds[f"{path}: {key}"] = type(value).__qualname__
        return True

    def _wraps_a_component(self, module: nn.Module) -> bool:
        parameters = [id(parameter) for parameter in module.parameters()]
        return bool(parameters) and self._seen.issuperset(parameters)

    def _object(self, path: str, value: Any, depth: int, module: str) -> None:
        if _is_foreign(value):
            return
        for key, item in getattr(value, "__dict__", {}).items():
            self._visit(_join(path, key), item, depth + 1, module)
        if not path and callable(value):
            self._visit(path, type(value).__call__, depth, module or type(value).__module__)

    def _leaf(self, path: str, value: Any, kind: str | None = None) -> None:
        if isinstance(value, torch.Tensor) and (value.numel() * value.element_size() > MAX_BYTES or value.is_meta):
            return
        default = "" if isinstance(value, (*PLAIN, np.generic)) else type(value).__qualname__
        self.values[path] = describe(value)
        self.kinds[path] = default if kind is None else kind


def _names_of(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """The closure of a function, and the globals that it names."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:
            continue  # not assigned yet
    waiting, names = [function.__code__], dict.fromkeys(function.__code__.co_names)
    while waiting:
        code = waiting.pop()
        names |= dict.fromkeys(code.co_names)
        waiting += [item for item in code.co_consts if isinstance(item, types.CodeType)]
    for name in names:
        if name in function.__globals__:
            yield name, function.__globals__[name]


def _is_foreign(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] in _FOREIGN and type(value).__module__ != "__main__"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
