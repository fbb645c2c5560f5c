"""Any object with ``state_dict()`` and ``load_state_dict()``: schedulers, gradient scalers, data loaders, your own."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from checkpointer.errors import CheckpointerError, IncompatibleStateError
from checkpointer.state.codec import encode
from checkpointer.state.decoding import decode, outline
from checkpointer.state.places import Places, check_kind
from checkpointer.state.plan import Captured, ComponentReport, RestoreOptions, RestorePlan, SavedState


@runtime_checkable
class Stateful(Protocol):
    """The protocol of ``torch.distributed.checkpoint``: state out, state in."""

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
        tree, tensors = encode(self.live.state_dict(), self.name)
        return Captured(self.kind, tree, tensors)

    def prepare(self, saved: SavedState, options: RestoreOptions) -> RestorePlan:
        """Check the tree and allocate its tensors; ``load_state_dict`` is called by ``apply``.

        An object that has ``check_state_dict(state)`` may refuse here, before anything is changed. Where ``state`` has
        a tensor or an array, it is given a placeholder: the data has not been read yet. One that would set the global
        random generators later on, and has ``leave_rng()``, is told so where they are not to be restored.
        """
        check_kind(saved, self.kind, self.live)
        component = saved.component
        value, keys = outline(component.tree, component.tensors, place=self.name)
        check = getattr(self.live, "check_state_dict", None)
        if callable(check):
            check(value)
        places = Places(self.name, component.tensors, options.map_location)
        places.allocate_all(keys)
        restored = [str(key) for key in value] if isinstance(value, dict) else [self.name]

        def apply() -> None:
            self._load(decode(component.tree, places.reads, place=self.name, specs=component.tensors))
            leave_rng = getattr(self.live, "leave_rng", None)
            if callable(leave_rng) and not options.rng:
                leave_rng()

        return RestorePlan(places.reads, apply, ComponentReport(self.name, restored))

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
