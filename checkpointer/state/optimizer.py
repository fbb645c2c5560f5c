"""``torch.optim.Optimizer`` as a component.

State belongs to parameters, and parameters have names (through the registered modules), so a reordered parameter list
still gets the right moments. State is restored with the dtypes it was saved with, in place where that is possible.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from checkpointer.errors import CorruptCheckpointError, IncompatibleStateError
from checkpointer.index import Json
from checkpointer.state.codec import encode
from checkpointer.state.decoding import outline
from checkpointer.state.module_match import SHOWN
from checkpointer.state.names import parameter_names
from checkpointer.state.optimizer_misfits import has_usual_form, misfits
from checkpointer.state.optimizer_restore import OptimizerRestore, loads_plainly
from checkpointer.state.places import check_kind
from checkpointer.state.plan import Captured, RestoreOptions, RestorePlan, SavedState
from checkpointer.state.stateful import StatefulAdapter
from checkpointer.state.tensors import dtype_name


class OptimizerAdapter:
    """Captures and restores one optimizer; ``modules`` (by component name) name its parameters."""

    kind = "optimizer"

    def __init__(self, name: str, live: torch.optim.Optimizer, modules: Mapping[str, nn.Module]) -> None:
        self.name = name
        self.live = live
        self.modules = modules

    def capture(self) -> Captured:
        """Refer to the live tensors of ``state_dict()``.

        Meta, each a list of groups with an entry for each parameter: ``params`` (``"component.name"``, or null where
        no registered module holds it), ``shapes``, ``devices`` and ``dtypes``. Raises :class:`UnsupportedStateError`.
        """
        state = self.live.state_dict()
        tree, tensors = encode(state, self.name)
        if not has_usual_form(state):
            return Captured(self.kind, tree, tensors)
        groups = [group["params"] for group in self.live.param_groups]
        devices = {device: str(device) for device in {item.device for group in groups for item in group}}
        meta: dict[str, Json] = {
            "params": [list(names) for names in live_names(self.live, self.modules)],
            "shapes": [[list(parameter.shape) for parameter in group] for group in groups],
            "devices": [[devices[parameter.device] for parameter in group] for group in groups],
            "dtypes": [[dtype_name(parameter.dtype) for parameter in group] for group in groups],
        }
        return Captured(self.kind, tree, tensors, meta)

    def prepare(self, saved: SavedState, options: RestoreOptions) -> RestorePlan:
        """Map saved to live parameters. Raises :class:`IncompatibleStateError` with all mismatches."""
        check_kind(saved, self.kind, self.live)
        if "params" not in saved.component.meta:
            return _AsStateful(self.name, self.live).prepare(saved, options)
        try:
            names = live_names(self.live, self.modules)
            return OptimizerRestore(self.name, self.live, names, saved, options).plan()
        except (TypeError, KeyError, AttributeError) as error:
            raise CorruptCheckpointError(f"{self.name}: the state of this optimizer is not well formed") from error


class _AsStateful(StatefulAdapter):
    """An optimizer saved without the names of its parameters, for its ``load_state_dict`` to make sense of.

    It was imported, or its ``state_dict`` has a form of its own.
    """

    kind = "optimizer"

    def __init__(self, name: str, live: torch.optim.Optimizer) -> None:
        super().__init__(name, live)
        self.optimizer = live

    def prepare(self, saved: SavedState, options: RestoreOptions) -> RestorePlan:
        """As of :class:`StatefulAdapter`. What torch's own ``load_state_dict`` would refuse later is refused now."""
        if loads_plainly(self.optimizer):
            state, _ = outline(saved.component.tree, saved.component.tensors, place=self.name)
            problems = misfits(state, self.optimizer)
            if problems:
                raise IncompatibleStateError(
                    f"{self.name}: the checkpoint does not fit the live {type(self.optimizer).__qualname__}, nothing "
                    "was changed:" + "".join(f"\n  {problem}" for problem in problems[:SHOWN]) + "\nits parameters "
                    "have no names there (an imported file), so they must be the same in the same order; or restore "
                    "the other components alone: components=[...]"
                )
        return super().prepare(saved, options)


def live_names(optimizer: torch.optim.Optimizer, modules: Mapping[str, nn.Module]) -> list[list[str | None]]:
    """For each group, the qualified name of each parameter, or ``None``."""
    known = parameter_names(modules)
    found: list[list[str | None]] = []
    for group in optimizer.param_groups:
        given = group.get("param_names") or [None] * len(group["params"])
        pairs = zip(group["params"], given, strict=False)
        found.append([known.get(id(parameter), name) for parameter, name in pairs])
    return found
