"""The class that a component was saved by, and what follows where the live object is of another one.

Classes are compared by name alone: scripts move, and ``__main__.MyOptimizer`` is ``train.MyOptimizer`` tomorrow.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from checkpointer.errors import CorruptCheckpointError
from checkpointer.format.index import Json
from checkpointer.state.protocol import RestoreOptions, SavedState

CLASS = "class"
"""The member of a component's meta that holds the name; absent where it is not known (imported files)."""


def class_name(live: object) -> str:
    """The name to record: of what is wrapped, where ``live`` only shows the state of something else.

    A scheduler that is made of others is named with them: ``SequentialLR[LinearLR, CosineAnnealingLR]``.
    """
    inner = unwrapped(live)
    name = type(inner).__name__
    parts = attributes(inner).get("_schedulers") if is_scheduler(inner) else None
    return f"{name}[{', '.join(map(class_name, parts))}]" if isinstance(parts, (list, tuple)) else name


def unwrapped(live: object) -> Any:
    """The innermost object whose state ``live`` shows as its own; ``live`` itself if it is no such wrapper."""
    seen = {id(live)}
    while (inner := _shown_by(live)) is not None and id(inner) not in seen:
        seen.add(id(inner))
        live = inner
    return live


def attributes(live: object) -> Mapping[str, Any]:
    """The attributes of an object that it keeps in a ``__dict__``."""
    found: Mapping[str, Any] = getattr(live, "__dict__", {})
    return found


def is_scheduler(live: object) -> bool:
    """Whether it is one of torch's learning-rate schedulers, or derived from one."""
    return isinstance(live, (LRScheduler, ReduceLROnPlateau))


def class_change(saved: SavedState, live: object, options: RestoreOptions) -> str:
    """``"saved by AdamW, live is SGD"`` where the classes differ; empty where not, or where it is not known.

    ``rename={"OldName": "NewName"}``, or a function, makes one name of two, where the live class is not torch's: those
    never got new names.

    Raises:
        CorruptCheckpointError: what the checkpoint has there is no name.
    """
    before: Json = saved.component.meta.get(CLASS)
    if before is not None and type(before) is not str:
        raise CorruptCheckpointError(f"{saved.name}: the class of this component is not well formed")
    now = class_name(live)
    if before is None or now == before or (not is_of_torch(live) and options.renamed(before) == now):
        return ""
    return f"saved by {before}, live is {now}"


def refused_class(change: str, saved: SavedState, live: object) -> str:
    """What to do about another class, after ``change``."""
    before, now = saved.component.meta[CLASS], class_name(live)
    new_name = (
        "" if is_of_torch(live) else f", or, if it only got a new name, restore with rename={{{before!r}: {now!r}}}"
    )
    return f"{change}: register the class that was saved{new_name}"


def is_of_torch(live: object) -> bool:
    """Whether its class is torch's own, or that of what it shows is."""
    return type(unwrapped(live)).__module__.partition(".")[0] == "torch"


def _shown_by(live: object) -> Any:
    """What a wrapper shows: accelerate's, Opacus's and PostLocalSGD's optimizers share ``state`` and groups with it."""
    held = attributes(live)
    if type(live).__module__.startswith("accelerate.") and is_scheduler(held.get("scheduler")):
        return held["scheduler"]
    if not isinstance(live, torch.optim.Optimizer):
        return None
    if type(live).__module__.startswith("torch.distributed.optim") and type(live).__name__ == "ZeroRedundancyOptimizer":
        return held.get("optim")  # consolidated, its state is that of the whole optimizer
    for inner in held.values():
        if isinstance(inner, torch.optim.Optimizer) and _same(live, inner, "param_groups", "state"):
            return inner
    return None


def _same(a: object, b: object, *names: str) -> bool:
    return a is not b and all(getattr(a, name, a) is getattr(b, name, b) for name in names)
