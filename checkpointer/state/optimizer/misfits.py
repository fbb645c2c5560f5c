"""Why the saved state of an optimizer does not fit a live one, found without loading it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from checkpointer.state.classes import is_of_torch, unwrapped
from checkpointer.state.tree.decode import Leaf

DEFAULTS = "defaults"
"""The member of an optimizer's meta that lists the hyper-parameters its class sets. Absent where it is not known."""


class Slots(NamedTuple):
    """What a class of torch keeps of each parameter, beside ``step``."""

    always: frozenset[str]
    sometimes: frozenset[str] = frozenset()
    """Only with some settings, or parameters of some shapes."""


def _slots_of(always: str = "", sometimes: str = "") -> Slots:
    return Slots(frozenset(always.split()), frozenset({"step", *sometimes.split()}))


SLOTS: Mapping[str, Slots] = {
    "ASGD": _slots_of("eta mu ax"),
    "Adadelta": _slots_of("square_avg acc_delta"),
    "Adafactor": _slots_of(sometimes="variance row_var col_var"),
    "Adagrad": _slots_of("sum"),
    "Adam": _slots_of("exp_avg exp_avg_sq", "max_exp_avg_sq"),
    "AdamW": _slots_of("exp_avg exp_avg_sq", "max_exp_avg_sq"),
    "Adamax": _slots_of("exp_avg exp_inf"),
    "Muon": _slots_of("momentum_buffer"),
    "NAdam": _slots_of("exp_avg exp_avg_sq mu_product"),
    "RAdam": _slots_of("exp_avg exp_avg_sq"),
    "RMSprop": _slots_of("square_avg", "momentum_buffer grad_avg"),
    "Rprop": _slots_of("prev step_size"),
    "SGD": _slots_of(sometimes="momentum_buffer"),
    "SparseAdam": _slots_of("exp_avg exp_avg_sq"),
}
"""LBFGS, which keeps everything under its first parameter, is not here."""


def settings_of(optimizer: torch.optim.Optimizer) -> Mapping[str, Any]:
    """The hyper-parameters that the class sets in every group, by name; a few third-party classes say none."""
    found = getattr(unwrapped(optimizer), "defaults", None)
    return found if isinstance(found, Mapping) else {}


def known_slots(optimizer: torch.optim.Optimizer) -> Slots | None:
    """The state that an optimizer of torch's own keeps for each parameter; ``None`` for others."""
    return SLOTS.get(type(unwrapped(optimizer)).__name__) if is_of_torch(optimizer) else None


def slot_misfit(
    known: Slots | None, optimizer: torch.optim.Optimizer, parameter: torch.Tensor, saved: Collection[Any]
) -> str:
    """Why saved state with these keys cannot be this class's; empty where nothing says so.

    ``known``: its :func:`known_slots`. State that one side lacks is no reason: it is made when it is first needed, and
    surplus state is removed.
    """
    if known is not None:
        lacking = known.always - set(saved)
        return f"it has {_listed(saved)}, and no {_listed(lacking)}" if lacking else ""
    live = optimizer.state.get(parameter)
    if not isinstance(live, dict) or not live.keys() - saved or not set(saved) - live.keys():
        return ""
    return f"it has {_listed(saved)}, live state has {_listed(live)}"


def slots_agree(
    known: Slots | None, optimizer: torch.optim.Optimizer, parameter: torch.Tensor, saved: Collection[Any]
) -> bool:
    """Whether saved state of another class has just what this class keeps, as far as that is known."""
    if known is not None:
        return known.always <= set(saved) <= known.always | known.sometimes
    live = optimizer.state.get(parameter)
    return isinstance(live, dict) and live.keys() == set(saved)


def _listed(keys: Collection[Any]) -> str:
    return ", ".join(map(repr, sorted(keys, key=str))) or "nothing"


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
    return problems or [*missing_settings(saved, optimizer), *_misshapen(state, optimizer)]


def missing_settings(saved: list[dict[str, Any]], optimizer: torch.optim.Optimizer) -> list[str]:
    """Settings without which the class cannot step, after it has filled in those that old files lack.

    To be asked only where ``__setstate__`` is torch's own.
    """
    groups = [{**group, "params": []} for group in saved]
    stand_in: Any = object.__new__(type(optimizer))
    own = {"_patch_step_function": lambda: None}  # which would put hooks back into the class, here in a mere look
    stand_in.__setstate__({"defaults": dict(optimizer.defaults), "state": {}, "param_groups": groups, **own})
    return [
        f"group {number} was saved without {', '.join(map(repr, lacking))}: was it another class of optimizer?"
        for number, group in enumerate(groups)
        if (lacking := [key for key in optimizer.defaults if key not in group])
    ]


def foreign_settings(saved: Any, groups: list[dict[str, Any]], optimizer: torch.optim.Optimizer) -> Iterator[str]:
    """Hyper-parameters of the class that was saved (``saved``: its defaults, if they are known) and not of this one."""
    if not isinstance(saved, list):
        return
    own = set(settings_of(optimizer)).union(*optimizer.param_groups)
    for number, group in enumerate(groups):
        surplus = [key for key in saved if key in group and key not in own]
        if surplus:
            yield f"group {number} was saved with {', '.join(map(repr, surplus))}, which the live class does not have"


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
