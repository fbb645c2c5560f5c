"""``torch.optim.Optimizer`` as a component.

State belongs to parameters, and parameters have names (through the registered modules), so a reordered parameter list
still gets the right moments. State is restored with the dtypes it was saved with, in place where that is possible.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from checkpointer.errors import CorruptCheckpointError, IncompatibleStateError
from checkpointer.format.index import Json
from checkpointer.state.classes import CLASS, class_name
from checkpointer.state.destinations import check_kind
from checkpointer.state.dtensor import address
from checkpointer.state.module.match import SHOWN
from checkpointer.state.module.names import parameter_names
from checkpointer.state.optimizer.given import Given
from checkpointer.state.optimizer.misfits import DEFAULTS, has_usual_form, misfits, settings_of
from checkpointer.state.optimizer.restore import OptimizerRestore, loads_plainly
from checkpointer.state.protocol import Captured, ComponentReport, RestoreOptions, RestorePlan, SavedState
from checkpointer.state.settings import Changes, changed_groups, snapshot
from checkpointer.state.stateful import StatefulAdapter, nothing
from checkpointer.state.tensors import dtype_name
from checkpointer.state.tree.decode import skeleton
from checkpointer.state.tree.encode import encode, is_simple

STATE = "state."
"""How the keys of tensors begin that belong to parameters; the others are hyper-parameters."""


class OptimizerAdapter:
    """Captures and restores one optimizer; ``modules`` (by component name) name its parameters."""

    kind = "optimizer"

    def __init__(self, name: str, live: torch.optim.Optimizer, modules: Mapping[str, nn.Module]) -> None:
        self.name = name
        self.live = live
        self.modules = modules
        self._known: _KnownState | None = None
        self._given = Given(live)

    def capture(self) -> Captured:
        """Refer to the live tensors of ``state_dict()``.

        Meta, each a list of groups with an entry for each parameter: ``params`` (``"component.name"``, or null where
        no registered module holds it), ``shapes``, ``devices`` and ``dtypes``. Also ``class``, the name of its class,
        and ``defaults``, the names of the hyper-parameters that the class sets. Raises :class:`UnsupportedStateError`.
        """
        state = self.live.state_dict()
        if not has_usual_form(state):
            tree, tensors = encode(state, self.name)
            return Captured(self.kind, tree, tensors, {CLASS: class_name(self.live)})
        tree, tensors = self._encode(state)
        groups = [group["params"] for group in self.live.param_groups]
        devices = {device: str(device) for device in {item.device for group in groups for item in group}}
        meta: dict[str, Json] = {
            "params": [list(names) for names in live_names(self.live, self.modules)],
            "shapes": [[list(parameter.shape) for parameter in group] for group in groups],
            "devices": [[devices[parameter.device] for parameter in group] for group in groups],
            "dtypes": [[dtype_name(parameter.dtype) for parameter in group] for group in groups],
            CLASS: class_name(self.live),
            DEFAULTS: [str(key) for key in settings_of(self.live)],
            **self._given.meta(),
        }
        trainable = frozenset(key for key in tensors if key.startswith(STATE))
        return Captured(self.kind, tree, tensors, meta, trainable=trainable)

    def _encode(self, state: dict[str, Any]) -> tuple[Json, dict[str, torch.Tensor]]:
        """The tree and the tensors of ``state``; the part of the tree that never changes is made once."""
        if self._known is not None:
            tensors = self._known.tensors_in(state["state"])
            if tensors is not None:
                groups, others = encode({"param_groups": state["param_groups"]}, self.name)
                assert isinstance(groups, dict)
                if not others:
                    return {"state": self._known.node, **groups}, tensors
        tree, tensors = encode(state, self.name)
        assert isinstance(tree, dict)
        self._known = _KnownState.of(state["state"], tree["state"])
        return tree if self._known is None else {**tree, "state": self._known.node}, tensors

    def prepare(self, saved: SavedState, options: RestoreOptions) -> RestorePlan:
        """Map saved to live parameters. Raises :class:`IncompatibleStateError` with all mismatches."""
        check_kind(saved, self.kind, self.live)
        if "params" not in saved.component.meta:
            return _AsStateful(self.name, self.live).prepare(saved, options)
        try:
            names = live_names(self.live, self.modules)
            return OptimizerRestore(self.name, self.live, names, saved, options, given=self._given).plan()
        except (TypeError, KeyError, AttributeError) as error:
            raise CorruptCheckpointError(f"{self.name}: the state of this optimizer is not well formed") from error


@dataclass(frozen=True)
class _KnownState:
    """The form that the state of an optimizer keeps from save to save: plain tensors, each in memory of its own."""

    node: Json
    """Its tree: one word, for the keys of the tensors say which slot of which parameter each is."""
    entries: dict[Any, dict[str, str]]
    """For each parameter's index: the key that the tensor of each slot is stored under."""

    @classmethod
    def of(cls, state: dict[Any, Any], node: Json) -> _KnownState | None:
        """``None`` where the state has another form."""
        entries: dict[Any, dict[str, str]] = {}
        for index, entry in state.items():
            if type(index) is not int or type(entry) is not dict or any(type(slot) is not str for slot in entry):
                return None
            entries[index] = {slot: f"state.{index}.{slot}" for slot in entry}
        nodes = [[index, {slot: {"$tensor": key} for slot, key in keys.items()}] for index, keys in entries.items()]
        if node != {"$dict": nodes} or not all(entries.values()):
            return None
        return cls({"$slots": STATE}, entries)

    def tensors_in(self, state: dict[Any, Any]) -> dict[str, torch.Tensor] | None:
        """The tensors of ``state``, by key; ``None`` where it does not have this form any more."""
        if state.keys() != self.entries.keys():
            return None
        found: dict[str, torch.Tensor] = {}
        memory: set[int] = set()
        for index, keys in self.entries.items():
            entry = state[index]
            if type(entry) is not dict or list(entry) != list(keys):
                return None
            for slot, key in keys.items():
                tensor = entry[slot]
                if not isinstance(tensor, torch.Tensor) or not is_simple(tensor):
                    return None
                memory.add(address(tensor))
                found[key] = tensor
        alone = len(memory) == len(found)
        return found if alone and list(state) == list(self.entries) else None


class _AsStateful(StatefulAdapter):
    """An optimizer saved without the names of its parameters, for its ``load_state_dict`` to make sense of.

    It was imported, or its ``state_dict`` has a form of its own.
    """

    kind = "optimizer"

    def __init__(self, name: str, live: torch.optim.Optimizer) -> None:
        super().__init__(name, live)
        self.optimizer = live

    @property
    def _class_decides(self) -> bool:
        return True

    def prepare(self, saved: SavedState, options: RestoreOptions) -> RestorePlan:
        """As of :class:`StatefulAdapter`. What torch's own ``load_state_dict`` would refuse later is refused now."""
        report = ComponentReport(self.name)
        if not self._check_class(saved, options, report):
            return RestorePlan({}, nothing, report)
        if loads_plainly(self.optimizer):
            state, _ = skeleton(saved.component.tree, saved.component.tensors, place=self.name)
            problems = misfits(state, self.optimizer)
            if problems:
                raise IncompatibleStateError(
                    f"{self.name}: the checkpoint does not fit the live {type(self.optimizer).__qualname__}, nothing "
                    "was changed:" + "".join(f"\n  {problem}" for problem in problems[:SHOWN]) + "\nits parameters "
                    "have no names there (an imported file), so they must be the same in the same order; or restore "
                    "the other components alone: components=[...]"
                )
        return super().prepare(saved, options)

    def _settings(self) -> Any:
        return [snapshot(group) for group in self.optimizer.param_groups]

    def _changes(self, saved: Any, before: Any, options: RestoreOptions) -> Changes:
        if not has_usual_form(saved) or not all(isinstance(group, dict) for group in saved["param_groups"]):
            return Changes()
        pairs = zip(saved["param_groups"], before, strict=False)
        return changed_groups(self.name, [(number, *pair) for number, pair in enumerate(pairs)], options)


def live_names(optimizer: torch.optim.Optimizer, modules: Mapping[str, nn.Module]) -> list[list[str | None]]:
    """For each group, the qualified name of each parameter, or ``None``."""
    known = parameter_names(modules)
    found: list[list[str | None]] = []
    for group in optimizer.param_groups:
        given = group.get("param_names") or [None] * len(group["params"])
        pairs = zip(group["params"], given, strict=False)
        found.append([known.get(id(parameter), name) for parameter, name in pairs])
    return found
