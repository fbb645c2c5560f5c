"""How large the state of components is, before any of it is captured: no method of the user's is called."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from checkpointer.state.dtensor import is_sharded, local_part
from checkpointer.state.module.adapter import ModuleComponent

_PLAIN = (dict, list, tuple)


def state_size(components: Iterable[object], *, frozen: bool = True) -> int:
    """Bytes of the tensors in modules, optimizers and plain containers. What other objects hold is not known.

    ``frozen``: parameters that do not require gradients count as well.
    """
    found = {id(tensor): tensor for component in components for tensor in _tensors(component, frozen, set())}
    return sum(_size(tensor) for tensor in found.values())


def holds_gpu_tensors(components: Iterable[object]) -> bool:
    """Whether any of these tensors lies on a GPU."""
    return any(tensor.is_cuda for component in components for tensor in _tensors(component, True, set()))


def _tensors(component: object, frozen: bool, seen: set[int]) -> Iterator[torch.Tensor]:  # noqa: FBT001  as asked
    if isinstance(component, torch.Tensor):
        yield component
    elif isinstance(component, ModuleComponent):
        yield from _of_module(component.module, frozen)
    elif isinstance(component, nn.Module):
        yield from _of_module(component, frozen)
    elif isinstance(component, torch.optim.Optimizer):
        yield from _tensors(dict(component.state), frozen, seen)
    elif isinstance(component, _PLAIN) and id(component) not in seen:
        seen.add(id(component))
        for value in component.values() if isinstance(component, dict) else component:
            yield from _tensors(value, frozen, seen)


def _of_module(module: nn.Module, frozen: bool) -> Iterator[torch.Tensor]:  # noqa: FBT001  as asked
    yield from (parameter for parameter in module.parameters() if frozen or parameter.requires_grad)
    for inner in module.modules():
        left_out = inner._non_persistent_buffers_set  # noqa: SLF001  the one place that says it
        buffers = inner.named_buffers(recurse=False)
        yield from (buffer for name, buffer in buffers if name not in left_out)


def _size(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_meta else (local_part(tensor) if is_sharded(tensor) else tensor).nbytes
