"""What a module holds that ``state_dict()`` leaves out: plain tensors and non-persistent buffers."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from checkpointer.state.module.names import Names, wrapped_attribute

SHOWN = 10
LARGEST_CONTAINER = 1000
"""Lists, tuples and dicts with more items than this are not looked into."""

_OWN = frozenset({"_parameters", "_buffers", "_modules"})
_METRIC_CACHES = frozenset({"_defaults", "_computed", "_forward_cache", "_cache"})
_CONTAINERS = (list, tuple, dict)


def non_persistent_buffers(names: Names) -> Iterator[tuple[str, torch.Tensor]]:
    """Every buffer that ``state_dict()`` leaves out, under every clean name that it has."""
    for path, module in names.modules:
        for name in module._non_persistent_buffers_set:  # noqa: SLF001
            buffer = module._buffers.get(name)  # noqa: SLF001
            if buffer is not None:
                yield _join(path, name), buffer


def plain_attributes(names: Names, state: Mapping[str, object]) -> Iterator[str]:
    """Names of tensors kept as attributes, or in a list, tuple or dict that is one.

    Left out are those that share memory with a parameter, a buffer (``RNN._flat_weights``) or a tensor anywhere in
    ``state``, those that ``state`` holds a copy of, what ``get_extra_state()`` answers for, results that carry a
    ``grad_fn``, what metrics keep beside their states, and what torch's own hooks compute before each forward pass
    (weight norm, pruning).

    ``state`` is what ``state_dict()`` returned, by clean name.
    """
    registered = _registered_memory(names)
    copies = [
        tensor for value in state.values() for tensor in _all_tensors(value) if memory_of(tensor) not in registered
    ]
    saved = registered | {memory_of(tensor) for tensor in copies}
    for path, module in names.modules:
        if wrapped_attribute(module) is not None or _has_extra_state(module):
            continue
        passed_over = _OWN | _computed_by_hooks(module) | _metric_caches(module)
        for name, value in vars(module).items():
            if name in passed_over or _join(path, name) in state:
                continue
            for suffix, tensor in _tensors_in(value):
                if tensor.grad_fn is None and memory_of(tensor) not in saved and not _among(tensor, copies):
                    yield _join(path, name) + suffix


def metric_states(names: Names) -> set[str]:
    """Names of the states of metrics (torchmetrics): plain attributes that ``persistent(True)`` puts into the state."""
    return {
        _join(path, str(name))
        for path, module in names.modules
        if _is_metric(module)
        for name in vars(module)["_defaults"]
    }


def _is_metric(module: nn.Module) -> bool:
    tables = (vars(module).get("_defaults"), vars(module).get("_persistent"))
    return all(isinstance(table, dict) for table in tables) and callable(getattr(module, "persistent", None))


def _metric_caches(module: nn.Module) -> frozenset[str]:
    """The initial values of a metric's states, and results that it computes again."""
    return _METRIC_CACHES if _is_metric(module) else frozenset()


def _all_tensors(value: object) -> Iterator[torch.Tensor]:
    """Every tensor in nested containers of a state."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, _CONTAINERS) and len(value) <= LARGEST_CONTAINER:
        for item in value.values() if isinstance(value, dict) else value:
            yield from _all_tensors(item)


def _among(tensor: torch.Tensor, copies: Iterable[torch.Tensor]) -> bool:
    """Whether one of ``copies``, which belong to no parameter and no buffer, has the same bits."""
    return any(
        (copy.shape, copy.dtype, copy.layout) == (tensor.shape, tensor.dtype, tensor.layout)
        and tensor.layout is torch.strided
        and "meta" not in (tensor.device.type, copy.device.type)
        and torch.equal(copy.detach().to(tensor.device), tensor.detach())
        for copy in copies
    )


def describe_unsaved(
    attributes: Iterable[str], buffers: Iterable[str], silence: Iterable[str], metrics: Collection[str] = ()
) -> str:
    """One message about everything that is left out and not silenced; empty where there is nothing.

    ``metrics``: the names of all states of metrics.
    """
    globs = list(silence)
    attributes, buffers = _loud(attributes, globs), _loud(buffers, globs)
    states = [name for name in attributes if name.partition("[")[0] in metrics]
    attributes = [name for name in attributes if name not in states]
    parts: list[str] = []
    if states:
        parts.append(f"states of metrics: {_list(states)} (metric.persistent(True) makes them part of state_dict())")
    if attributes:
        parts.append(
            f"plain tensors kept as attributes, which do not follow .to() either: {_list(attributes)} "
            "(register_buffer() makes them state)"
        )
    if buffers:
        parts.append(
            f"non-persistent buffers: {_list(buffers)} "
            "(checkpointer.ModuleComponent(model, include_non_persistent=True) saves them)"
        )
    return "; ".join(parts)


def _loud(names: Iterable[str], globs: list[str]) -> list[str]:
    return [name for name in dict.fromkeys(names) if not any(fnmatch.fnmatchcase(name, glob) for glob in globs)]


def _list(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _tensors_in(value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """(suffix of the name, tensor); parameters are told apart by their memory, not by their type."""
    if isinstance(value, torch.Tensor):
        yield "", value
    elif isinstance(value, _CONTAINERS) and len(value) <= LARGEST_CONTAINER:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            if isinstance(item, torch.Tensor):
                yield f"[{key!r}]"[:80], item


def _registered_memory(names: Names) -> set[int]:
    found: set[int] = set()
    for _, module in names.modules:
        tables = (module._parameters.values(), module._buffers.values())  # noqa: SLF001
        found.update(memory_of(tensor) for table in tables for tensor in table if tensor is not None)
    return found


def memory_of(tensor: torch.Tensor) -> int:
    """Equal for tensors in one storage; the tensor's own identity where it has no storage (sparse)."""
    try:
        return int(tensor.untyped_storage()._cdata)  # noqa: SLF001
    except (NotImplementedError, RuntimeError, ValueError):
        return id(tensor)


def _has_extra_state(module: nn.Module) -> bool:
    return type(module).get_extra_state is not nn.Module.get_extra_state


def _computed_by_hooks(module: nn.Module) -> set[str]:
    """Attributes that ``torch.nn.utils`` sets anew before each forward pass."""
    found: set[str] = set()
    for hook in module._forward_pre_hooks.values():  # noqa: SLF001
        if type(hook).__module__.startswith("torch.nn.utils."):
            found.update(str(getattr(hook, name, "")) for name in ("name", "_tensor_name"))
    return found
