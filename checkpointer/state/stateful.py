"""Any object with ``state_dict()`` and ``load_state_dict()``: schedulers, gradient scalers, data loaders, your own."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from checkpointer.errors import CheckpointerError, IncompatibleStateError
from checkpointer.state import annealing
from checkpointer.state.classes import CLASS, class_change, class_name, is_scheduler, refused_class, unwrapped
from checkpointer.state.destinations import Destinations, check_kind
from checkpointer.state.protocol import Captured, ComponentReport, RestoreOptions, RestorePlan, SavedState
from checkpointer.state.settings import Changes, changed_state, names_any, setting_names, snapshot, with_kept
from checkpointer.state.tree.decode import decode, skeleton
from checkpointer.state.tree.encode import encode
from checkpointer.system import messages


@runtime_checkable
class Stateful(Protocol):
    """The protocol of ``torch.distributed.checkpoint``: state out, state in."""

    __module__: str = "checkpointer"

    def state_dict(self) -> dict[str, Any]:
        """The state; it may hold live tensors."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Take over a state that ``state_dict`` returned once. The values belong to the object from then on."""


class StatefulAdapter:
    """Stores ``state_dict()`` and hands it back, decoded fresh, to ``load_state_dict()``."""

    kind = "stateful"

    def __init__(self, name: str, live: Stateful) -> None:
        self.name = name
        self.live = live

    def capture(self) -> Captured:
        """Encode ``state_dict()``. Raises :class:`UnsupportedStateError`."""
        tree, tensors = encode(annealing.named(self.live, self.live.state_dict()), self.name)
        return Captured(self.kind, tree, tensors, {CLASS: class_name(self.live)})

    @property
    def _class_decides(self) -> bool:
        """Whether the state of another class means something else. Schedulers take over whatever they are given."""
        return is_scheduler(unwrapped(self.live))

    def prepare(self, saved: SavedState, options: RestoreOptions) -> RestorePlan:
        """Check the tree and allocate its tensors; ``load_state_dict`` is called by ``apply``.

        An object that has ``check_state_dict(state)`` may refuse here, before anything is changed. Where ``state`` has
        a tensor or an array, it is given a placeholder: the data has not been read yet. One that would set the global
        random generators later on, and has ``leave_rng()``, is told so where they are not to be restored.

        The state of another class is refused for schedulers, or left out where ``strict`` is off. For other objects
        it is their ``load_state_dict`` that judges: it is handed over, with a warning.
        """
        check_kind(saved, self.kind, self.live)
        report = ComponentReport(self.name)
        if not self._check_class(saved, options, report):
            return RestorePlan({}, nothing, report)
        component = saved.component
        value, keys = skeleton(component.tree, component.tensors, place=self.name)
        keeps = names_any(value, self.name, options)
        check = getattr(self.live, "check_state_dict", None)
        if callable(check):
            check(with_kept(value, self.live.state_dict(), self.name, options) if keeps else value)
        places = Destinations(self.name, component.tensors, options.map_location)
        places.allocate_all(keys)
        report.restored += [str(key) for key in value] if isinstance(value, dict) else [self.name]

        plan = RestorePlan(places.reads, nothing, report)

        def apply() -> None:
            state = decode(component.tree, places.reads, place=self.name, specs=component.tensors)
            before = self._settings()
            changes = Changes() if before is None else self._changes(state, before, options)
            self._load(with_kept(state, self.live.state_dict(), self.name, options) if keeps else state)
            plan.settings += changes.replaced
            report.changed += changes.all
            leave_rng = getattr(self.live, "leave_rng", None)
            if callable(leave_rng) and not options.rng:
                leave_rng()

        plan.apply = apply
        return plan

    def _settings(self) -> Any:
        """What settings can be compared with, as it is now; ``None`` where nobody can tell settings from progress."""
        return None if setting_names(self.live) is None else snapshot(self.live.state_dict())

    def _changes(self, saved: Any, before: Any, options: RestoreOptions) -> Changes:
        return changed_state(self.name, self.live, saved, before, options)

    def _check_class(self, saved: SavedState, options: RestoreOptions, report: ComponentReport) -> bool:
        """Whether the state is for this object. Raises :class:`IncompatibleStateError` where it is not, if strict."""
        change = class_change(saved, self.live, options)
        if change and self._class_decides:
            if options.strict:
                raise IncompatibleStateError(
                    f"{self.name}: {refused_class(change, saved, self.live)}; or restore with strict=False, which "
                    f"leaves {self.name!r} as it is. Nothing was changed"
                )
            report.changed.append(f"not restored: {change}")
            return False
        if change:
            report.changed.append(change)
        if change and options.strict:
            messages.warn(
                f"component {self.name!r}: {change}, whose load_state_dict takes over that state. If that is not "
                f"meant, restore the other components alone (components=[...]), or register the class that was saved",
            )
        return True

    def _load(self, state: Any) -> None:
        try:
            self.live.load_state_dict(state)
        except CheckpointerError:
            raise
        except Exception as error:
            kind = type(self.live).__qualname__
            raise IncompatibleStateError(
                f"{self.name}: {kind}.load_state_dict refused the saved state: {error!r}"
            ) from error
        annealing.bind(self.live)


def nothing() -> None:
    """Applies a plan that restores nothing."""
