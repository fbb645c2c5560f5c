"""``SWALR`` of a torch whose ``state_dict()`` holds the annealing function itself (before 2.7): its name in its place.

That is how later releases say it, so that either restores what the other has saved.
"""

from __future__ import annotations

from typing import Any

from torch.optim.swa_utils import SWALR

from checkpointer.state.classes import attributes, unwrapped

_FUNCTION, _NAME = "anneal_func", "_anneal_strategy"
_STRATEGIES = {"cos": SWALR._cosine_anneal, "linear": SWALR._linear_anneal}  # noqa: SLF001 - torch has no public names


def named(live: object, state: Any) -> Any:
    """``state`` of ``live`` with the name of the function in its place, also in schedulers made of others.

    A function that is not torch's stays, for the encoder to refuse.
    """
    live = unwrapped(live)
    if not isinstance(state, dict):
        return state
    if isinstance(live, SWALR) and (name := _name_of(state.get(_FUNCTION))):
        return {**{key: value for key, value in state.items() if key != _FUNCTION}, _NAME: name}
    inner, states = attributes(live).get("_schedulers"), state.get("_schedulers")
    if isinstance(inner, (list, tuple)) and isinstance(states, (list, tuple)) and len(inner) == len(states):
        return {**state, "_schedulers": [named(part, its) for part, its in zip(inner, states, strict=True)]}
    return state


def bind(live: object) -> None:
    """Give each ``SWALR`` in ``live`` the function that its restored state names; a function of the user's stays."""
    live = unwrapped(live)
    known = attributes(live)
    if isinstance(live, SWALR) and _name_of(known.get(_FUNCTION)) and known.get(_NAME) in _STRATEGIES:
        live.anneal_func = _STRATEGIES[known[_NAME]]
    inner = known.get("_schedulers")
    if isinstance(inner, (list, tuple)):
        for part in inner:
            bind(part)


def _name_of(function: object) -> str:
    """Empty if it is none of torch's."""
    return next((name for name, known in _STRATEGIES.items() if known is function), "")
