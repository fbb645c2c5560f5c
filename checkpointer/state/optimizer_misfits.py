"""Why a ``state_dict`` without the names of parameters does not fit an optimizer of torch, found without loading it."""

from __future__ import annotations

from typing import Any

import torch

from checkpointer.state.decoding import Leaf


def has_usual_form(state: Any) -> bool:
    """Whether a ``state_dict`` is ``{"state": {index: …}, "param_groups": [{"params": [index, …], …}, …]}``."""
    if type(state) is not dict or set(state) != {"state", "param_groups"} or not isinstance(state["state"], dict):
        return False
    groups = state["param_groups"]
    return isinstance(groups, list) and all(isinstance(group, dict) and "params" in group for group in groups)


def misfits(state: Any, optimizer: torch.optim.Optimizer) -> list[str]:
    """What is wrong with an outlined ``state_dict``, one sentence each; parameters are matched by position.

    torch notices a different number of groups or parameters when it loads; other shapes, or settings of another class,
    only in the next step.
    """
    if not has_usual_form(state) or not all(isinstance(group["params"], list) for group in state["param_groups"]):
        return ["it is not the state of an optimizer of torch"]
    saved, live = state["param_groups"], optimizer.param_groups
    if len(saved) != len(live):
        return [f"{len(saved)} parameter groups were saved, live are {len(live)}"]
    counts = [(len(group["params"]), len(other["params"])) for group, other in zip(saved, live, strict=True)]
    problems = [
        f"group {number}: {before} parameters were saved, live are {now}"
        for number, (before, now) in enumerate(counts)
        if before != now
    ]
    return problems or [*_missing_settings(saved, optimizer), *_misshapen(state, optimizer)]


def _missing_settings(saved: list[dict[str, Any]], optimizer: torch.optim.Optimizer) -> list[str]:
    """Settings without which the class cannot step, after it has filled in those that old files lack."""
    groups = [{**group, "params": []} for group in saved]
    stand_in: Any = object.__new__(type(optimizer))
    stand_in.__setstate__({"defaults": dict(optimizer.defaults), "state": {}, "param_groups": groups})
    return [
        f"group {number} was saved without {', '.join(map(repr, lacking))}: was it another class of optimizer?"
        for number, group in enumerate(groups)
        if (lacking := [key for key in optimizer.defaults if key not in group])
    ]


def _misshapen(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> list[str]:
    if isinstance(optimizer, torch.optim.LBFGS):  # which keeps all parameters as one vector
        return []
    return [
        f"group {number}, position {position}: {slot!r} was saved with shape {list(leaf.spec.shape)}, the live "
        f"parameter has {list(parameter.shape)}"
        for number, (group, live) in enumerate(zip(state["param_groups"], optimizer.param_groups, strict=True))
        for position, (index, parameter) in enumerate(zip(group["params"], live["params"], strict=True))
        for slot, leaf in _slots(state["state"], index)
        if leaf.spec is not None and not _can_belong(leaf.spec.shape, tuple(parameter.shape))
    ]


def _slots(state: dict[Any, Any], index: Any) -> list[tuple[str, Leaf]]:
    slots = state.get(index) if isinstance(index, (int, str)) else None
    return [(slot, leaf) for slot, leaf in slots.items() if isinstance(leaf, Leaf)] if isinstance(slots, dict) else []


def _can_belong(slot: tuple[int, ...], parameter: tuple[int, ...]) -> bool:
    """State is a number, or has the parameter's shape, or (Adafactor) its rows' or columns'."""
    fits = len(slot) == len(parameter) and all(size in (1, other) for size, other in zip(slot, parameter, strict=True))
    return not slot or fits
