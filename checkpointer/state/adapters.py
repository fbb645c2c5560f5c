"""Which adapter a live object gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from checkpointer.errors import UnsupportedStateError
from checkpointer.state.containers import COMPONENT_TYPES, ContainerAdapter
from checkpointer.state.gradients import Gradients, GradientsAdapter
from checkpointer.state.inspection import refuse_collection, refuse_uninitialized
from checkpointer.state.modes import refuse_to_save
from checkpointer.state.module.adapter import ModuleAdapter, ModuleComponent
from checkpointer.state.module.whole import WholeModel, WholeModelAdapter
from checkpointer.state.optimizer.adapter import OptimizerAdapter
from checkpointer.state.protocol import Adapter, Captured
from checkpointer.state.rng import GENERATORS, GeneratorAdapter, RngState
from checkpointer.state.stateful import Stateful, StatefulAdapter
from checkpointer.state.tree.codecs import codec_for
from checkpointer.state.tree.encode import is_storable
from checkpointer.state.tree.hints import hint, is_foreign_data

_IMMUTABLE = (bool, int, float, complex, str, bytes, tuple, frozenset, range)

#: Tried in this order: a whole model is a module component too.
_ADAPTERS: tuple[tuple[Any, Callable[[str, Any], Adapter]], ...] = (
    (WholeModel, WholeModelAdapter),
    ((nn.Module, ModuleComponent), ModuleAdapter),
    (Gradients, GradientsAdapter),
    (GENERATORS, GeneratorAdapter),
)


def adapter_for(name: str, obj: object, modules: Mapping[str, nn.Module]) -> Adapter:
    """The adapter of one component. ``modules`` names the parameters of optimizers.

    Raises :class:`UnsupportedStateError`, with a hint, for objects whose state cannot be captured or restored.
    """
    if isinstance(obj, RngState):
        return obj
    refuse_uninitialized(name, obj.module if isinstance(obj, ModuleComponent) else obj)
    if isinstance(obj, torch.optim.Optimizer):
        return OptimizerAdapter(name, obj, modules)
    for types, adapter in _ADAPTERS:
        if isinstance(obj, types):
            return adapter(name, obj)
    if not isinstance(obj, type) and isinstance(obj, Stateful):
        return StatefulAdapter(name, obj)
    refuse_collection(name, obj, _has_state_of_its_own)
    if type(obj) in COMPONENT_TYPES and not (isinstance(obj, np.ndarray) and not is_storable(obj.dtype)):
        return ContainerAdapter(name, obj)
    raise UnsupportedStateError(f"component {name!r}: {_hint_for_data(obj) or _hint(obj)}")


def capture_all(adapters: Mapping[str, Adapter]) -> dict[str, Captured]:
    """The state of all components as it is now.

    Raises :class:`UnsupportedStateError`, also inside modes of torch in which tensors have no memory.
    """
    refuse_to_save()
    return {name: adapter.capture() for name, adapter in adapters.items()}


def modules_of(components: Mapping[str, object]) -> dict[str, nn.Module]:
    """The modules among the components, by component name: they name the parameters of optimizers."""
    parts = {name: part.module if isinstance(part, ModuleComponent) else part for name, part in components.items()}
    return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}


def optimizers_of(components: Mapping[str, object]) -> dict[str, torch.optim.Optimizer]:
    """The optimizers among the components, by component name."""
    return {name: part for name, part in components.items() if isinstance(part, torch.optim.Optimizer)}


def _has_state_of_its_own(obj: object) -> bool:
    """Whether it has to be a component, because its state cannot be stored as a value inside another one."""
    if isinstance(obj, type) or codec_for(type(obj)) is not None:
        return False
    kinds = (torch.optim.Optimizer, RngState, DataLoader)
    known = isinstance(obj, kinds) or any(isinstance(obj, types) for types, _ in _ADAPTERS)
    return known or isinstance(obj, Stateful)


def _hint_for_data(obj: object) -> str:
    """What to do about arrays and data of other libraries that are no components; empty for everything else."""
    if not isinstance(obj, (np.ndarray, np.generic)) and not is_foreign_data(obj):
        return ""
    kind = type(obj)
    what = f"an array of dtype {obj.dtype}" if isinstance(obj, np.ndarray) and kind is np.ndarray else kind.__qualname__
    return f"{what} cannot be saved and restored in place; {hint(obj)}"


def _hint(obj: object) -> str:
    kind = type(obj).__qualname__
    if obj is None:
        return "None has no state; leave the component out"
    if isinstance(obj, type):
        return f"the class {obj.__qualname__} was given; give an instance"
    if isinstance(obj, DataLoader):
        return (
            "a torch DataLoader does not know its position; wrap it in checkpointer.data.ResumableLoader, or use one "
            "that has state_dict() and load_state_dict()"
        )
    if isinstance(obj, _IMMUTABLE):
        return f"a restore cannot change a {kind} in place; put it into a dict, for example progress={{'epoch': 0}}"
    if isinstance(obj, (dict, list, set, bytearray, torch.Tensor)):
        return f"only exact containers are restored in place, not the subclass {kind}; give it load_state_dict()"
    missing = [name for name in ("state_dict", "load_state_dict") if not callable(getattr(obj, name, None))]
    return f"{kind} has no {' and no '.join(missing)}(); add them, or register an object that has them"
