"""Where saved tensors are read to: straight into live memory where that is safe, else into new tensors."""

from __future__ import annotations

import bisect
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from checkpointer.errors import CorruptCheckpointError, IncompatibleStateError
from checkpointer.format.index import TensorSpec
from checkpointer.state import tensors
from checkpointer.state.dtensor import like
from checkpointer.state.protocol import MapLocation, SavedState
from checkpointer.state.tree.decode import Leaf
from checkpointer.state.tree.encode import TORCH_NUMPY
from checkpointer.system.memory import expect_use


class Destinations:
    """The destination of every stored key of one component. No byte of live memory is used for two keys."""

    def __init__(
        self,
        name: str,
        specs: Mapping[str, TensorSpec],
        map_location: MapLocation = None,
        *,
        stepped: bool = False,
    ) -> None:
        """``stepped``: an optimizer changes what is read, so that it cannot stay in inference tensors."""
        self.reads: dict[str, torch.Tensor] = {}
        self._name = name
        self._specs = specs
        self._map_location = map_location
        self._stepped = stepped
        self._taken: dict[torch.device, list[tuple[int, int]]] = {}
        self._owners: dict[str, torch.Tensor] = {}
        self._fresh: list[torch.Tensor] = []

    def offer(self, key: str, live: object) -> bool:
        """Read ``key`` into the live tensor if dtype, shape and memory allow; whether it will be."""
        if not isinstance(live, torch.Tensor) or key in self.reads or not tensors.fillable(live, self._specs[key]):
            return False
        if self._stepped and live.is_inference():
            return False
        if type(live) is torch.Tensor and not live.requires_grad:
            return self._take(key, live)  # the object itself, without another one for its memory
        taken = self._take(key, live.detach())
        if taken and not isinstance(live, torch.nn.Parameter) and not live.requires_grad:
            self._owners[key] = live
        return taken

    def tensors(self) -> dict[str, torch.Tensor]:
        """What was read, with the live tensor objects themselves for the memory of plain ones."""
        return {**self.reads, **self._owners}

    def offer_array(self, leaf: Leaf, live: object) -> bool:
        """Read an array into the live numpy array if both are laid out the same way."""
        if type(live) is not np.ndarray or leaf.key in self.reads or live.dtype.str != leaf.dtype:
            return False
        if live.shape != leaf.shape or not live.flags.writeable:
            return False
        memory = _array_memory(live.T if leaf.order == "F" else live)
        return memory is not None and self._take(leaf.key, memory)

    def allocate(self, key: str, device: MapLocation = None) -> torch.Tensor:
        """The destination of ``key``, newly made on ``device`` if it has none yet."""
        if key not in self.reads:
            self.reads[key] = self._new(key, device if device is not None else self._map_location)
        return self.reads[key]

    def allocate_like(self, key: str, live: torch.Tensor) -> torch.Tensor:
        """The destination of ``key``, newly made and laid out over the ranks as ``live`` is, if it has none yet.

        Where the saved tensor has another shape than ``live``, every rank gets all of it.
        """
        spec = self._specs[key]
        if key not in self.reads and spec.shape == tuple(live.shape):
            self.reads[key] = made = like(live, tensors.DTYPES[spec.dtype])
            self._fresh.append(made)
        return self.allocate(key, live.device)

    def allocate_all(self, keys: Iterable[str]) -> None:
        """Give every one of ``keys`` a destination."""
        for key in sorted(keys):
            self.allocate(key)

    def announce(self) -> None:
        """All destinations are chosen: let the system know which memory will be touched for the first time."""
        expect_use(tensors.extent(tensor) for tensor in self._fresh if tensor.is_cpu)

    def _take(self, key: str, memory: torch.Tensor) -> bool:
        start, end = tensors.extent(memory)
        taken = self._taken.setdefault(memory.device, [])
        index = bisect.bisect(taken, (start, end))
        before = index > 0 and taken[index - 1][1] > start
        if end > start and (before or (index < len(taken) and taken[index][0] < end)):
            return False
        if end > start:
            taken.insert(index, (start, end))
        self.reads[key] = memory
        return True

    def _new(self, key: str, device: MapLocation) -> torch.Tensor:
        try:
            made = tensors.empty_for(self._specs[key], device)
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise CorruptCheckpointError(f"{self._name}: tensor {key!r} is not well formed: {error}") from error
        except (RuntimeError, MemoryError) as error:
            shape = list(self._specs[key].shape)
            raise IncompatibleStateError(f"{self._name}: no memory for {key!r} {shape} on {device}: {error}") from error
        self._fresh.append(made)
        return made


def _array_memory(array: np.ndarray[Any, Any]) -> torch.Tensor | None:
    """The array's own memory as a tensor of the dtype that it is stored in; ``None`` where there is no such view."""
    if any(stride < 0 or stride % array.itemsize for stride in array.strides):
        return None
    if array.dtype.str in TORCH_NUMPY:
        made = torch.from_numpy(array)
        return None if tensors.overlaps(made) else made
    return torch.from_numpy(array.reshape(-1).view(np.uint8)) if array.flags.c_contiguous else None


def check_kind(saved: SavedState, kind: str, live: object) -> None:
    """Raise :class:`IncompatibleStateError` unless the component was saved by the same kind of adapter."""
    if saved.component.kind != kind:
        raise IncompatibleStateError(
            f"{saved.name}: saved as a {saved.component.kind!r} component, the live {type(live).__name__} is restored "
            f"as {kind!r}; register the same kind of object under this name"
        )


def nearest(name: str, candidates: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the candidate that is most like ``name``, or nothing."""
    pool = list(candidates)
    if len(pool) > 2000:
        last = name.rpartition(".")[2]
        pool = [item for item in pool if item.endswith(last)][:2000]
    found = difflib.get_close_matches(name, pool, n=1, cutoff=0.6)
    return f" (nearest: {found[0]!r})" if found else ""
