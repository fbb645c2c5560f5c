"""Random number generators: one generator as a component, and the state of all global ones."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from checkpointer.errors import CorruptCheckpointError, IncompatibleStateError, UnsupportedStateError
from checkpointer.state.destinations import Destinations, check_kind
from checkpointer.state.protocol import Captured, ComponentReport, RestoreOptions, RestorePlan, SavedState
from checkpointer.state.tree.decode import Leaf, decode, skeleton
from checkpointer.state.tree.encode import encode

GENERATORS: tuple[type, ...] = (
    torch.Generator,
    np.random.Generator,
    np.random.RandomState,
    np.random.BitGenerator,
    random.Random,
)


class GeneratorAdapter:
    """One ``torch.Generator``, numpy ``Generator``, ``RandomState`` or ``BitGenerator``, or ``random.Random``."""

    kind = "generator"

    def __init__(self, name: str, live: Any) -> None:
        self.name = name
        self.live = live

    def capture(self) -> Captured:
        """Copy the state (small: 5 KiB at most)."""
        tree, tensors = encode(generator_state(self.name, self.live), self.name)
        return Captured(self.kind, tree, tensors)

    def prepare(self, saved: SavedState, options: RestoreOptions) -> RestorePlan:  # noqa: ARG002 - none applies
        """Check that the saved state is one of the same algorithm."""
        check_kind(saved, self.kind, self.live)
        component = saved.component
        value, keys = skeleton(component.tree, component.tensors, place=self.name)
        _check_like(self.name, value, generator_state(self.name, self.live))
        places = Destinations(self.name, component.tensors, "cpu")
        places.allocate_all(keys)

        def apply() -> None:
            state = decode(component.tree, places.reads, place=self.name)["state"]
            set_generator_state(self.name, self.live, state)

        return RestorePlan(places.reads, apply, ComponentReport(self.name, [self.name]))


def generator_state(name: str, live: Any) -> dict[str, Any]:
    """A copy of a generator's state. Raises :class:`UnsupportedStateError` for generators that have none."""
    if isinstance(live, torch.Generator):
        return {"type": f"torch.{live.device.type}", "state": live.get_state()}
    if isinstance(live, np.random.RandomState):
        return {"type": "numpy.RandomState", "state": live.get_state(legacy=False)}
    if isinstance(live, np.random.Generator):
        return {"type": "numpy", "state": live.bit_generator.state}
    if isinstance(live, np.random.BitGenerator):
        return {"type": "numpy", "state": live.state}
    try:
        return {"type": "random.Random", "state": live.getstate()}
    except NotImplementedError as error:
        raise UnsupportedStateError(f"{name}: {type(live).__qualname__} has no state that could be stored") from error


def set_generator_state(name: str, live: Any, state: Any) -> None:
    """The inverse of :func:`generator_state`. Raises :class:`CorruptCheckpointError` for what the generator refuses."""
    try:
        if isinstance(live, (torch.Generator, np.random.RandomState)):
            live.set_state(state)
        elif isinstance(live, np.random.Generator):
            live.bit_generator.state = state
        elif isinstance(live, np.random.BitGenerator):
            live.state = state
        else:
            live.setstate(state)
    except (RuntimeError, ValueError, TypeError, OverflowError, KeyError) as error:
        raise CorruptCheckpointError(f"{name}: not the state of a random generator: {error}") from error


#: Positions in a generator's buffer: numpy does not check them, and reads memory beyond the buffer.
_POSITIONS = {"pos": 624, "buffer_pos": 4}


def _check_like(place: str, saved: Any, live: Any) -> None:
    """Raise unless ``saved`` is built like ``live``: the same types, keys, lengths, array shapes and labels."""
    if not _is_like(saved, live):
        raise IncompatibleStateError(f"{place}: the saved state is not that of the live kind of random generator")
    if isinstance(live, dict):
        for key in live:
            _check_like(f"{place}[{key!r}]", saved[key], live[key])
            if key in _POSITIONS and not 0 <= saved[key] <= _POSITIONS[key]:
                raise CorruptCheckpointError(f"{place}[{key!r}]: {saved[key]} is out of range")
    elif isinstance(live, (tuple, list)):
        for index, (saved_item, live_item) in enumerate(zip(saved, live, strict=True)):
            _check_like(f"{place}[{index}]", saved_item, live_item)


def _is_like(saved: Any, live: Any) -> bool:
    if isinstance(live, (torch.Tensor, np.ndarray)):
        spec = saved.spec if isinstance(saved, Leaf) else None
        return spec is not None and (spec.shape, spec.dtype) == (tuple(live.shape), str(live.dtype).rpartition(".")[2])
    if isinstance(live, dict):
        return type(saved) is dict and set(saved) == set(live)
    if isinstance(live, (tuple, list)):
        return type(saved) is type(live) and len(saved) == len(live)
    if isinstance(live, str):
        return bool(saved == live)
    if live is None or isinstance(live, float):  # Python's spare Gaussian number is there or not
        return saved is None or isinstance(saved, float)
    return isinstance(live, type(saved)) and not isinstance(saved, Leaf)


class RngState:
    """The global generators of this process: Python, NumPy, torch CPU and every accelerator in use. An adapter."""

    kind = "rng"

    def __init__(self, name: str = "rng") -> None:
        self.name = name

    def state(self) -> dict[str, Any]:
        """Copy all states now (a few KiB for each generator)."""
        return {
            "python": random.getstate(),
            "numpy": np.random.get_state(legacy=False),  # noqa: NPY002 - the global one is what is saved
            "torch": torch.get_rng_state(),
            "devices": {name: get() for name, get in _devices(in_use=True).items()},
        }

    def capture(self) -> Captured:
        """The states, encoded."""
        tree, tensors = encode(self.state(), self.name)
        return Captured(self.kind, tree, tensors)

    def prepare(self, saved: SavedState, options: RestoreOptions) -> RestorePlan:  # noqa: ARG002 - none applies
        """Check all states; ``apply`` sets them. A different number of devices is reported, not refused."""
        check_kind(saved, self.kind, self)
        component = saved.component
        value, keys = skeleton(component.tree, component.tensors, place=self.name)
        devices = self._check(value)
        places = Destinations(self.name, component.tensors, "cpu")
        places.allocate_all(keys)
        report = ComponentReport(self.name, ["python", "numpy", "torch"])
        counts = {name: self._count(name, len(states), report) for name, states in devices.items()}
        report.changed += [
            f"{name} generators are in use here and were not when saved: left as they are"
            for name in _devices(in_use=True)
            if name not in devices
        ]

        def apply() -> None:
            self._set(decode(component.tree, places.reads, place=self.name), counts)

        return RestorePlan(places.reads, apply, report)

    def _check(self, value: Any) -> dict[str, list[Leaf]]:
        if type(value) is not dict or set(value) != {"python", "numpy", "torch", "devices"}:
            raise CorruptCheckpointError(f"{self.name}: not the state of the global random generators")
        _check_like(f"{self.name}.python", value["python"], random.getstate())
        _check_like(f"{self.name}.numpy", value["numpy"], np.random.get_state(legacy=False))  # noqa: NPY002
        _check_like(f"{self.name}.torch", value["torch"], torch.get_rng_state())
        devices = value["devices"]
        if type(devices) is not dict or not all(_is_states(states) for states in devices.values()):
            raise CorruptCheckpointError(f"{self.name}: not the states of device generators")
        return devices

    def _count(self, name: str, saved: int, report: ComponentReport) -> int:
        """How many of the saved device states can be set here."""
        setter = _SETTERS.get(name)
        live = _device_count(name) if setter is not None else 0
        if live != saved:
            report.changed.append(f"{saved} {name} generators were saved, {live} are here: the first are restored")
        count = min(saved, live)
        report.restored += [f"{name}:{index}" for index in range(count)]
        return count

    def _set(self, state: dict[str, Any], counts: dict[str, int]) -> None:
        """Set all states, after generators of our own have accepted them."""
        set_generator_state(f"{self.name}.python", random.Random(), state["python"])  # noqa: S311 - not for secrets
        set_generator_state(f"{self.name}.numpy", np.random.RandomState(), state["numpy"])
        set_generator_state(f"{self.name}.torch", torch.Generator(), state["torch"])
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])  # noqa: NPY002
        torch.set_rng_state(state["torch"])
        for name, count in counts.items():
            for index in range(count):
                _SETTERS[name](state["devices"][name][index], index)


def _is_states(states: Any) -> bool:
    return type(states) is list and all(
        isinstance(state, Leaf) and state.spec is not None and state.spec.dtype == "uint8" for state in states
    )


def _devices(*, in_use: bool) -> dict[str, Callable[[], list[torch.Tensor]]]:
    """For each accelerator whose generators exist: how to get the states of all its devices.

    Asking an accelerator that was not used yet would initialize it, so ``in_use`` leaves those out.
    """
    found: dict[str, Callable[[], list[torch.Tensor]]] = {}
    if torch.cuda.is_available() and (torch.cuda.is_initialized() or not in_use):
        found["cuda"] = torch.cuda.get_rng_state_all
    if hasattr(torch, "xpu") and torch.xpu.is_available() and (torch.xpu.is_initialized() or not in_use):
        found["xpu"] = torch.xpu.get_rng_state_all
    if torch.backends.mps.is_available():
        found["mps"] = lambda: [torch.mps.get_rng_state()]
    return found


def _device_count(name: str) -> int:
    if name not in _devices(in_use=False):
        return 0
    return 1 if name == "mps" else int(getattr(torch, name).device_count())


_SETTERS: dict[str, Callable[[torch.Tensor, int], None]] = {
    "cuda": torch.cuda.set_rng_state,
    "xpu": torch.xpu.set_rng_state,
    "mps": lambda state, index: torch.mps.set_rng_state(state),  # noqa: ARG005 - there is only one
}
