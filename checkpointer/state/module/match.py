"""Which saved entry goes to which live entry of a module, and what does not fit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from checkpointer.errors import CorruptCheckpointError, IncompatibleStateError
from checkpointer.format.index import Component, Json, TensorSpec
from checkpointer.state.destinations import nearest
from checkpointer.state.dtensor import PLAIN_TYPES
from checkpointer.state.module.names import Names, registered_tensors
from checkpointer.state.module.unsaved import non_persistent_buffers
from checkpointer.state.protocol import ComponentReport, RestoreOptions
from checkpointer.state.tensors import dtype_name, is_ordinary, is_plain, memory_key

SHOWN = 50


@dataclass(frozen=True)
class Entry:
    """One saved ``state_dict`` entry: a stored tensor, or a node of the tree."""

    key: str
    stored: str | None = None
    node: Json = None


@dataclass
class Match:
    """The entries to restore, by live key, and what was found on the way."""

    live: dict[str, Any]
    """Clean key -> live value."""
    raw: dict[str, str]
    """Clean key -> key in the live ``state_dict``."""
    extra: set[str]
    """Live keys of extra state (``get_extra_state``)."""
    beside: set[str] = field(default_factory=set)
    """Live keys that ``state_dict`` leaves out: non-persistent buffers."""
    pairs: dict[str, Entry] = field(default_factory=dict)
    adapt: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)


def saved_entries(name: str, component: Component) -> dict[str, Entry]:
    """All saved entries by key. Raises :class:`CorruptCheckpointError` for references to missing tensors."""
    tree: Any = component.tree
    inner: Any = component.meta.get("inner", [])
    hidden = set(inner)
    entries = {key: Entry(key, key) for key in component.tensors if key not in hidden}
    entries.update({key: _entry(name, component, key, node) for key, node in tree.items()})
    return entries


def _non_persistent_entries(name: str, component: Component) -> dict[str, Entry]:
    nodes: Any = component.meta.get("non_persistent", {})
    return {key: _entry(name, component, key, node) for key, node in nodes.items()}


def _entry(name: str, component: Component, key: str, node: Any) -> Entry:
    """The entry of a node: a reference to a tensor, or other data."""
    if type(node) is not dict or set(node) != {"$tensor"}:
        return Entry(key, None, node)
    stored = node["$tensor"]
    if type(stored) is not str or stored not in component.tensors:
        raise CorruptCheckpointError(f"{name}: {key!r} refers to a tensor that does not exist")
    return Entry(key, stored)


def match(
    name: str,
    root: nn.Module,
    component: Component,
    options: RestoreOptions,
    report: ComponentReport,
    *,
    include_non_persistent: bool = False,
) -> Match:
    """Pair saved and live entries. Raises :class:`IncompatibleStateError` with every mismatch if strict."""
    names = Names(root)
    state = root.state_dict(keep_vars=True)
    raw = {names.clean(key): key for key in state}
    live = {clean: state[key] for clean, key in raw.items()}
    registered = registered_tensors(root)
    extra = {key for key, value in live.items() if key.endswith("_extra_state") and id(value) not in registered}
    found = Match(live, raw, extra)
    entries = saved_entries(name, component)
    if include_non_persistent:
        buffers = {key: buffer for key, buffer in non_persistent_buffers(names) if key not in live}
        live.update(buffers)
        found.beside.update(buffers)
        entries = {**entries, **_non_persistent_entries(name, component), **entries}
    elif component.meta.get("non_persistent"):
        report.changed.append("non-persistent buffers were saved, and are not restored without include_non_persistent")
    _pair(name, found, entries, options, report)
    for key in list(found.pairs):
        _check(found, key, component, options, report)
    _check_ties(found)
    if options.strict and found.problems:
        raise IncompatibleStateError(refusal(name, found.problems))
    report.restored += found.pairs
    return found


def refusal(name: str, problems: list[str]) -> str:
    """One message for all mismatches."""
    shown = problems[:SHOWN]
    more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    lines = "".join(f"\n  {line}" for line in [*shown, *more])
    return (
        f"{name}: the checkpoint does not fit the live object, nothing was changed:{lines}\n"
        f"restore with rename=, adapt= or ignore_keys=, or with strict=False to restore what fits"
    )


def _pair(name: str, found: Match, entries: dict[str, Entry], options: RestoreOptions, report: ComponentReport) -> None:
    for saved, entry in entries.items():
        live = options.renamed(saved)
        if options.ignored(name, saved) or options.ignored(name, live):
            continue
        if live not in found.live:
            report.unexpected.append(saved)
            continue
        if live in found.pairs:
            found.problems.append(f"{found.pairs[live].key!r} and {saved!r} would both be restored to {live!r}")
        found.pairs[live] = entry
        if live != saved:
            report.renamed.append((saved, live))
    report.missing += [key for key in found.live if key not in found.pairs and not options.ignored(name, key)]
    missing, unexpected = report.missing, report.unexpected
    found.problems += [f"missing from the checkpoint: {key!r}{nearest(key, unexpected)}" for key in missing]
    found.problems += [f"not in the live module: {key!r}{nearest(key, missing)}" for key in unexpected]


def _check(found: Match, key: str, component: Component, options: RestoreOptions, report: ComponentReport) -> None:
    """Compare one pair. What cannot be restored is taken out of ``found.pairs``."""
    entry, value = found.pairs[key], found.live[key]
    if key in found.extra or (isinstance(value, torch.Tensor) and is_lazy(value)):
        return
    if (entry.stored is not None) != _is_ordinary(value):
        problem = f"{key!r}: saved as {_kind(entry)}, live is {type(value).__name__}"
        found.problems.append(problem)
        report.changed.append(f"not restored: {problem}")
        del found.pairs[key]
        return
    if entry.stored is None:
        return
    spec = component.tensors[entry.stored]
    shape, dtype = tuple(value.shape), dtype_name(value.dtype)
    if (spec.shape, spec.dtype) == (shape, dtype):
        return
    if options.adapt is not None:
        found.adapt.add(key)
        report.adapted.append((key, f"{_describe(spec)} -> {dtype} {list(shape)}"))
    elif spec.shape != shape:
        found.problems.append(f"{key!r}: saved with shape {list(spec.shape)}, live has {list(shape)}")
        report.changed.append(f"{key!r} not restored: saved with shape {list(spec.shape)}, live has {list(shape)}")
        del found.pairs[key]
    else:
        found.problems.append(f"{key!r}: saved as {spec.dtype}, live is {dtype}")
        report.cast.append((key, f"{spec.dtype} -> {dtype}"))


def _is_ordinary(value: Any) -> bool:
    """Whether the value would be stored as one tensor under its own key."""
    return isinstance(value, torch.Tensor) and (is_ordinary(value) or (value.device.type == "meta" and is_dense(value)))


def is_dense(value: torch.Tensor) -> bool:
    """Whether it is an ordinary strided tensor, wherever it is."""
    return type(value) in PLAIN_TYPES and value.layout is torch.strided and not value.is_quantized


def _kind(entry: Entry) -> str:
    if entry.stored is not None:
        return "an ordinary tensor"
    node: Any = entry.node
    tag = next(iter(node)) if type(node) is dict and len(node) == 1 else ""
    return f"{tag[1:]} data" if str(tag).startswith("$") else "other data"


def _describe(spec: TensorSpec) -> str:
    return f"{spec.dtype} {list(spec.shape)}"


def _check_ties(found: Match) -> None:
    """Two stored tensors for one live one: whichever came last would win in silence."""
    by_address: dict[int, list[tuple[str, str, torch.Tensor]]] = {}
    for key, entry in found.pairs.items():
        value = found.live[key]
        if entry.stored is None or key in found.extra or not isinstance(value, torch.Tensor) or is_lazy(value):
            continue
        plain = is_plain(value) and value.numel()
        by_address.setdefault(value.data_ptr() if plain else -id(value), []).append((key, entry.stored, value))
    for group in by_address.values():
        if len(group) > 1:  # few are
            _check_tied(found, group)


def _check_tied(found: Match, group: list[tuple[str, str, torch.Tensor]]) -> None:
    """The same, of (key, stored key, live tensor) whose memory begins at one address."""
    owners: dict[tuple[object, ...], tuple[str, str]] = {}
    for key, stored, value in group:
        memory = memory_key(value) if is_plain(value) and value.numel() else (id(value),)
        other, first = owners.setdefault(memory, (key, stored))
        if first != stored:
            found.problems.append(f"{other!r} and {key!r} are one tensor here and were saved as two")
