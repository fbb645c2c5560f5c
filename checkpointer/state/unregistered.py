"""What training changes beside the components, and a resume would lose: the first save names it.

Parameters that an optimizer trains and no component holds, the optimizer of a scheduler, an optimizer inside another
object whose ``state_dict()`` leaves it out, a loader in the middle of an epoch, gradients that wait for their step.
Where a wrapper may hold copies of its own, the doubt is in its favour.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from checkpointer.state.classes import attributes, class_name, is_scheduler, unwrapped
from checkpointer.state.dtensor import is_sharded, local_part
from checkpointer.state.module.adapter import ModuleComponent
from checkpointer.state.module.unsaved import LARGEST_CONTAINER, memory_of
from checkpointer.state.pending import PendingGradients
from checkpointer.state.protocol import Captured
from checkpointer.system import messages

SHOWN = 10
DEPTH = 3
"""How deep attributes and containers are followed."""

_CONTAINERS = (list, tuple, set, dict)

_looking: weakref.WeakSet[Unregistered] = weakref.WeakSet()
_moving: weakref.WeakSet[Any] = weakref.WeakSet()
"""Loaders in the middle of an epoch whose state nobody has ever asked for."""


def position_moves(loader: object) -> None:
    """An epoch of a loader has begun, and it has never been asked for its state."""
    _moving.add(loader)


def position_is_safe(loader: object) -> None:
    """The loader was asked for its state, was given one, or has come to the end of an epoch."""
    _moving.discard(loader)


class Unregistered:
    """Warns once of each thing that the components of one manager leave out."""

    def __init__(self, components: Mapping[str, object]) -> None:
        self._components = dict(components)
        self._looked = False
        self._groups: dict[str, list[tuple[int, ...]]] | None = None
        """Of each optimizer at the last look, how many parameters each group has, and the first and last of them."""
        self._said: set[int] = set()
        """Parameters that were named."""
        self._all_inner: list[_Inner] = []
        """Optimizers inside components."""
        self._pending = PendingGradients(self._components)
        _looking.add(self)
        self._inner: list[_Inner] = []
        """Of these the ones that have no state yet, so that nobody can tell where it goes."""

    def warn(self, captured: Mapping[str, Captured]) -> None:
        """Look at the components once, with what was captured of them; at every save while something is open."""
        found = [*self._new_parameters(captured), *self._loaders(), *self._pending.told()]
        if not self._looked:
            self._looked = True
            found += self._schedulers()
            self._all_inner = list(self._inner_optimizers())
            self._inner = list(self._all_inner)
            found += self._inner_parameters(captured)
        if self._inner:
            stepped = [inner for inner in self._inner if inner.slots()]
            self._inner = [inner for inner in self._inner if inner not in stepped]
            unsaved = self._unsaved(captured) if stepped else []
            found += [inner.message() for inner in unsaved if inner in stepped]
        for message in found:
            messages.warn(message)

    def _loaders(self) -> Iterator[str]:
        """Loaders whose position no manager saves: no component is one, nor asks it for its state."""
        for loader in list(_moving):
            position_is_safe(loader)  # or said
            if not any(loader is part for look in list(_looking) for part in look._components.values()):  # noqa: SLF001
                yield (
                    f"a {type(loader).__name__} is in the middle of an epoch, and no component: its position is not "
                    "saved, and a resume begins that epoch anew. Register it by keyword: CheckpointManager(root, ..., "
                    "loader=loader); or, if its position does not matter, iterate over the DataLoader itself"
                )

    def _new_parameters(self, captured: Mapping[str, Captured]) -> list[str]:
        """As :meth:`_parameters`, where the groups of an optimizer are not those of the last save."""
        groups = {
            name: [(len(found), *map(id, (*found[:1], *found[-1:]))) for found in _lists_of(part)]
            for name, part in self._components.items()
            if isinstance(part, torch.optim.Optimizer)
        }
        if groups == self._groups:
            return []
        self._groups = groups
        return list(self._parameters(captured))

    def _inner_parameters(self, captured: Mapping[str, Captured]) -> Iterator[str]:
        """Of each optimizer inside a component, the parameters that nobody saves."""
        if not self._all_inner:
            return
        memory = _memory_of_captured(captured)
        for part in self._components.values():
            memory |= {_memory(tensor) for tensor in _registered(part)}
        trained = {_memory(tensor) for inner in self._all_inner for tensor in inner.parameters()}
        trained |= {_memory(tensor) for inner in self._all_inner for _, tensor in inner.slots()}
        for inner in self._all_inner:
            tensors = captured[inner.component].tensors.values()
            copies = {tuple(tensor.shape) for tensor in tensors if _memory(tensor) not in trained}
            left = [p for p in inner.parameters() if _memory(p) not in memory and tuple(p.shape) not in copies]
            if left:
                yield inner.parameters_message(left)

    def _unsaved(self, captured: Mapping[str, Captured]) -> list[_Inner]:
        """Optimizers inside components whose state is saved neither itself nor as a copy, each copy counted once."""
        memory = _memory_of_captured(captured)
        live = {_memory(tensor) for inner in self._all_inner for _, tensor in inner.slots()}
        copies = {
            name: Counter(key.rpartition(".")[2] for key, item in part.tensors.items() if _memory(item) not in live)
            for name, part in captured.items()
        }
        unsaved = []
        for inner in self._all_inner:
            if all(_memory(tensor) in memory for _, tensor in inner.slots()):
                continue
            needed = Counter(str(slot) for slot, _ in inner.slots())
            if needed <= copies[inner.component]:
                copies[inner.component] -= needed
            else:
                unsaved.append(inner)
        return unsaved

    def _parameters(self, captured: Mapping[str, Captured]) -> Iterator[str]:
        """Of each optimizer, the parameters that no component holds."""
        optimizers = {name: part for name, part in self._components.items() if isinstance(part, torch.optim.Optimizer)}
        if not optimizers:
            return
        held = {id(tensor) for part in self._components.values() for tensor in _registered(part)}
        for name, optimizer in optimizers.items():
            left = _trained(optimizer, held)
            if not left:
                continue
            known = self._held_in_another_way(captured)
            missing = [
                (number, [tensor for tensor in known.missing(group) if id(tensor) not in self._said])
                for number, group in left
            ]
            self._said |= {id(tensor) for _, group in missing for tensor in group}
            lines = [line for number, group in missing for line in _described(optimizer, number, group)]
            if lines:
                yield _parameters_message(name, lines)

    def _held_in_another_way(self, captured: Mapping[str, Captured]) -> _Known:
        """Tensors whose memory is saved, or of which an object that holds them saves a copy."""
        memory = _memory_of_captured(captured)
        for part in self._components.values():
            memory |= {_memory(tensor) for tensor in _registered(part)}
        copied: dict[int, set[tuple[int, ...]]] = {}
        own_form: set[tuple[int, ...]] = set()
        for name, part in self._components.items():
            shapes = {tuple(tensor.shape) for tensor in captured[name].tensors.values()}
            if isinstance(part, torch.optim.Optimizer):
                own_form |= shapes if "params" not in captured[name].meta else set()
            elif captured[name].kind == "stateful" and not is_scheduler(unwrapped(part)):
                for item in _reachable(part):
                    copied.setdefault(id(item), set()).update(shapes)
        return _Known(memory, copied, own_form)

    def _schedulers(self) -> Iterator[str]:
        """Schedulers that change an optimizer which is not registered."""
        parts = self._components.values()
        registered = [part for part in parts if isinstance(part, torch.optim.Optimizer)]
        for name, part in self._components.items():
            for optimizer in _optimizers_of_scheduler(unwrapped(part)):
                if any(_overlap(optimizer, known) for known in registered):
                    continue
                others = [item for item in parts if not is_scheduler(unwrapped(item))]
                if any(item is optimizer for other in others for item in _reachable(other)):
                    continue  # which has a state_dict() of its own, for it to be in
                yield (
                    f"scheduler {name!r} sets the learning rate of an optimizer ({class_name(optimizer)}) that is not "
                    "registered: neither its state nor its learning rate is saved. Register it by keyword: "
                    "CheckpointManager(root, ..., optimizer=optimizer)"
                )
                break

    def _inner_optimizers(self) -> Iterator[_Inner]:
        known = {id(unwrapped(part)) for part in self._components.values()}
        for name, part in self._components.items():
            yield from (_Inner(name, path, inner) for path, inner in inner_optimizers(part) if id(inner) not in known)


@dataclass(frozen=True, eq=False)
class _Inner:
    """An optimizer that a component holds as an attribute."""

    component: str
    path: str
    optimizer: torch.optim.Optimizer

    def slots(self) -> list[tuple[Any, torch.Tensor]]:
        """(key, tensor) of all its state so far."""
        entries = [entry for entry in self.optimizer.state.values() if isinstance(entry, dict)]
        return [pair for entry in entries for pair in entry.items() if isinstance(pair[1], torch.Tensor)]

    def parameters(self) -> list[torch.Tensor]:
        return [tensor for group in self.optimizer.param_groups for tensor in group["params"] if tensor.requires_grad]

    def parameters_message(self, left: list[torch.Tensor]) -> str:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in left[:SHOWN])
        more = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
        return (
            f"component {self.component!r} holds an optimizer, {self.path} ({class_name(self.optimizer)}), that trains "
            f"{len(left)} parameters which neither its state_dict() nor another component saves: {shapes}{more}. "
            "Register their module by keyword, or let state_dict() and load_state_dict() carry them"
        )

    def message(self) -> str:
        keys = ", ".join(dict.fromkeys(repr(slot) for slot, _ in self.slots()))
        return (
            f"component {self.component!r} holds another optimizer, {self.path} ({class_name(self.optimizer)}), whose "
            f"state ({keys}) its state_dict() leaves out: it is neither saved nor restored. Register it too, by "
            f"keyword: CheckpointManager(root, ..., inner={self.component}.{self.path}), or let state_dict() and "
            "load_state_dict() carry it"
        )


@dataclass(frozen=True)
class _Known:
    memory: set[int]
    copied: Mapping[int, set[tuple[int, ...]]]
    """For tensors that an object with a ``state_dict()`` holds, the shapes of what it saves."""
    own_form: set[tuple[int, ...]]
    """Shapes of what optimizers save in a form of their own: masters of parameters are saved as copies there."""

    def missing(self, tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        return [tensor for tensor in tensors if not self._has(tensor, tuple(tensor.shape))]

    def _has(self, tensor: torch.Tensor, shape: tuple[int, ...]) -> bool:
        if shape in self.own_form or shape in self.copied.get(id(tensor), ()):
            return True
        return _memory(tensor) in self.memory


def inner_optimizers(part: object) -> Iterator[tuple[str, torch.optim.Optimizer]]:
    """(path, optimizer) of those that an optimizer, or any object but modules and schedulers, has as attributes.

    Those whose groups and state are the outer one's are that one.
    """
    if isinstance(part, (nn.Module, ModuleComponent)) or is_scheduler(unwrapped(part)):
        return
    seen = {id(part), id(unwrapped(part))}
    waiting = [("", unwrapped(part))]
    while waiting:
        path, holder = waiting.pop()
        for name, value in attributes(holder).items():
            where = f"{path}.{name}" if path else name
            several = isinstance(value, (list, tuple)) and len(value) <= LARGEST_CONTAINER
            for place, item in [(f"{where}[{i}]", it) for i, it in enumerate(value)] if several else [(where, value)]:
                if isinstance(item, torch.optim.Optimizer) and id(item) not in seen:
                    inner = unwrapped(item)
                    seen |= {id(item), id(inner)}
                    yield place, inner
                    waiting.append((place, inner))


def _trained(optimizer: torch.optim.Optimizer, held: set[int]) -> list[tuple[int, list[torch.Tensor]]]:
    """By group, the parameters that are not held and that steps change, or have changed."""
    found = [
        (number, [item for item in group["params"] if id(item) not in held and _matters(optimizer, item)])
        for number, group in enumerate(optimizer.param_groups)
    ]
    return [(number, items) for number, items in found if items]


def _lists_of(optimizer: torch.optim.Optimizer) -> list[list[torch.Tensor]]:
    return [group["params"] for group in optimizer.param_groups]


def _matters(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> bool:
    return parameter.requires_grad or bool(optimizer.state.get(parameter))


def _described(optimizer: torch.optim.Optimizer, number: int, tensors: list[torch.Tensor]) -> Iterator[str]:
    """``group 1 'critic' [4, 4]`` for every tensor."""
    group = optimizer.param_groups[number]
    title = f"group {number}" + (f" {group['name']!r}" if isinstance(group.get("name"), str) else "")
    names = dict(zip(map(id, group["params"]), group.get("param_names") or (), strict=False))
    for tensor in tensors:
        name = f" {names[id(tensor)]!r}" if id(tensor) in names else ""
        yield f"{title}{name} {list(tensor.shape)}"


def _parameters_message(name: str, lines: list[str]) -> str:
    more = f" and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    count = f"{len(lines)} parameter{'' if len(lines) == 1 else 's'}"
    return (
        f"optimizer {name!r} trains {count} that no registered component holds, so that its saved state would be "
        f"restored beside fresh values: {', '.join(lines[:SHOWN])}{more}. Register the module or the tensor by keyword "
        "(CheckpointManager(root, ..., critic=critic, log_alpha=log_alpha)); where a parameter was replaced, make the "
        "optimizer after that"
    )


def _registered(part: object) -> Iterator[torch.Tensor]:
    """The tensors of a module, or in a container, that is a component."""
    module = part.module if isinstance(part, ModuleComponent) else part
    if isinstance(module, nn.Module):
        for each in module.modules():
            tables = (each._parameters.values(), each._buffers.values())  # noqa: SLF001
            yield from (tensor for table in tables for tensor in table if tensor is not None)
    elif isinstance(part, (torch.Tensor, *_CONTAINERS)):
        yield from (item for item in _reachable(part) if isinstance(item, torch.Tensor))


def _reachable(part: object, depth: int = DEPTH) -> Iterator[object]:
    """Tensors and optimizers among the attributes and items of an object, and of those below it."""
    if isinstance(part, (torch.Tensor, torch.optim.Optimizer)):
        yield part
    elif isinstance(part, nn.Module):
        yield from _registered(part)
    elif depth and isinstance(part, _CONTAINERS):
        items = part.values() if isinstance(part, dict) else part
        for item in items if len(part) <= LARGEST_CONTAINER else ():
            yield from _reachable(item, depth - 1)
    elif depth and not is_scheduler(part) and not isinstance(part, type):
        for item in attributes(part).values():
            yield from _reachable(item, depth - 1)


def _memory(tensor: torch.Tensor) -> int:
    return memory_of(local_part(tensor) if is_sharded(tensor) else tensor)


def _memory_of_captured(captured: Mapping[str, Captured]) -> set[int]:
    return {_memory(tensor) for part in captured.values() for tensor in part.tensors.values()}


def _optimizers_of_scheduler(scheduler: object) -> Iterator[torch.optim.Optimizer]:
    if not is_scheduler(scheduler):
        return
    held = attributes(scheduler)
    parts = held.get("_schedulers")
    for part in parts if isinstance(parts, (list, tuple)) else ():
        yield from _optimizers_of_scheduler(part)
    if isinstance(held.get("optimizer"), torch.optim.Optimizer):
        yield held["optimizer"]


def _overlap(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> bool:
    """Whether both are one, show one another, or train the same parameters."""
    ours, others = ({id(item) for group in each.param_groups for item in (group, *group["params"])} for each in (a, b))
    return bool(ours & others)
