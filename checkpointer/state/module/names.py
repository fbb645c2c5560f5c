"""Names of parameters and modules without the prefixes that wrappers add.

DistributedDataParallel, DataParallel and ``torch.compile`` wrappers are recognized by type, never by the text of a
prefix: ``AveragedModel`` has a ``module.`` of its own, which stays.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from checkpointer.state.dtensor import sharding_hook


def wrapped_attribute(module: nn.Module) -> str | None:
    """The attribute that holds the wrapped module, for wrappers; else ``None``."""
    if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return "module"
    # torch._dynamo takes seconds to import; while it is not, nothing can be compiled.
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is not None and isinstance(module, dynamo.OptimizedModule):
        return "_orig_mod"
    return None


def unwrap(module: nn.Module) -> nn.Module:
    """The innermost module of a stack of wrappers."""
    while (attribute := wrapped_attribute(module)) is not None:
        module = getattr(module, attribute)
    return module


class Names:
    """Every module inside one module (which is itself no wrapper), under its raw and its clean name.

    A wrapper and what it wraps share one clean name. Walked by hand: ``named_modules`` and ``named_parameters`` take
    longer than everything else that a capture does.
    """

    def __init__(self, root: nn.Module) -> None:
        self.modules: list[tuple[str, nn.Module]] = []
        """(clean name, module), in the order of ``named_modules(remove_duplicate=False)``; ``""`` is the root."""
        self._cuts: list[tuple[str, int]] = []
        self._visit(root, "", "")
        self._cuts.sort(key=lambda cut: -len(cut[0]))

    def clean(self, raw: str) -> str:
        """A ``state_dict`` key without the parts that wrappers inside the module add."""
        for prefix, length in self._cuts:
            if raw.startswith(prefix):
                raw = prefix[:-length] + raw[len(prefix) :]
        return raw

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter under every clean name that it has."""
        for path, module in self.modules:
            for name, parameter in module._parameters.items():  # noqa: SLF001
                if parameter is not None:
                    yield (f"{path}.{name}" if path else name), parameter

    def _visit(self, module: nn.Module, raw: str, clean: str) -> None:
        self.modules.append((clean, module))
        wrapped = wrapped_attribute(module)
        if wrapped is not None:
            self._cuts.append((f"{raw}{wrapped}.", len(wrapped) + 1))
        prefix = f"{clean}." if clean else ""
        for name, child in module._modules.items():  # noqa: SLF001
            if child is not None:
                self._visit(child, f"{raw}{name}.", clean if name == wrapped else prefix + name)


def parameter_names(modules: Mapping[str, nn.Module]) -> dict[int, str]:
    """``id(parameter) -> "component.name"`` for every parameter of the registered modules; the first name wins."""
    found: dict[int, str] = {}
    for component, module in modules.items():
        for name, parameter in Names(unwrap(module)).parameters():
            found.setdefault(id(parameter), f"{component}.{name}")
    return found


def registered_tensors(root: nn.Module) -> set[int]:
    """Identities of all parameters and buffers of a module tree."""
    found: set[int] = set()
    for module in root.modules():
        tensors = (*module._parameters.values(), *module._buffers.values())  # noqa: SLF001
        found.update(id(tensor) for tensor in tensors if tensor is not None)
    return found


_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
_METHODS = ("state_dict", "load_state_dict", "_save_to_state_dict", "_load_from_state_dict")


def loads_plainly(root: nn.Module) -> bool:
    """Whether ``load_state_dict`` would do nothing but copy into parameters and buffers.

    False where a hook or an override outside ``torch.nn`` takes part in saving or loading.
    """
    return all(_plain_module(module) for module in root.modules())


def _plain_module(module: nn.Module) -> bool:
    for hooks in _HOOKS:
        if not all(map(sharding_hook, _functions(getattr(module, hooks, None)))):
            return False
    return all(name not in vars(module) and _torch_owned(type(module), name) for name in _METHODS)


def _functions(hooks: Any) -> Iterable[object]:
    return hooks.values() if isinstance(hooks, Mapping) else hooks or ()


def _torch_owned(cls: type, method: str) -> bool:
    owner = str(getattr(getattr(cls, method), "__module__", ""))
    return owner.startswith(("torch.nn.modules.", "torch.nn.parallel.", "torch._dynamo."))


def module_versions(names: Names) -> dict[str, int]:
    """``_version`` of each submodule where it is neither ``None`` nor 1, by clean name."""
    found: dict[str, int] = {}
    for path, module in names.modules:
        version = getattr(module, "_version", 1)
        if version not in (None, 1) and wrapped_attribute(module) is None:
            found[path] = int(version)
    return found


def eval_modules(names: Names) -> list[str]:
    """Clean names of the submodules with ``training`` False."""
    return list(dict.fromkeys(path for path, module in names.modules if not module.training))


def assign(root: nn.Module, old: torch.Tensor, new: torch.Tensor) -> None:
    """Put ``new`` in the place of ``old`` in every module that holds it, keeping parameters as they are elsewhere.

    ``swap_tensors`` keeps the identity of a parameter, so an optimizer that was built over it goes on working.
    """
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    try:
        torch.utils.swap_tensors(old, new)
    except RuntimeError:
        _exchange(root.modules(), old, new)


def _exchange(modules: Iterable[nn.Module], old: torch.Tensor, new: torch.Tensor) -> None:
    for module in modules:
        for table in (module._parameters, module._buffers):  # noqa: SLF001
            for name, tensor in table.items():
                if tensor is old:
                    table[name] = new  # type: ignore[assignment]
