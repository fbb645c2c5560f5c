"""One restore of one optimizer: destinations for its state, and putting it in place."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

from checkpointer.errors import CheckpointerError, CorruptCheckpointError, IncompatibleStateError
from checkpointer.format.index import TensorSpec
from checkpointer.state.classes import CLASS, class_change, class_name, is_of_torch, refused_class
from checkpointer.state.containers import merge, place_leaves
from checkpointer.state.destinations import Destinations
from checkpointer.state.dtensor import is_sharded
from checkpointer.state.modes import writing_to
from checkpointer.state.module.match import refusal
from checkpointer.state.optimizer.given import Given, saved_given
from checkpointer.state.optimizer.match import Matched, SavedParameter, match_parameters, saved_parameters
from checkpointer.state.optimizer.misfits import (
    DEFAULTS,
    foreign_settings,
    known_slots,
    missing_settings,
    slot_misfit,
    slots_agree,
)
from checkpointer.state.protocol import ComponentReport, RestoreOptions, RestorePlan, SavedState
from checkpointer.state.settings import changed_groups, group_key, settings_of_group, snapshot
from checkpointer.state.tensors import DTYPES, device_for, dtype_name
from checkpointer.state.tree.decode import Leaf, decode, skeleton

_HOOKS = (
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
_METHODS = ("state_dict", "load_state_dict", "__setstate__")
_GROUP_IDENTITY = ("params", "param_names")


class OptimizerRestore:
    """Restores a saved optimizer into ``live``, whose parameters have ``names``."""

    def __init__(
        self,
        name: str,
        live: torch.optim.Optimizer,
        names: list[list[str | None]],
        saved: SavedState,
        options: RestoreOptions,
        *,
        given: Given,
    ) -> None:
        self.name = name
        self.live = live
        self.options = options
        self.component = saved.component
        self.report = ComponentReport(name)
        outlined, self.keys = skeleton(self.component.tree, self.component.tensors, place=name)
        self.value = _check_form(name, outlined)
        self.given = given
        self.saved_given = saved_given(name, self.component.meta, len(self.value["param_groups"]))
        self.saved = saved_parameters(name, self.value["param_groups"], self.component.meta)
        self.match: Matched = match_parameters(name, self.saved, live, names, options=options, report=self.report)
        self.places = Destinations(name, self.component.tensors, stepped=True)
        self.direct = loads_plainly(live)
        self.casts: dict[str, torch.dtype] = {}
        self.before = [snapshot(group) for group in live.param_groups]
        """The live settings of each group before the restore."""
        self.replaced: list[str] = []
        """Which of them the checkpoint has replaced by others; known once it is applied."""
        self.foreign = False
        """Whether another class was saved: then only state of the very same form is restored."""
        self._check_class(saved)

    def _check_class(self, saved: SavedState) -> None:
        """Find out whether hyper-parameters and state are this class's, and keep the live ones where not."""
        groups, live, match = self.value["param_groups"], self.live, self.match
        change = class_change(saved, live, self.options)
        missing = missing_settings(groups, live) if self.direct else []
        if not change and missing and CLASS not in self.component.meta:
            change = f"saved by another class than {class_name(live)}: {missing[0]}"
        self.foreign = bool(change)
        if change:
            advice = refused_class(change, saved, live) if CLASS in self.component.meta else change
            kept = (
                f"strict=False keeps the live hyper-parameters, and takes only state of {class_name(live)}'s own form"
            )
            match.problems.insert(0, f"{advice}; {kept}")
            match.groups.clear()
            self.report.changed.append(f"hyper-parameters not restored: {change}")
        elif self.direct:
            found = [*missing, *foreign_settings(self.component.meta.get(DEFAULTS), groups, live)]
            match.problems += [] if is_of_torch(live) else found  # torch reads what its other versions wrote
            self.report.changed += found
        self._drop_misfits()

    def _drop_misfits(self) -> None:
        """Parameters whose saved state has other keys than this class's keep the state that they have."""
        known = known_slots(self.live)
        fitting: list[tuple[SavedParameter, torch.Tensor, str]] = []
        for row in self.match.pairs:
            parameter, tensor, label = row
            slots = self.value["state"].get(parameter.index)
            keys = slots.keys() if isinstance(slots, dict) else ()
            if self.foreign:
                misfit = "" if keys and slots_agree(known, self.live, tensor, keys) else "it is that of another class"
            else:  # a hook or an override may know how to load other keys
                misfit = slot_misfit(known, self.live, tensor, keys) if keys and self.direct else ""
            if not misfit:
                fitting.append(row)
            else:
                self.match.kept.append(tensor)
                self.report.unexpected += [f"{label}.{slot}" for slot in keys]
            if misfit and not self.foreign:
                self.match.problems.append(f"the saved state of {label!r} is not {class_name(self.live)}'s: {misfit}")
        self.match.pairs = fitting

    def plan(self) -> RestorePlan:
        """Choose destinations; nothing live is changed."""
        if self.options.strict and self.match.problems:
            raise IncompatibleStateError(refusal(self.name, self.match.problems))
        seen: set[int] = set()
        for parameter, tensor, label in self.match.pairs:
            slots = self.value["state"].get(parameter.index)
            if slots is not None:
                self._place_slots(parameter, tensor, label, slots, seen)
                self.report.restored.append(label)
        if self.direct:
            for number, source in self.match.groups.items():
                self._place_group(number, self.value["param_groups"][source], seen)
        for key in sorted(self.keys):
            self.places.allocate(key, self.options.map_location)
        self.places.announce()
        return RestorePlan(self.places.reads, self._apply, self.report, self.replaced)

    def _place_slots(
        self, parameter: SavedParameter, tensor: torch.Tensor, label: str, slots: Any, seen: set[int]
    ) -> None:
        """State of one parameter: into live state where it fits, else new, next to the live parameter."""
        reshaped = parameter.shape != tuple(tensor.shape)
        if self.direct and not reshaped and tensor in self.live.state:
            place_leaves(self.places, slots, self.live.state[tensor], seen)
        group = self.value["param_groups"][parameter.group]
        for slot, leaf in _leaves(slots):
            if leaf.key in self.places.reads:  # into live state, which keeps its dtype and its place
                continue
            if leaf.kind == "tensor" and leaf.spec is not None:
                if _follows(slot, leaf.spec, parameter, tensor) and not self._keeps(slot, leaf.spec, tensor):
                    self.casts[leaf.key] = tensor.dtype
                    change = f"{leaf.spec.dtype} -> {dtype_name(tensor.dtype)}"
                    self.report.cast.append((f"{label}.{slot}", change))
                if is_sharded(tensor) and leaf.spec.shape == tuple(tensor.shape):
                    self.places.allocate_like(leaf.key, tensor)
                self.places.allocate(leaf.key, _slot_device(slot, leaf.spec, parameter, tensor, group))

    def _keeps(self, slot: Any, spec: TensorSpec, tensor: torch.Tensor) -> bool:
        """Whether the live optimizer itself has this state in the saved dtype, whatever its parameter's is."""
        slots = self.live.state.get(tensor)
        live = slots.get(slot) if isinstance(slots, dict) else None
        return isinstance(live, torch.Tensor) and live.dtype == DTYPES[spec.dtype]

    def _place_group(self, number: int, saved: dict[str, Any], seen: set[int]) -> None:
        live = self.live.param_groups[number]
        for key, value in self._settings(number, saved):
            place_leaves(self.places, value, live.get(key), seen)
            self._report_form(number, key, value, live.get(key))

    def _settings(self, number: int, saved: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        """The saved settings of a live group, without those that ``ignore_keys`` names."""
        for key, value in saved.items():
            if key not in _GROUP_IDENTITY and not self.options.ignored(self.name, group_key(number, key)):
                yield key, value

    def _report_form(self, number: int, key: str, saved: Any, live: Any) -> None:
        """Numbers and tensors that hold one are the same to a step, and not to who holds or compiled the tensor."""
        if isinstance(live, torch.Tensor) and _is_number(saved):
            now = "and is filled into the live tensor" if _takes_number(live) else "and replaces the live tensor"
            self.report.changed.append(f"group {number}: {key!r} was saved as a number {now}")
        elif _is_number(live) and isinstance(saved, Leaf) and saved.kind == "tensor":
            self.report.changed.append(f"group {number}: {key!r} was saved as a tensor, and the number becomes one")

    # Applying

    def _apply(self) -> None:
        state = decode(self.component.tree, self._tensors(), place=self.name, specs=self.component.tensors)
        with torch.no_grad():
            slots = self._slots(state["state"])
            if self.direct:
                self._put_state(slots, state["state"])
                self._put_groups(state["param_groups"])
            else:
                self._load(slots, state)
        rows = [
            (number, state["param_groups"][source], self.before[number]) for number, source in self.match.groups.items()
        ]
        sources = self.match.groups
        changes = changed_groups(
            self.name, rows, self.options, lambda number: (self.saved_given[sources[number]], self.given.of(number))
        )
        for number, source in sources.items():
            saved = {**settings_of_group(state["param_groups"][source]), **self.saved_given[source]}
            self.given.restored(self.name, number, saved, self.options)
        self.replaced += changes.replaced
        self.report.changed += changes.all

    def _tensors(self) -> dict[str, torch.Tensor]:
        """What was read; state that follows its parameter to another dtype in that."""
        read = self.places.tensors()
        return {**read, **{key: read[key].to(dtype) for key, dtype in self.casts.items()}}

    def _slots(self, state: dict[Any, Any]) -> list[tuple[torch.Tensor, Any]]:
        """(live parameter, its saved state) in the order of the checkpoint, adapted where it was reshaped."""
        order = {index: place for place, index in enumerate(state)}
        found = [
            (order[parameter.index], tensor, self._adapted(parameter, tensor, label, state[parameter.index]))
            for parameter, tensor, label in self.match.pairs
            if parameter.index in state
        ]
        return [(tensor, slots) for _, tensor, slots in sorted(found, key=lambda row: row[0])]

    def _adapted(self, parameter: SavedParameter, tensor: torch.Tensor, label: str, slots: Any) -> Any:
        shape = tuple(tensor.shape)
        if parameter.shape == shape or self.options.adapt is None or not isinstance(slots, dict):
            return slots
        made = dict(slots)
        for slot, value in slots.items():
            if not isinstance(value, torch.Tensor) or tuple(value.shape) != parameter.shape:
                continue
            target = torch.zeros(shape, dtype=value.dtype, device=value.device)
            adapted = self.options.adapt(f"{label}.{slot}", value, target)
            if not isinstance(adapted, torch.Tensor) or tuple(adapted.shape) != shape:
                raise IncompatibleStateError(f"{self.name}: adapt for '{label}.{slot}' must give shape {list(shape)}")
            made[slot] = target.copy_(adapted)  # a slice would keep the strides and the memory of the whole
        return made

    def _put_state(self, slots: list[tuple[torch.Tensor, Any]], saved: dict[Any, Any]) -> None:
        live, seen = self.live.state, set[int]()
        kept = {tensor: live[tensor] for tensor in self.match.kept if tensor in live}
        if not self.options.strict:
            kept.update({key: value for key, value in live.items() if not isinstance(key, torch.Tensor)})
        found = {key: merge(value, live.get(key), seen) for key, value in self._in_order(slots, saved)}
        live.clear()
        live.update({**kept, **found})

    def _in_order(self, slots: list[tuple[Any, Any]], saved: dict[Any, Any]) -> list[tuple[Any, Any]]:
        """State of parameters, and that of everything else, in the order of the checkpoint."""
        indices = self._indices()
        others = {} if self.foreign else {key: value for key, value in saved.items() if key not in indices}
        rest = [(place, (key, others[key])) for place, key in enumerate(saved) if key in others]
        restored = {parameter.index for parameter, _, _ in self.match.pairs}
        order = [place for place, key in enumerate(saved) if key in restored]
        rows = [*zip(order, slots, strict=True), *rest]
        return [row for _, row in sorted(rows, key=lambda row: row[0])]

    def _indices(self) -> set[int]:
        return {parameter.index for group in self.saved for parameter in group}

    def _put_groups(self, saved: list[dict[str, Any]]) -> None:
        seen: set[int] = set()
        for number, source in self.match.groups.items():
            group = self.live.param_groups[number]
            for key, value in self._settings(number, saved[source]):
                group[key] = merge(_filled(value, group.get(key)), group.get(key), seen)

    def _load(self, slots: list[tuple[torch.Tensor, Any]], saved: dict[str, Any]) -> None:
        """Through ``load_state_dict``, with hooks and overrides; then with the dtypes that were saved."""
        groups, numbers = self._live_groups(saved["param_groups"])
        kept = {numbers[id(tensor)] for tensor in self.match.kept}
        state = {index: value for index, value in self.live.state_dict()["state"].items() if index in kept}
        numbered = [(numbers[id(tensor)], value) for tensor, value in slots]
        state.update(self._in_order(numbered, saved["state"]))
        before = [_tensors_of(group) for group in self.live.param_groups]
        try:
            self.live.load_state_dict({"state": state, "param_groups": groups})
        except CheckpointerError:
            raise
        except Exception as error:
            kind = type(self.live).__qualname__
            raise IncompatibleStateError(f"{self.name}: {kind}.load_state_dict refused the state: {error!r}") from error
        for tensor, value in slots:
            if tensor in self.live.state:
                self.live.state[tensor] = _exactly(self.live.state[tensor], value)
        for group, tensors in zip(self.live.param_groups, before, strict=True):
            _refill(group, tensors)

    def _live_groups(self, saved: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[int, int]]:
        """Groups in the live order with saved hyper-parameters, and the index of each live parameter."""
        numbers: dict[int, int] = {}
        groups: list[dict[str, Any]] = []
        for number, live in enumerate(self.live.param_groups):
            indices = [numbers.setdefault(id(tensor), len(numbers)) for tensor in live["params"]]
            source = saved[self.match.groups[number]] if number in self.match.groups else {}
            groups.append({**live, **dict(self._settings(number, source)), "params": indices})
        return groups, numbers


def loads_plainly(optimizer: torch.optim.Optimizer) -> bool:
    """Whether ``load_state_dict`` is torch's own, without hooks."""
    if any(getattr(optimizer, hooks, None) for hooks in _HOOKS):
        return False
    owners = (getattr(getattr(type(optimizer), method, None), "__module__", "torch.optim.") for method in _METHODS)
    return all(str(owner).startswith("torch.optim.") for owner in owners) and not set(_METHODS) & set(vars(optimizer))


def _check_form(name: str, value: Any) -> dict[str, Any]:
    form = isinstance(value, dict) and set(value) == {"state", "param_groups"}
    if not form or not isinstance(value["state"], dict) or type(value["param_groups"]) is not list:
        raise CorruptCheckpointError(f"{name}: the state of this optimizer is not well formed")
    if not all(isinstance(group, dict) and type(group.get("params")) is list for group in value["param_groups"]):
        raise CorruptCheckpointError(f"{name}: the parameter groups of this optimizer are not well formed")
    return dict(value)


def _leaves(value: Any, slot: Any = None) -> list[tuple[Any, Leaf]]:
    """(slot, leaf) for every leaf in the state of one parameter."""
    if isinstance(value, Leaf):
        return [(slot, value)]
    if isinstance(value, dict):
        return [pair for key, item in value.items() for pair in _leaves(item, key)]
    if isinstance(value, (list, tuple)):
        return [pair for item in value for pair in _leaves(item, slot)]
    return []


def _follows(slot: Any, spec: TensorSpec, saved: SavedParameter, live: torch.Tensor) -> bool:
    """Whether state had its parameter's dtype, which is another one here, because it was the parameter's.

    What was kept in another dtype on purpose stays in that. Counters have a dtype of their own, which only happens to
    be the parameter's: ``step``, and numbers that are kept as tensors without dimensions (NAdam's ``mu_product``).
    """
    if saved.dtype is None or saved.dtype == live.dtype or DTYPES[spec.dtype] != saved.dtype or slot == "step":
        return False
    same_kind = live.dtype.is_floating_point == saved.dtype.is_floating_point
    return same_kind and (len(spec.shape) > 0 or not saved.shape)


def _slot_device(
    slot: Any, spec: TensorSpec, saved: SavedParameter, live: torch.Tensor, group: dict[str, Any]
) -> torch.device | None:
    """Next to the live parameter, if it was next to the saved one; else where it was.

    ``step`` of a CPU parameter is not evidence: it stays on the CPU unless torch wants it on the parameter's device.
    """
    if live.device.type == "meta":
        return None
    where = _device(spec.device)
    if slot == "step" and where.type == "cpu":
        return live.device if group.get("capturable") or group.get("fused") else where
    return live.device if where.type == saved.device.type else device_for(spec, None)


_device = functools.cache(torch.device)


def _exactly(loaded: Any, saved: Any) -> Any:
    """What was loaded, with the saved tensors where a dtype was cast."""
    if isinstance(loaded, torch.Tensor) and isinstance(saved, torch.Tensor):
        return saved if loaded.shape == saved.shape and loaded.dtype != saved.dtype else loaded
    if isinstance(loaded, dict) and isinstance(saved, dict):
        for key in loaded.keys() & saved.keys():
            loaded[key] = _exactly(loaded[key], saved[key])
    elif type(loaded) is type(saved) and isinstance(loaded, (list, tuple)) and len(loaded) == len(saved):
        items = [_exactly(a, b) for a, b in zip(loaded, saved, strict=True)]
        if isinstance(loaded, tuple):
            return tuple(items)
        loaded[:] = items
    return loaded


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _takes_number(tensor: torch.Tensor) -> bool:
    return tensor.numel() == 1 and tensor.is_floating_point()


def _filled(value: Any, live: Any) -> Any:
    """The live tensor of a hyper-parameter with a number that was saved in it, or else the value itself."""
    if not isinstance(live, torch.Tensor) or not _is_number(value) or not _takes_number(live):
        return value
    with writing_to(live):
        live.fill_(value)
    return live


def _tensors_of(group: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in group.items() if isinstance(value, torch.Tensor)}


def _refill(group: dict[str, Any], before: dict[str, torch.Tensor]) -> None:
    """Put tensor hyper-parameters back into the tensors they were in: others may hold them."""
    for key, tensor in before.items():
        value = group[key] = _filled(group.get(key), tensor)
        if not isinstance(value, torch.Tensor) or (value.shape, value.dtype) != (tensor.shape, tensor.dtype):
            continue
        if value is not tensor:
            with writing_to(tensor):
                tensor.copy_(value)
            group[key] = tensor
