"""What the entries of a hand-made checkpoint are: components, the step, plain values. A pure decision, with reasons."""

from __future__ import annotations

import argparse
import keyword
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from checkpointer.errors import ConfigError
from checkpointer.policy.values import did_you_mean
from checkpointer.state.optimizer.misfits import has_usual_form

Naming: TypeAlias = "Mapping[str, str | None] | Callable[[str], str | None]"

KINDS = ("module", "optimizer", "stateful", "container")

#: Component names by the keys that people use; ``step`` and ``epoch`` go into the manifest.
CONVENTIONS: Mapping[str, str] = {
    key: name
    for name, keys in {
        "model": "model model_state state_dict net network module weights params",
        "optimizer": "optimizer optimizer_state optim optim_state opt",
        "scheduler": "scheduler scheduler_state lr_scheduler lr_sched sched",
        "scaler": "scaler scaler_state grad_scaler amp_scaler",
        "ema": "ema model_ema state_dict_ema ema_state",
        "step": "step global_step iteration iter num_steps",
        "epoch": "epoch current_epoch",
    }.items()
    for key in keys.split()
}
_MODULES = frozenset({"model", "ema"})
_COUNTERS = ("step", "epoch")
_RNG = re.compile(r"(.*_)?rng(_.*)?|random_state|numpy_random_state|torch_random_state|cuda_random_state")
_PREFIXES = ("module.", "_orig_mod.")
_SUFFIX = "_state_dict"


@dataclass(frozen=True)
class Part:
    """One component to be."""

    name: str
    kind: str
    """``module``, ``optimizer``, ``stateful`` or ``container``: what has to be registered to restore it."""
    source: str
    """Where in the file it comes from."""
    value: Any = field(repr=False)
    stripped: str = ""
    """A prefix that every key had, and that was removed."""


@dataclass
class ImportPlan:
    """What becomes of everything in a file."""

    step: int | None = None
    epoch: int | None = None
    parts: dict[str, Part] = field(default_factory=dict)
    """By component name."""
    values: dict[str, Any] = field(default_factory=dict)
    """Plain values, which are no component's state: kept as an attached file, as trees."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Key, and why it is not kept."""


def plan_import(
    state: Mapping[Any, Any], naming: Naming | None = None, kinds: Mapping[str, str] | None = None
) -> ImportPlan:
    """Decide what each entry of ``state`` is.

    Args:
        state: what ``torch.load`` returned.
        naming: key to component name, ``step`` or ``epoch``; ``None`` or ``""`` leaves a key out. Keys that a mapping
            lacks, or a function returns as they are, go by convention.
        kinds: component name to kind, where the guess would be wrong.

    Raises:
        ConfigError: two keys claim one name, a key is not there, or nothing in it is state.
    """
    plan = ImportPlan()
    if guess(state) in ("module", "optimizer") and naming is None:  # the state of one object, and nothing around it
        name = "optimizer" if guess(state) == "optimizer" else "model"
        _add(plan, name, "the whole file", state)
    elif _is_lightning(state):
        _plan_entries(plan, _flattened(state), naming)
    else:
        _plan_entries(plan, dict(state), naming)
    for name, kind in (kinds or {}).items():
        _set_kind(plan, name, kind)
    if not plan.parts:
        keys = ", ".join(sorted(map(str, state)))[:300]
        raise ConfigError(
            f"nothing in it looks like the state of a component; its keys are {keys}. Name one: key=model"
        )
    return plan


def guess(value: Any) -> str:
    """The kind of a value that is state; empty for plain values."""
    if isinstance(value, Mapping):
        if has_usual_form(dict(value)):
            return "optimizer"
        if value and all(_is_entry(key, item) for key, item in value.items()):
            return "module"
        return "stateful" if _holds_tensors(value) else ""
    return "container" if _holds_tensors(value) else ""


def _is_entry(key: Any, item: Any) -> bool:
    """Whether it may be an entry of a module's ``state_dict``."""
    return isinstance(key, str) and (isinstance(item, torch.Tensor) or key.endswith("_extra_state"))


def _holds_tensors(value: Any, depth: int = 0) -> bool:
    """Whether there is more than numbers in it: a tensor or array of several elements."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return (value.numel() if isinstance(value, torch.Tensor) else value.size) != 1
    if depth > 20 or not isinstance(value, (Mapping, list, tuple)):
        return False
    items = value.values() if isinstance(value, Mapping) else value
    return any(_holds_tensors(item, depth + 1) for item in items)


def _is_lightning(state: Mapping[Any, Any]) -> bool:
    return "pytorch-lightning_version" in state or {"state_dict", "optimizer_states"} <= set(state)


def _flattened(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """A Lightning checkpoint with its lists taken apart: ``optimizer``, ``optimizer_1``, …."""
    entries: dict[Any, Any] = {}
    for key, value in state.items():
        name = {"optimizer_states": "optimizer", "lr_schedulers": "scheduler"}.get(key)
        if name is None or not isinstance(value, list):
            entries[key] = value
            continue
        entries.update({f"{name}_{number}" if number else name: item for number, item in enumerate(value)})
    return entries


def _plan_entries(plan: ImportPlan, entries: dict[Any, Any], naming: Naming | None) -> None:
    if isinstance(naming, Mapping):
        for key in naming:
            if key not in entries:
                hint = did_you_mean(key, map(str, entries))
                raise ConfigError(
                    f"there is no key {key!r} in it{hint}; there are {', '.join(map(str, entries))[:300]}"
                )
    for key, value in entries.items():
        named, explicit = _named(str(key), naming)
        if explicit and not named:
            plan.left_out[str(key)] = "as asked"
        else:
            _place(plan, str(key), named if explicit else None, _state_of(value))


def _named(key: str, naming: Naming | None) -> tuple[str | None, bool]:
    """What the user calls ``key``, and whether the user has said anything about it."""
    if naming is None:
        return key, False
    if isinstance(naming, Mapping):
        return naming.get(key), key in naming
    name = naming(key)
    return name, name != key


def _state_of(value: Any) -> Any:
    """The state of an object that was saved whole, the attributes of a namespace, else the value."""
    if isinstance(value, (nn.Module, torch.optim.Optimizer)):
        return value.state_dict()
    return dict(vars(value)) if isinstance(value, argparse.Namespace) else value


def _place(plan: ImportPlan, key: str, named: str | None, value: Any) -> None:
    """One entry: a counter, a component, a plain value, or left out."""
    name = named or _conventional(key)
    number = _whole(value)
    if name in _COUNTERS and number is not None:
        if getattr(plan, name) not in (None, number):
            raise ConfigError(
                f"it holds two different values for the {name}: choose one, and leave the other out ({key}=)"
            )
        setattr(plan, name, number)
    elif named is not None or (name in CONVENTIONS.values() and isinstance(value, Mapping)) or guess(value):
        if named is None and _RNG.fullmatch(key.lower()):
            plan.left_out[key] = "states of random generators: which ones is not known"
        else:
            _add(plan, named or name, key, value)
    elif value is not None:
        plan.values[key] = value


def _conventional(key: str) -> str:
    """The component name that a key stands for: ``discriminator_state_dict`` is that of ``discriminator``."""
    bare = key.removesuffix(_SUFFIX) if key != _SUFFIX else key
    known = CONVENTIONS.get(key, CONVENTIONS.get(bare))
    if known is not None:
        return known
    name = re.sub(r"\W", "_", bare, flags=re.ASCII) or "unnamed"
    return f"_{name}" if name[0].isdigit() or keyword.iskeyword(name) else name


def _whole(value: Any) -> int | None:
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except (TypeError, RuntimeError, ValueError):
        return None
    return number if number is not None and number >= 0 else None


def _add(plan: ImportPlan, name: str, source: str, value: Any) -> None:
    if name in plan.parts:
        raise ConfigError(
            f"{plan.parts[name].source!r} and {source!r} would both be component {name!r}: "
            f"give one another name ({source}=other), or leave it out ({source}=)"
        )
    if name == "rng":
        raise ConfigError(
            f"no component can be named 'rng', which is taken: give {source!r} another name ({source}=other)"
        )
    kind = guess(value) or ("stateful" if isinstance(value, Mapping) else "container")
    if name in _MODULES and isinstance(value, Mapping) and not value:
        kind = "module"
    if kind == "module":
        value, stripped = without_prefix(value)
        plan.parts[name] = Part(name, kind, source, value, stripped)
    else:
        plan.parts[name] = Part(name, kind, source, value)


def _set_kind(plan: ImportPlan, name: str, kind: str) -> None:
    if kind not in KINDS or name not in plan.parts:
        known, word = (KINDS, kind) if kind not in KINDS else (tuple(plan.parts), name)
        what = "kind" if kind not in KINDS else "component"
        raise ConfigError(f"there is no {what} {word!r}{did_you_mean(word, known)}; there are {', '.join(known)}")
    part = plan.parts[name]
    keyed = isinstance(part.value, Mapping) and all(isinstance(key, str) for key in part.value)
    if (kind == "module" and not keyed) or (kind == "optimizer" and not isinstance(part.value, Mapping)):
        raise ConfigError(f"{part.source!r} is a {type(part.value).__name__}, not the state_dict of {kind}")
    plan.parts[name] = Part(name, kind, part.source, part.value, part.stripped)


def without_prefix(state: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """A module's state without the prefixes of DistributedDataParallel and ``torch.compile`` that every key has."""
    stripped = ""
    while (
        prefix := next((item for item in _PREFIXES if all(key.startswith(item) for key in state)), "") if state else ""
    ):
        metadata = getattr(state, "_metadata", None)
        state = _Stripped({key[len(prefix) :]: value for key, value in state.items()})
        if isinstance(metadata, Mapping):
            inner = {f"{path}."[len(prefix) :].removesuffix("."): item for path, item in metadata.items() if path}
            state._metadata = inner  # noqa: SLF001  as torch calls it
        stripped += prefix
    return dict(state) if type(state) is dict else state, stripped  # type: ignore[return-value]  # a dict with an attribute


class _Stripped(dict[str, Any]):
    """A ``state_dict`` that can have ``_metadata``."""

    _metadata: Any = None
