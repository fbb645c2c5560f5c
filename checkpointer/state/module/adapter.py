"""``nn.Module`` as a component.

Captured under the plain ``state_dict`` keys of the innermost module. Restored by reading straight into parameters and
buffers where nothing but torch's own copying takes part in loading; else through ``load_state_dict``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from checkpointer.errors import ConfigError, CorruptCheckpointError
from checkpointer.format.index import Json
from checkpointer.state.destinations import check_kind
from checkpointer.state.module.names import Names, eval_modules, module_versions, unwrap
from checkpointer.state.module.restore import ModuleRestore
from checkpointer.state.module.unsaved import (
    describe_unsaved,
    metric_states,
    non_persistent_buffers,
    plain_attributes,
)
from checkpointer.state.protocol import Captured, RestoreOptions, RestorePlan, SavedState
from checkpointer.state.tensors import is_ordinary
from checkpointer.state.tree.encode import Encoder
from checkpointer.system import messages


class ModuleComponent:
    """A module with options, to be registered in the place of the module itself.

    ```python
    CheckpointManager("runs/gpt", model=ModuleComponent(model, silence=("encoder.cache", "*.inv_freq")))
    ```
    """

    __module__ = "checkpointer"

    def __init__(self, module: nn.Module, *, include_non_persistent: bool = False, silence: Iterable[str] = ()) -> None:
        """Choose what is saved, and what the first save warns of.

        Args:
            module: the module; wrappers such as DistributedDataParallel are seen through, as always.
            include_non_persistent: save and restore the non-persistent buffers too. They lie in the module's own
                file under their plain names, beside the entries of ``state_dict()``: a stock reader that loads that
                file with ``strict=True`` calls them unexpected.
            silence: qualified names, or globs, of tensors that are known to be no state: the first save does not warn
                that ``state_dict()`` leaves them out.

        Raises:
            ConfigError: an argument makes no sense.
        """
        if not isinstance(module, nn.Module):
            raise ConfigError(f"{type(self).__name__} takes a torch.nn.Module, got {type(module).__name__}")
        if isinstance(silence, str):
            raise ConfigError(f"silence is a list: write [{silence!r}], not {silence!r}")
        self.module = module
        self.include_non_persistent = include_non_persistent
        self.silence = tuple(silence)


class ModuleAdapter:
    """Captures and restores one module, without the wrappers around and inside it."""

    kind = "module"

    def __init__(self, name: str, component: nn.Module | ModuleComponent) -> None:
        self.name = name
        self.options = component if isinstance(component, ModuleComponent) else ModuleComponent(component)
        self.live = self.options.module
        self._warned = False

    def capture(self) -> Captured:
        """Refer to the live tensors of ``state_dict()``.

        Meta: ``frozen`` (names with ``requires_grad`` False), ``eval`` (submodules not in training mode), ``versions``
        (of submodules, other than 1), ``inner`` (stored keys that are parts of a state_dict entry, not entries), and,
        where they are asked for, ``non_persistent`` (buffer name to tree). The first call warns, once, of tensors that
        are left out. Raises :class:`UnsupportedStateError`.
        """
        root = unwrap(self.live)
        names = Names(root)
        state = {names.clean(raw): value for raw, value in root.state_dict(keep_vars=True).items()}
        buffers = dict(non_persistent_buffers(names)) if self.options.include_non_persistent else {}
        beside = {name: buffer for name, buffer in buffers.items() if name not in state}
        tree, tensors, inner, nodes = _encode_state(self.name, state, beside)
        frozen = [name for name, parameter in names.parameters() if not parameter.requires_grad and name in state]
        meta: dict[str, Json] = {
            "frozen": list(frozen),
            "eval": list(eval_modules(names)),
            "versions": dict(module_versions(names)),
            "inner": inner,
        }
        if self.options.include_non_persistent:
            meta["non_persistent"] = nodes
        self._warn_once(names, state)
        aliases = _aliases(tree, set(tensors))
        trainable = tensors.keys() & {name for name, _ in names.parameters()}
        return Captured(
            self.kind, tree, tensors, meta, aliases, frozenset(frozen) & tensors.keys(), frozenset(trainable)
        )

    def prepare(self, saved: SavedState, options: RestoreOptions) -> RestorePlan:
        """Match saved with live keys. Raises :class:`IncompatibleStateError` with all mismatches."""
        check_kind(saved, self.kind, self.live)
        check_meta(saved)
        include = self.options.include_non_persistent
        return ModuleRestore(self.name, unwrap(self.live), saved, options, include_non_persistent=include).plan()

    def _warn_once(self, names: Names, state: dict[str, Any]) -> None:
        if self._warned:
            return
        self._warned = True
        buffers = [] if self.options.include_non_persistent else [name for name, _ in non_persistent_buffers(names)]
        found = describe_unsaved(plain_attributes(names, state), buffers, self.options.silence, metric_states(names))
        if found:
            messages.warn(
                f"component {self.name!r} holds tensors that state_dict() leaves out, so that they are neither saved "
                f"nor restored: {found}. If they can be made anew, say so with "
                f"checkpointer.ModuleComponent(model, silence=[...])",
            )


def _encode_state(
    name: str, state: dict[str, Any], beside: dict[str, torch.Tensor]
) -> tuple[Json, dict[str, torch.Tensor], Json, dict[str, Json]]:
    """``(tree, tensors, inner keys, nodes of beside)``. The tree has only entries that are no tensor of their name."""
    encoder = Encoder(name)
    tree: dict[str, Json] = {}
    rest: list[str] = []
    for key, value in state.items():
        if not isinstance(value, torch.Tensor) or not is_ordinary(value):
            rest.append(key)
            continue
        stored = encoder.add(key, value)
        if stored != key:
            tree[key] = {"$tensor": stored}
    plain = set(encoder.tensors)
    for key in rest:
        tree[key] = encoder.encode_at([("[]", key)], state[key])
    nodes = {key: encoder.encode_at([("[]", key)], value) for key, value in beside.items()}
    inner: list[Json] = [key for key in encoder.tensors if key not in plain or key not in state]
    return tree, encoder.tensors, inner, nodes


def _aliases(tree: Json, stored: set[str]) -> dict[str, str]:
    assert isinstance(tree, dict)
    found: dict[str, str] = {}
    for key, node in tree.items():
        if isinstance(node, dict) and set(node) == {"$tensor"} and node["$tensor"] in stored:
            found[key] = str(node["$tensor"])
    return found


def check_meta(saved: SavedState) -> None:
    """Raise :class:`CorruptCheckpointError` where tree or meta are not what ``capture`` writes."""
    component = saved.component
    meta = component.meta
    lists = all(_is_strings(meta.get(key, [])) for key in ("frozen", "eval", "inner"))
    versions = meta.get("versions", {})
    numbers = isinstance(versions, dict) and all(type(version) is int for version in versions.values())
    beside = type(meta.get("non_persistent", {})) is dict
    if type(component.tree) is not dict or not lists or not numbers or not beside:
        raise CorruptCheckpointError(f"{saved.name}: the index entry of this module is not well formed")


def _is_strings(value: Json) -> bool:
    return type(value) is list and all(type(item) is str for item in value)
