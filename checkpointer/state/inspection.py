"""What is wrong with a component, found when the manager is made: before an hour of training, not after it."""

from __future__ import annotations

import keyword
from collections import deque
from collections.abc import Callable, Collection, ItemsView, Iterator, Mapping, ValuesView

import torch
from torch import nn

from checkpointer.errors import UnsupportedStateError
from checkpointer.state.classes import is_scheduler

MOST_ITEMS = 10_000
"""Items that are looked at in one component. Collections of objects are short; long ones hold numbers."""

_COLLECTIONS = (list, tuple, dict, set, frozenset, deque, Mapping, ValuesView, ItemsView)


def refuse_uninitialized(name: str, obj: object) -> None:
    """Raise :class:`UnsupportedStateError` for an object whose class never called ``super().__init__()``.

    Wrappers may do without, where they show the attributes of what they wrap.
    """
    if isinstance(obj, type):
        return
    if isinstance(obj, torch.optim.Optimizer):
        lacking = [part for part in ("param_groups", "state") if not hasattr(obj, part)]
        _refuse(name, obj, lacking, "super().__init__(params, defaults)")
    elif is_scheduler(obj):
        lacking = [part for part in ("optimizer", "last_epoch") if not hasattr(obj, part)]
        _refuse(name, obj, lacking if len(lacking) == 2 else [], "super().__init__(optimizer)")
    elif isinstance(obj, nn.Module):
        for path, module in _modules(name, obj, set()):
            _refuse(path, module, [part for part in _TABLES if part not in vars(module)], "super().__init__()")


_TABLES = ("_parameters", "_buffers", "_modules")


def _refuse(path: str, obj: object, lacking: list[str], call: str) -> None:
    if lacking:
        kind = type(obj).__qualname__
        raise UnsupportedStateError(
            f"component {path!r}: {kind} has no {' and no '.join(lacking)}, because {kind}.__init__ does not call "
            f"{call}; call it first there"
        )


def _modules(path: str, module: nn.Module, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """As ``named_modules``, which a module that was not initialized cannot be asked for."""
    if id(module) in seen:
        return
    seen.add(id(module))
    yield path, module
    for name, child in vars(module).get("_modules", {}).items():
        if child is not None:
            yield from _modules(f"{path}.{name}", child, seen)


def refuse_collection(name: str, obj: object, has_own_state: Callable[[object], bool]) -> None:
    """Raise :class:`UnsupportedStateError` for a collection, however nested, of objects that are components."""
    place, found = next(_own_states(name, obj, has_own_state), ("", None))
    if found is None:
        return
    assert isinstance(obj, Collection)
    raise UnsupportedStateError(
        f"component {name!r}: {place} has state of its own ({type(found).__qualname__}), so that a "
        f"{type(obj).__qualname__} cannot hold it as a value. {_cure(name, obj, found, has_own_state)}"
    )


def _own_states(name: str, obj: object, has_own_state: Callable[[object], bool]) -> Iterator[tuple[str, object]]:
    """(place, object), breadth first."""
    queue: deque[tuple[str, object]] = deque([(name, obj)])
    seen: set[int] = set()
    left = MOST_ITEMS
    while queue:
        path, item = queue.popleft()
        if not isinstance(item, _COLLECTIONS) or id(item) in seen:
            continue
        seen.add(id(item))
        for part, inner in _items(item):
            left -= 1
            if left < 0:
                return
            place = f"{path}[{part!r:.80}]"
            if has_own_state(inner):
                yield place, inner
            queue.append((place, inner))


def _items(item: object) -> Iterator[tuple[object, object]]:
    if isinstance(item, Mapping):
        yield from item.items()
    elif isinstance(item, Collection):
        yield from enumerate(item)


def _cure(name: str, obj: Collection[object], found: object, has_own_state: Callable[[object], bool]) -> str:
    """A keyword for each, in words that can be copied where nothing else stands between the objects."""
    top = {key: part for key, part in _items(obj) if has_own_state(part)}
    words = all(isinstance(key, str) and key.isidentifier() and not keyword.iskeyword(key) for key in top)
    if isinstance(obj, Mapping) and top and words:
        each = ", ".join(f"{key}=…" for key in list(top)[:3]) + (", …" if len(top) > 3 else "")
        each += f" (that is, **{name})" if len(top) == len(obj) else ""
    elif len(top) < len(obj):
        each = f"{name}_0=…, {name}_1=…"
    elif isinstance(obj, Mapping):
        each = f'**{{f"{name}_{{key}}": part for key, part in {name}.items()}}'
    else:
        each = f'**{{f"{name}_{{i}}": part for i, part in enumerate({name})}}'
    modules = "; modules may also be in one nn.ModuleList or nn.ModuleDict" if isinstance(found, nn.Module) else ""
    return f"Give each of them a keyword of its own: CheckpointManager(root, {each}){modules}"
