"""``nn.Module`` as a component.

Captured under the plain ``state_dict`` keys of the innermost module. Restored by reading straight into parameters and
buffers where nothing but torch's own copying takes part in loading; else through ``load_state_dict``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from checkpointer.errors import CorruptCheckpointError
from checkpointer.index import Json
from checkpointer.state.codec import Encoder
from checkpointer.state.module_restore import ModuleRestore
from checkpointer.state.names import Names, eval_modules, module_versions, unwrap
from checkpointer.state.places import check_kind
from checkpointer.state.plan import Captured, RestoreOptions, RestorePlan, SavedState
from checkpointer.state.tensors import is_plain


class ModuleAdapter:
    """Captures and restores one module, without the wrappers around and inside it."""

    kind = "module"

    def __init__(self, name: str, live: nn.Module) -> None:
        self.name = name
        self.live = live

    def capture(self) -> Captured:
        """Refer to the live tensors of ``state_dict()``.

        Meta: ``frozen`` (names with ``requires_grad`` False), ``eval`` (submodules not in training mode), ``versions``
        (of submodules, other than 1), ``inner`` (stored keys that are parts of a state_dict entry, not entries).
        Raises :class:`UnsupportedStateError`.
        """
        root = unwrap(self.live)
        names = Names(root)
        state = {names.clean(raw): value for raw, value in root.state_dict(keep_vars=True).items()}
        tree, tensors, inner = _encode_state(self.name, state)
        frozen = [name for name, parameter in names.parameters() if not parameter.requires_grad and name in state]
        meta: dict[str, Json] = {
            "frozen": list(frozen),
            "eval": list(eval_modules(names)),
            "versions": dict(module_versions(names)),
            "inner": inner,
        }
        aliases = _aliases(tree, set(tensors))
        return Captured(self.kind, tree, tensors, meta, aliases, frozenset(frozen) & tensors.keys())

    def prepare(self, saved: SavedState, options: RestoreOptions) -> RestorePlan:
        """Match saved with live keys. Raises :class:`IncompatibleStateError` with all mismatches."""
        check_kind(saved, self.kind, self.live)
        check_meta(saved)
        return ModuleRestore(self.name, unwrap(self.live), saved, options).plan()


def _encode_state(name: str, state: dict[str, Any]) -> tuple[Json, dict[str, torch.Tensor], Json]:
    """``(tree, tensors, inner keys)``. The tree holds only entries that are not a tensor under its own name."""
    encoder = Encoder(name)
    tree: dict[str, Json] = {}
    rest: list[str] = []
    for key, value in state.items():
        if not isinstance(value, torch.Tensor) or not is_plain(value):
            rest.append(key)
            continue
        stored = encoder.add(key, value)
        if stored != key:
            tree[key] = {"$tensor": stored}
    plain = set(encoder.tensors)
    for key in rest:
        tree[key] = encoder.encode_at([("[]", key)], state[key])
    inner: list[Json] = [key for key in encoder.tensors if key not in plain or key not in state]
    return tree, encoder.tensors, inner


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
    if type(component.tree) is not dict or not lists or not numbers:
        raise CorruptCheckpointError(f"{saved.name}: the index entry of this module is not well formed")


def _is_strings(value: Json) -> bool:
    return type(value) is list and all(type(item) is str for item in value)
