"""Settings that a restore changes back: the checkpoint's learning rate in the place of the new one in the script.

The checkpoint wins, as in torch. What differs is told, with the ``ignore_keys`` that keep the live settings. What
training or a scheduler changes as it goes (``last_epoch``, the learning rate that a scheduler drives) is progress, no
setting.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from checkpointer.state.classes import is_of_torch, is_scheduler, unwrapped
from checkpointer.state.dtensor import is_sharded
from checkpointer.state.protocol import RestoreOptions

LARGEST_LIST = 1000
"""Longer lists are taken as one value."""

_GROUP_IDENTITY = ("params", "param_names")
_BOOKKEEPING = ("_step_count", "_last_lr", "_get_lr_called_within_step", "_is_initial", "verbose")
_PROGRESS = frozenset(
    {
        *_BOOKKEEPING,
        "last_epoch",
        "base_lrs",
        "T_cur",
        "T_i",
        "best",
        "num_bad_epochs",
        "cooldown_counter",
        "mode_worse",
    }
)
_SCALER = frozenset({"growth_factor", "backoff_factor", "growth_interval"})

_TENSOR = object()
_MAPPINGS = (dict, OrderedDict, defaultdict, Counter)
_IMMUTABLE = (bool, int, float, str, tuple, type(None))


@dataclass
class Changes:
    """How the settings of one component differ between the checkpoint and the live object before the restore."""

    replaced: list[str] = field(default_factory=list)
    """Where the checkpoint won: ``"lr: 0.001 (live 0.0005)"``, and last what keeps the live ones."""
    kept: list[str] = field(default_factory=list)
    """Where ``ignore_keys`` kept the live setting."""

    @property
    def all(self) -> list[str]:
        """One sentence each."""
        return [*self.replaced, *self.kept]


def changed_groups(
    component: str,
    pairs: Iterable[tuple[int, Mapping[str, Any], Mapping[str, Any]]],
    options: RestoreOptions,
    given: Callable[[int], tuple[Mapping[str, Any], Mapping[str, Any]]] = lambda _: ({}, {}),
) -> Changes:
    """What differs between (number, saved group, live group before the restore); equal differences are told once.

    ``given`` has, for a group, what the script that saved it had given, and what this one has, where that is known.
    Where they are the same the difference is the loop's doing, which the restore brings back: no setting was changed.
    """
    found: dict[tuple[str, str, bool], list[int]] = {}
    driven = False
    for number, saved, live in pairs:
        before, after = settings_of_group(saved), settings_of_group(live)
        made_then, made_now = given(number)
        driven = driven or "initial_lr" in saved
        for key in before.keys() & after.keys():
            if not _same(before[key], after[key]):
                kept = options.ignored(component, group_key(number, key))
                if not kept and key in made_now and _same(made_then.get(key, before[key]), made_now[key]):
                    continue
                row = (str(key), _sentence(str(key), before[key], after[key], kept=kept), kept)
                found.setdefault(row, []).append(number)
    changes = Changes()
    for (_, text, kept), numbers in sorted(found.items()):
        (changes.kept if kept else changes.replaced).append(f"{text}{_in_groups(numbers)}")
    keys = sorted({key for key, _, kept in found if not kept})
    globs = [f"{component}.{group_key('*', key)}" for key in keys]
    if driven and "lr" in keys:
        globs += [f"{component}.{group_key('*', 'initial_lr')}", "*.base_lrs"]
    changes.replaced += _advice(globs)
    return changes


def moved_since(given: Mapping[str, Any], group: Mapping[str, Any], same: dict[str, Any]) -> dict[str, Any]:
    """Of the settings that a script gave a group, those that are others now; a tensor is not asked for its number.

    ``same`` holds the objects that were found to be as given: most are those very objects at the next save.
    """
    open_ = [key for key in given if key not in same or group.get(key) is not same[key]]
    if not open_:
        return {}
    looked_at = {key: group[key] for key in (*open_, "initial_lr", "base_momentum") if key in group}
    now = settings_of_group({key: _TENSOR if isinstance(it, torch.Tensor) else it for key, it in looked_at.items()})
    moved = {}
    for key in open_:
        if key in now and now[key] is not _TENSOR and _same(now[key], given[key]):
            if key in group and type(group[key]) in _IMMUTABLE:
                same[key] = group[key]
        elif key in now and _is_plain(given[key]):
            moved[key] = given[key]
    return moved


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def group_key(number: int | str, key: object) -> str:
    """The name of a setting of a parameter group, for ``ignore_keys``."""
    return f"param_groups.{number}.{key}"


def changed_state(component: str, live: object, saved: Any, before: Any, options: RestoreOptions) -> Changes:
    """What differs between the settings of a scheduler, or a gradient scaler, as saved and as they were before."""
    is_setting = setting_names(live)
    changes = Changes()
    if is_setting is None:
        return changes
    globs: list[str] = []
    for path, old, new in _differences("", saved, before):
        if not is_setting(path):
            continue
        kept = options.ignored(component, path)
        if not _private(path):
            (changes.kept if kept else changes.replaced).append(_sentence(path, old, new, kept=kept))
        globs += [] if kept else [f"{component}.{_outside_private(path)}"]
    if changes.replaced:
        changes.replaced += _advice(list(dict.fromkeys(globs)))
    return changes


def setting_names(live: object) -> Callable[[str], bool] | None:
    """Which paths in the state of ``live`` are settings; ``None`` where nobody can tell them from progress."""
    inner = unwrapped(live)
    if isinstance(inner, torch.amp.GradScaler):
        return lambda path: path in _SCALER
    if not is_scheduler(inner):
        return None
    own = None if is_of_torch(inner) else _arguments(type(inner))

    def is_setting(path: str) -> bool:
        parts = path.split(".")
        if _PROGRESS & set(parts):
            return False
        return own is None or parts[0] in own or parts[0] == "_schedulers"

    return is_setting


def names_any(state: Any, component: str, options: RestoreOptions, path: str = "") -> bool:
    """Whether ``ignore_keys`` names a part of a state, saved or live."""
    if not options.ignore_keys:
        return False
    rows: Iterable[tuple[Any, Any]] = ()
    if type(state) in _MAPPINGS:
        rows = state.items()
    elif type(state) is list and len(state) <= LARGEST_LIST:
        rows = enumerate(state)
    return any(
        options.ignored(component, f"{path}{key}") or names_any(value, component, options, f"{path}{key}.")
        for key, value in rows
    )


def with_kept(saved: Any, live: Any, component: str, options: RestoreOptions, path: str = "") -> Any:
    """A saved state in which what ``ignore_keys`` names is as in the live one: its value, or absent.

    A new value: nothing given is changed.
    """
    if type(saved) in _MAPPINGS and isinstance(live, dict):
        made = copy.copy(saved)
        made.clear()
        for key, value in saved.items():
            inner = f"{path}{key}"
            if not options.ignored(component, inner):
                made[key] = with_kept(value, live.get(key), component, options, f"{inner}.")
            elif key in live:
                made[key] = live[key]
        for key in live.keys() - saved.keys():
            if options.ignored(component, f"{path}{key}"):
                made[key] = live[key]
        return made
    if type(saved) is list and isinstance(live, list) and len(saved) == len(live) <= LARGEST_LIST:
        return [
            live[i]
            if options.ignored(component, f"{path}{i}")
            else with_kept(value, live[i], component, options, f"{path}{i}.")
            for i, value in enumerate(saved)
        ]
    return saved


def snapshot(value: Any) -> Any:
    """A copy of settings that a restore in place does not reach; tensors of more than one element are left out."""
    if isinstance(value, torch.Tensor):
        return value.detach().item() if value.numel() == 1 and not is_sharded(value) and not value.is_meta else None
    if isinstance(value, dict):
        return {key: snapshot(item) for key, item in value.items() if key not in _GROUP_IDENTITY}
    if isinstance(value, (list, tuple)) and len(value) <= LARGEST_LIST:
        return [snapshot(item) for item in value]
    return set(value) if isinstance(value, set) else value


def settings_of_group(group: Mapping[str, Any]) -> dict[str, Any]:
    """The settings by name. Where a scheduler drives the learning rate, or the momentum, what it began with."""
    found = {key: snapshot(value) for key, value in group.items() if key not in _GROUP_IDENTITY}
    if "initial_lr" in found:
        found["lr"] = found.pop("initial_lr")
    if "base_momentum" in found:
        found.pop("momentum", None)
        betas = found.get("betas")
        found["betas"] = betas[1:] if isinstance(betas, list) else betas
    return found


def _arguments(cls: type) -> set[str]:
    """The names of all arguments of the constructors of a class: its settings, if it keeps them by these names."""
    constructors = [base.__init__ for base in cls.__mro__ if "__init__" in vars(base)]  # type: ignore[misc]
    return {name for call in constructors if inspect.isfunction(call) for name in inspect.signature(call).parameters}


def _differences(path: str, saved: Any, live: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(saved, dict) and isinstance(live, dict):
        for key in saved.keys() & live.keys():
            yield from _differences(f"{path}.{key}" if path else str(key), saved[key], live[key])
    elif _holds_dicts(saved) and _holds_dicts(live) and len(saved) == len(live):
        for number, (old, new) in enumerate(zip(saved, live, strict=True)):
            yield from _differences(f"{path}.{number}", old, new)
    elif not _same(saved, live):
        yield path, saved, live


def _holds_dicts(value: Any) -> bool:
    return isinstance(value, list) and 0 < len(value) <= LARGEST_LIST and any(isinstance(item, dict) for item in value)


def _private(path: str) -> bool:
    return any(part.startswith("_") and part != "_schedulers" for part in path.split("."))


def _outside_private(path: str) -> str:
    """Without what is inside a private value, which is kept as a whole: ``_schedule_phases.0.end_step``."""
    parts = path.split(".")
    private = [place for place, part in enumerate(parts) if part.startswith("_") and part != "_schedulers"]
    return ".".join(parts[: private[0] + 1]) if private else path


def _same(a: Any, b: Any) -> bool:
    """Whether two settings are the same: a number may be a tensor, and a list a tuple."""
    a, b = snapshot(a), snapshot(b)
    if type(a) is float and type(b) is float:  # a tensor of float32 holds the same number less exactly
        return math.isclose(a, b, rel_tol=1e-6) or (math.isnan(a) and math.isnan(b))
    try:
        return bool(a == b)
    except (TypeError, ValueError, RuntimeError):  # arrays, and classes that compare in their own way
        return repr(a) == repr(b)


def _sentence(key: str, saved: Any, live: Any, *, kept: bool) -> str:
    if kept:
        return f"{key}: {_shown(live)} kept (saved {_shown(saved)})"
    return f"{key}: {_shown(saved)} (live {_shown(live)})"


def _shown(value: Any) -> str:
    text = repr(snapshot(value))
    return text if len(text) <= 60 else f"{text[:57]}..."


def _in_groups(numbers: Collection[int]) -> str:
    return "" if set(numbers) == {0} else f" in groups {', '.join(map(str, sorted(numbers)))}"


def _advice(globs: list[str]) -> list[str]:
    return [f"the live settings stay with ignore_keys={globs!r}"] if globs else []
