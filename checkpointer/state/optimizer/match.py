"""Which saved parameter of an optimizer is which live one, and which saved group belongs to which live group."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from checkpointer.errors import CorruptCheckpointError
from checkpointer.state.destinations import nearest
from checkpointer.state.module.match import SHOWN
from checkpointer.state.protocol import ComponentReport, RestoreOptions
from checkpointer.state.tensors import DTYPES, dtype_name


@dataclass(frozen=True)
class SavedParameter:
    """A parameter as the checkpoint knows it."""

    index: int
    """Its key in the saved ``state``."""
    group: int
    name: str | None
    shape: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype | None
    """``None`` where the checkpoint does not say: it is of a time before dtypes were recorded."""


@dataclass
class Matched:
    """Saved parameters with their live ones."""

    pairs: list[tuple[SavedParameter, torch.Tensor, str]] = field(default_factory=list)
    """(saved, live parameter, label for messages)."""
    groups: dict[int, int] = field(default_factory=dict)
    """Live group -> saved group."""
    kept: list[torch.Tensor] = field(default_factory=list)
    """Live parameters that keep the state they have: ignored, or (not strict) not in the checkpoint."""
    problems: list[str] = field(default_factory=list)


def saved_parameters(name: str, groups: Any, meta: Any) -> list[list[SavedParameter]]:
    """The saved parameters by group. Raises :class:`CorruptCheckpointError` where groups and meta disagree."""
    found: list[list[SavedParameter]] = []
    try:
        dtypes = meta.get("dtypes", [[None] * len(group["params"]) for group in groups])
        columns = [meta["params"], meta["shapes"], meta["devices"], dtypes]
        if any(len(column) != len(groups) for column in columns):
            raise ValueError("groups differ in number")
        for number, group in enumerate(groups):
            rows = zip(group["params"], *(column[number] for column in columns), strict=True)
            found.append([_parameter(number, row) for row in rows])
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        raise CorruptCheckpointError(f"{name}: the parameter groups are not well formed: {error}") from error
    return found


def _parameter(group: int, row: tuple[Any, ...]) -> SavedParameter:
    index, name, shape, device, dtype = row
    if type(index) is not int or not (name is None or type(name) is str) or type(shape) is not list:
        raise TypeError("not a parameter")
    if not all(type(size) is int for size in shape):
        raise TypeError("not a shape")
    return SavedParameter(index, group, name, tuple(shape), _device(device), None if dtype is None else DTYPES[dtype])


@functools.cache
def _device(name: str) -> torch.device:
    return torch.device(name)


def match_parameters(
    name: str,
    saved: list[list[SavedParameter]],
    optimizer: torch.optim.Optimizer,
    names: list[list[str | None]],
    *,
    options: RestoreOptions,
    report: ComponentReport,
) -> Matched:
    """Match by name where every name is known and unique on both sides, else by position."""
    matched = Matched()
    flat_saved = [parameter for group in saved for parameter in group]
    flat_names = [item for group in names for item in group]
    saved_names = _renamed(flat_saved, {item for item in flat_names if item is not None}, options)
    keys = _comparable(list(saved_names), flat_names) if _usable(saved_names, flat_saved) else None
    if keys is not None:
        flat_live = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        named = dict(zip(keys[0], saved_names.values(), strict=True))
        live = dict(zip(keys[1], flat_live, strict=True))
        _by_name(matched, named, live, lambda key: _ignored(name, key, options), report)
    else:
        _by_position(matched, saved, optimizer, names, report)
    _check_shapes(matched, options, report)
    _check_dtypes(matched, options)
    _match_groups(matched, saved, optimizer, report)
    return matched


def _usable(names: dict[str, SavedParameter], flat: list[SavedParameter]) -> bool:
    return len(names) == len(flat)


def _renamed(saved: list[SavedParameter], live: set[str], options: RestoreOptions) -> dict[str, SavedParameter]:
    """Saved parameters by the live name that they ought to have; unnamed and doubly named ones are left out."""
    return {_rename(item.name, live, options): item for item in saved if item.name is not None}


def _rename(name: str, live: set[str], options: RestoreOptions) -> str:
    """The renamed parameter. Rules may be written for keys of the module, or with the component's name before them."""
    component, dot, key = name.partition(".")
    candidates = [f"{component}.{options.renamed(key)}", options.renamed(name)] if dot else [options.renamed(name)]
    changed = [candidate for candidate in candidates if candidate != name]
    return next((candidate for candidate in changed if candidate in live), changed[0] if changed else name)


def _comparable(saved: list[str], live: list[str | None]) -> tuple[list[str], list[str]] | None:
    """Both lists of names in a form that can be compared; ``None`` where names do not decide.

    Names differ in their first part if the module was registered under another component name: then that is left out.
    """
    known = [item for item in live if item is not None]
    if len(set(known)) != len(live):
        return None
    if saved and known and not set(saved) & set(known):
        bare_saved, bare = ([item.partition(".")[2] for item in items] for items in (saved, known))
        if len(set(bare_saved)) == len(saved) and len(set(bare)) == len(known) and set(bare_saved) & set(bare):
            return bare_saved, bare
    return saved, known


def _by_name(
    matched: Matched,
    saved: dict[str, SavedParameter],
    live: dict[str, torch.Tensor],
    ignored: Callable[[str], bool],
    report: ComponentReport,
) -> None:
    missing = [key for key in live if key not in saved and not ignored(key)]
    unexpected = [key for key in saved if key not in live and not ignored(key)]
    for key, parameter in live.items():
        if key in saved and not ignored(key):
            matched.pairs.append((saved[key], parameter, key))
            if saved[key].name is not None and key not in (saved[key].name, str(saved[key].name).partition(".")[2]):
                report.renamed.append((str(saved[key].name), key))
        else:
            matched.kept.append(parameter)
    report.missing += missing
    report.unexpected += unexpected
    matched.problems += [f"no state saved for parameter {key!r}{nearest(key, unexpected)}" for key in missing]
    matched.problems += [f"saved parameter {key!r} is not optimized here{nearest(key, missing)}" for key in unexpected]


def _ignored(component: str, key: str, options: RestoreOptions) -> bool:
    return options.ignored(component, key) or options.ignored(component, key.partition(".")[2])


def _by_position(
    matched: Matched,
    saved: list[list[SavedParameter]],
    optimizer: torch.optim.Optimizer,
    names: list[list[str | None]],
    report: ComponentReport,
) -> None:
    live = [group["params"] for group in optimizer.param_groups]
    sizes = ([len(group) for group in saved], [len(group) for group in live])
    if sizes[0] != sizes[1]:
        matched.problems.append(
            f"saved with parameter groups of {sizes[0]} parameters, live has {sizes[1]}; they have to be matched by "
            f"position, because not every parameter belongs to a registered module: register the module"
        )
    unnamed: list[str] = []
    for number, (saved_group, live_group) in enumerate(zip(saved, live, strict=False)):
        rows = zip(saved_group, live_group, names[number], strict=False)
        for position, (parameter, tensor, name) in enumerate(rows):
            if parameter.name is None or name is None:
                unnamed.append(f"{name or parameter.name or f'group {number} position {position}'} {[*tensor.shape]}")
            elif parameter.name != name:
                matched.problems.append(f"group {number}, position {position}: saved {parameter.name!r}, live {name!r}")
            matched.pairs.append((parameter, tensor, name or f"group {number} position {position}"))
    known = {id(tensor) for _, tensor, _ in matched.pairs}
    matched.kept += [tensor for group in live for tensor in group if id(tensor) not in known]
    if unnamed:
        more = f" and {len(unnamed) - SHOWN} more" if len(unnamed) > SHOWN else ""
        report.changed.append(
            f"{len(unnamed)} of the parameters were matched by position, as no registered module names them, here or "
            f"where they were saved: {', '.join(unnamed[:SHOWN])}{more}"
        )


def _check_shapes(matched: Matched, options: RestoreOptions, report: ComponentReport) -> None:
    for row in list(matched.pairs):
        saved, live, label = row
        if saved.shape == tuple(live.shape):
            continue
        if options.adapt is not None:
            report.adapted.append((label, f"{list(saved.shape)} -> {list(live.shape)}"))
            continue
        problem = f"parameter {label!r}: saved with shape {list(saved.shape)}, live has {list(live.shape)}"
        matched.problems.append(problem)
        report.changed.append(f"state not restored: {problem}")
        matched.pairs.remove(row)
        matched.kept.append(live)


def _check_dtypes(matched: Matched, options: RestoreOptions) -> None:
    """State follows its parameter to another dtype, which has to be asked for."""
    if options.adapt is not None:
        return
    for saved, live, label in matched.pairs:
        if saved.dtype is not None and saved.dtype != live.dtype:
            names = dtype_name(saved.dtype), dtype_name(live.dtype)
            matched.problems.append(f"parameter {label!r}: saved as {names[0]}, live is {names[1]}")


def _match_groups(
    matched: Matched, saved: list[list[SavedParameter]], optimizer: torch.optim.Optimizer, report: ComponentReport
) -> None:
    """Hyper-parameters come from the saved group that a live group's parameters were in."""
    origin = {id(live): parameter.group for parameter, live, _ in matched.pairs}
    for number, group in enumerate(optimizer.param_groups):
        sources = list(dict.fromkeys(origin[id(item)] for item in group["params"] if id(item) in origin))
        if len(sources) > 1:
            matched.problems.append(f"the parameters of group {number} were in the groups {sources} when saved")
        if sources:
            matched.groups[number] = sources[0]
        elif number < len(saved) and number not in origin.values():
            matched.groups[number] = number
    moved = [(new, old) for new, old in matched.groups.items() if new != old]
    report.changed += [f"group {new} was group {old} when saved" for new, old in moved]
