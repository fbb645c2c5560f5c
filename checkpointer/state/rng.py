"""Random number generators: one generator as a component, and the state of all global ones."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from checkpointer.errors import CorruptCheckpointError, IncompatibleStateError, UnsupportedStateError
from checkpointer.state.codec import encode
from checkpointer.state.decoding import Leaf, decode, outline
from checkpointer.state.places import Places, check_kind
from checkpointer.state.plan import Captured, ComponentReport, RestoreOptions, RestorePlan, SavedState

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

    def prepare(self, saved: SavedState, options: RestoreOptions) -> RestorePlan:
        """Check that the saved state is one of the same algorithm."""
        check_kind(saved, self.kind, self.live)
        component = saved.component
        value, keys = outline(component.tree, component.tensors, place=self.name)
        _check_like(self.name, value, generator_state(self.name, self.live))
        places = Places(self.name, component.tensors, "cpu")
        places.allocate_all(keys)

        def apply() -> None:
            set_generator_state(self.live, decode(component.tree, places.reads, place=self.name))

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


def set_generator_state(live: Any, saved: dict[str, Any]) -> None:
    """The inverse of :func:`generator_state`."""
    state = saved["state"]
    if isinstance(live, (torch.Generator, np.random.RandomState)):
        (live.set_state)(state)
    elif isinstance(live, np.random.Generator):
        live.bit_generator.state = state
    elif isinstance(live, np.random.BitGenerator):
        live.state = state
    else:
        live.setstate(state)


def _check_like(place: str, saved: Any, live: Any) -> None:
    """Raise unless ``saved`` is built like ``live``: the same types, keys, lengths, array shapes and labels."""
    if isinstance(saved, Leaf) and isinstance(live, (torch.Tensor, np.ndarray)):
        same = saved.spec is not None and saved.spec.shape == tuple(live.shape)
        same = same and saved.spec is not None and saved.spec.dtype == str(live.dtype).removeprefix("torch.")
    elif isinstance(live, dict):
        same = type(saved) is dict and set(saved) == set(live)
    elif isinstance(live, (tuple, list)):
        same = type(saved) is type(live) and len(saved) == len(live)
    elif isinstance(live, str):
        same = saved == live
    elif isinstance(live, float) or live is None:
        same = saved is None or isinstance(saved, float)
    else:
        same = isinstance(live, type(saved)) and not isinstance(saved, Leaf)
    if not same:
        raise IncompatibleStateError(f"{place}: the saved state is not that of the live kind of random generator")
    if isinstance(live, dict):
        for key in live:
            _check_like(f"{place}[{key!r}]", saved[key], live[key])
    elif isinstance(live, (tuple, list)):
        for index, (saved_item, live_item) in enumerate(zip(saved, live, strict=True)):
            _check_like(f"{place}[{index}]", saved_item, live_item)


class RngState:
    """The global generators of this process: Python, NumPy, torch CPU and every accelerator in use. An adapter."""

    kind = "rng"

    def __init__(self, name: str = "rng") -> None:
        self.name = name

    def capture(self) -> Captured:
        """Copy all states now (a few KiB for each generator)."""
        state: dict[str, Any] = {
            "python": random.getstate(),
            "numpy": np.random.get_state(legacy=False),
            "torch": torch.get_rng_state(),
            "devices": {name: get() for name, get in _devices(in_use=True).items()},
        }
        tree, tensors = encode(state, self.name)
        return Captured(self.kind, tree, tensors)

    def prepare(self, saved: SavedState, options: RestoreOptions) -> RestorePlan:
        """Check all states; ``apply`` sets them. A different number of devices is reported, not refused."""
        check_kind(saved, self.kind, self)
        component = saved.component
        value, keys = outline(component.tree, component.tensors, place=self.name)
        devices = self._check(value)
        places = Places(self.name, component.tensors, "cpu")
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
        _check_like(f"{self.name}.numpy", value["numpy"], np.random.get_state(legacy=False))
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
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
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
    "cuda": lambda state, index: torch.cuda.set_rng_state(state, index),
    "xpu": lambda state, index: torch.xpu.set_rng_state(state, index),
    "mps": lambda state, index: torch.mps.set_rng_state(state),
}
