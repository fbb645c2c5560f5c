"""Memory that has been touched, and the state at a moment, kept in it."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from benchmarks.workloads import Training

PAGE = 4096


class Buffer:
    """Page-aligned, touched, private memory that forked children do not share."""

    def __init__(self, size: int) -> None:
        self.size = max(PAGE, -(-size // PAGE) * PAGE)
        self._map = mmap.mmap(-1, self.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_DONTFORK"):
            self._map.madvise(mmap.MADV_DONTFORK)
        self.array = np.frombuffer(self._map, np.uint8)
        self.array.fill(1)
        self.memory = memoryview(self._map)


def leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """What nested dicts and lists hold, with the path to it."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}.{index}")
    else:
        yield path, value


def state_of(training: Training) -> dict[str, Any]:
    """Every leaf of the state, tensors and others, by a name that is the same in another process."""
    return {
        **dict(leaves(training.model.state_dict(), "model")),
        **dict(leaves(training.optimizer.state_dict(), "optimizer")),
    }


class Reference:
    """The state at the moment of ``take``: what a restore has to bring back, bit for bit."""

    def __init__(self, training: Training) -> None:
        tensors = {name: leaf for name, leaf in state_of(training).items() if isinstance(leaf, torch.Tensor)}
        starts = np.cumsum([0, *(-(-tensor.nbytes // 64) * 64 for tensor in tensors.values())]).tolist()
        self.buffer = Buffer(starts[-1])
        self.size = sum(tensor.nbytes for tensor in tensors.values())
        """Bytes of the state's tensors."""
        self.count = len(tensors)
        whole = torch.from_numpy(self.buffer.array)
        self._copies = {
            name: whole[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for (name, tensor), start in zip(tensors.items(), starts, strict=False)
        }
        self._others: dict[str, Any] = {}
        self.take(training)

    def take(self, training: Training) -> None:
        """Copy the state as it is now."""
        state = state_of(training)
        self._others = {name: leaf for name, leaf in state.items() if name not in self._copies}
        for name, copy in self._copies.items():
            copy.copy_(state[name].detach())

    def difference(self, training: Training) -> str | None:
        """The first leaf that is not what it was, and in what way; ``None`` if every bit is the same."""
        state = state_of(training)
        for name, copy in self._copies.items():
            if not isinstance(state.get(name), torch.Tensor):
                return f"{name} is missing"
            if state[name].dtype != copy.dtype or state[name].shape != copy.shape:
                return f"{name} has another dtype or shape"
            if not _same_bits(state[name], copy):
                return f"{name} differs"
        return next((f"{name} differs" for name, leaf in self._others.items() if state.get(name) != leaf), None)

    def changed(self, training: Training) -> int:
        """Bytes of the tensors in which anything is not what it was."""
        state = state_of(training)
        return sum(copy.nbytes for name, copy in self._copies.items() if not _same_bits(state[name], copy))


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    flat = [tensor.detach().cpu().contiguous().view(-1).view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*flat)
