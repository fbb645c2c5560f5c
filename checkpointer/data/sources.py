"""What the order of the data depends on: generators, and the samplers' own states."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from checkpointer.data.checks import NAME, is_stateful
from checkpointer.errors import CorruptCheckpointError, IncompatibleStateError
from checkpointer.format.index import Component
from checkpointer.state import Adapter, RestoreOptions, RestorePlan, RngState, SavedState
from checkpointer.state.modes import outside_inference_mode
from checkpointer.state.rng import GENERATORS, GeneratorAdapter, generator_state
from checkpointer.state.tensors import spec_of
from checkpointer.state.tree.encode import encode

_SAMPLER_LINKS = ("batch_sampler", "sampler")
_DATA_LINKS = ("dataset", "transform")


class Sources:
    """Everything that the order of the data depends on: global generators, those of samplers and dataset, samplers.

    Looked up anew each time, as attributes may be replaced. Only those that a DataLoader fixes are kept: while an
    iterator is built, its index sampler is our stand-in.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader
        self._fixed = SimpleNamespace(batch_sampler=loader.batch_sampler, sampler=loader.sampler)
        self._late = set(self._empty())
        """Attributes that held nothing: a generator found there later is one that the sampler, or dataset, has made."""

    @property
    def samplers(self) -> dict[str, Any]:
        """The loader's samplers, inner ones too, by the path of attributes that leads to them."""
        return {} if isinstance(self._loader.dataset, IterableDataset) else _reachable(self._fixed, _SAMPLER_LINKS)

    def snapshot(self) -> dict[str, Any]:
        """All states, copied."""
        with outside_inference_mode():  # it is kept for later
            return self._snapshot()

    def _snapshot(self) -> dict[str, Any]:
        seeds = {name: sampler.initial_seed for name, sampler in self._samplers_with_seed().items()}
        return {
            "rng": RngState().state(),
            "generators": {name: generator_state(name, live) for name, live in self._generators().items()},
            "samplers": {name: copy.deepcopy(it.state_dict()) for name, it in self._stateful_samplers().items()},
            "epochs": {name: sampler.epoch for name, sampler in self._samplers_with_epoch().items()},
            **({"seeds": seeds} if seeds else {}),
        }

    def check(self, snapshot: Mapping[str, Any]) -> None:
        """Raise unless :meth:`snapshot` could have made it here. Changes nothing."""
        parts = {"samplers": self._stateful_samplers(), "epochs": self._samplers_with_epoch()}
        for part, live in {"generators": self._generators(), **parts, "seeds": self._samplers_with_seed()}.items():
            saved = snapshot.get(part, {} if part == "seeds" else None)
            if not isinstance(saved, dict):
                raise CorruptCheckpointError(f"{NAME}: not the state of a ResumableLoader: no {part}")
            late = self._late | set(self._empty()) if part == "generators" else set()
            if set(saved) - late != set(live) - late:
                names = f"{part} {sorted(saved)} were saved, live are {sorted(live)}"
                raise IncompatibleStateError(f"the loader is not the one that was saved: {names}")
        _plan(RngState(), snapshot.get("rng"))
        live = self._generators()
        for name, saved in snapshot["generators"].items():
            _plan(GeneratorAdapter(name, live[name] if name in live else _made(name, saved)), saved)

    def set_random(self, snapshot: Mapping[str, Any]) -> None:
        """Set the global generators, and those of samplers and dataset."""
        _plan(RngState(), snapshot["rng"]).apply()
        self.set_generators(snapshot)

    def set_generators(self, snapshot: Mapping[str, Any]) -> None:
        """Set the generators of samplers and dataset; make, or take away, those that these make late."""
        saved = snapshot["generators"]
        self._late |= set(self._empty())
        for name in (saved.keys() ^ self._generators().keys()) & self._late:
            path, _, attribute = name.rpartition(".")
            setattr(self._owners()[path], attribute, _made(name, saved[name]) if name in saved else None)
        for name, generator in self._generators().items():
            if name in saved:
                _plan(GeneratorAdapter(name, generator), saved[name]).apply()

    def set_samplers(self, snapshot: Mapping[str, Any]) -> None:
        """Set the samplers' own states, epoch numbers and seeds."""
        for name, sampler in self._samplers_with_seed().items():
            sampler.initial_seed = snapshot["seeds"][name]
        for name, sampler in self._stateful_samplers().items():
            sampler.load_state_dict(snapshot["samplers"][name])
        for name, sampler in self._samplers_with_epoch().items():
            sampler.set_epoch(snapshot["epochs"][name])

    def _generators(self) -> dict[str, Any]:
        found: dict[int, tuple[str, Any]] = {}
        for path, owner in {"": self._loader, **self._owners()}.items():
            for name, value in getattr(owner, "__dict__", {}).items():
                if isinstance(value, GENERATORS) and not isinstance(value, random.SystemRandom):
                    found.setdefault(id(value), (f"{path}.{name}".lstrip("."), value))
        return dict(found.values())

    def _owners(self) -> dict[str, Any]:
        """Samplers, dataset and its transform, by path."""
        return {**self.samplers, **_reachable(self._loader, _DATA_LINKS)}

    def _empty(self) -> Iterator[str]:
        """The attributes of samplers and dataset that hold nothing."""
        for path, owner in self._owners().items():
            yield from (f"{path}.{name}" for name, value in getattr(owner, "__dict__", {}).items() if value is None)

    def _stateful_samplers(self) -> dict[str, Any]:
        """Those that know where they are. A distributed one depends on its epoch number alone."""
        samplers = self.samplers.items()
        return {
            name: sampler
            for name, sampler in samplers
            if is_stateful(sampler) and not isinstance(sampler, DistributedSampler)
        }

    def _samplers_with_epoch(self) -> dict[str, Any]:
        return {
            name: sampler
            for name, sampler in self.samplers.items()
            if callable(getattr(sampler, "set_epoch", None)) and type(getattr(sampler, "epoch", None)) is int
        }

    def _samplers_with_seed(self) -> dict[str, Any]:
        """Those that draw an order from the seed that their process began with, as accelerate's does."""
        return {
            name: sampler
            for name, sampler in self.samplers.items()
            if type(getattr(sampler, "initial_seed", None)) is int
        }


def _made(name: str, saved: Any) -> torch.Generator:
    """A new generator of the kind that was saved, for a sampler that makes its own when it is first asked."""
    kind = saved.get("type") if isinstance(saved, dict) else None
    library, _, device = str(kind).partition(".")
    try:
        if library == "torch":
            return torch.Generator(device)
    except RuntimeError:  # a device that is not here
        pass
    raise IncompatibleStateError(
        f"the loader is not the one that was saved: the generator {name} ({kind}) does not exist here, and cannot be "
        "made"
    )


def _reachable(root: Any, links: tuple[str, ...]) -> dict[str, Any]:
    """Every object that attributes named in ``links`` lead to from ``root``, by path; each once."""
    found: dict[str, Any] = {}
    waiting = [("", root)]
    while waiting:
        path, owner = waiting.pop(0)
        for name in links:
            value = getattr(owner, "__dict__", {}).get(name)
            if value is not None and all(value is not other for other in found.values()):
                found[f"{path}.{name}".lstrip(".")] = value
                waiting.append((f"{path}.{name}", value))
    return found


def _plan(adapter: Adapter, value: Any) -> RestorePlan:
    """The checked and filled plan that sets what ``adapter`` stands for to ``value``."""
    name = NAME
    with outside_inference_mode():
        tree, tensors = encode(value, name)
        component = Component(adapter.kind, tree, {key: spec_of(tensor) for key, tensor in tensors.items()})
        plan = adapter.prepare(SavedState(name, component), RestoreOptions())
        for key, target in plan.reads.items():
            target.copy_(tensors[key])
    return plan
