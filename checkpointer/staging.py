"""Between tensors and bytes: staging state into host memory, and filling state from bytes. No storage, no files."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from checkpointer.index import Chunk, Json, TensorSpec
from checkpointer.state.plan import Captured
from checkpointer.state.tensors import CARRIERS, as_bytes, spec_of

ALIGNMENT = 64
"""Bytes. Staged tensors start on cache lines."""


@dataclass(frozen=True)
class StagedTensor:
    """A tensor that is about to be written. ``bytes`` gives its row-major bytes, from live memory or a copy."""

    spec: TensorSpec
    bytes: Callable[[], memoryview]


@dataclass(frozen=True)
class StagedComponent:
    """One component, ready to be written."""

    kind: str
    tree: Json
    meta: Mapping[str, Json]
    tensors: Mapping[str, StagedTensor]
    aliases: Mapping[str, str]
    frozen: frozenset[str]


class Arena:
    """Host memory that staged state is copied into: reused, grown when needed, left out of forked children.

    A child (each DataLoader worker is one) that shared these pages would turn the next copy into page faults.
    """

    def __init__(self) -> None:
        self._memory: torch.Tensor | None = None
        self._used = 0

    def reset(self, size: int) -> None:
        """Make room for ``size`` bytes; whatever was handed out before is overwritten from now on."""
        self._used = 0
        if self._memory is None or self._memory.numel() < size:
            self._memory = None  # let go of the old one first
            region = mmap.mmap(-1, max(size, mmap.PAGESIZE))
            if hasattr(mmap, "MADV_DONTFORK"):
                region.madvise(mmap.MADV_DONTFORK)
            self._memory = torch.frombuffer(region, dtype=torch.uint8)

    def copy(self, tensor: torch.Tensor) -> memoryview:
        """The row-major bytes of ``tensor``, copied."""
        raw = _raw(tensor)
        if self._memory is None or not raw.numel():
            return memoryview(b"")
        size = raw.numel() * raw.element_size()
        target = self._memory[self._used : self._used + size]
        self._used += aligned(size)
        target.view(raw.dtype).view(raw.shape).copy_(raw)
        return _memory(target)

    def free(self) -> None:
        """Give the memory back."""
        self._memory = None


def stage_live(captured: Captured) -> StagedComponent:
    """Refer to live memory: for a writer that finishes before the state may change."""
    tensors = {
        key: StagedTensor(spec_of(tensor), lambda tensor=tensor: host_bytes(tensor))  # type: ignore[misc]
        for key, tensor in captured.tensors.items()
    }
    return _staged(captured, tensors)


def stage_copies(captured: Mapping[str, Captured], arena: Arena) -> dict[str, StagedComponent]:
    """Copy all tensors into ``arena``; when this returns, training may go on."""
    specs = {name: {key: spec_of(t) for key, t in part.tensors.items()} for name, part in captured.items()}
    arena.reset(sum(aligned(spec.nbytes) for part in specs.values() for spec in part.values()))
    staged = {}
    for name, part in captured.items():
        views = {key: arena.copy(tensor) for key, tensor in part.tensors.items()}
        tensors = {
            key: StagedTensor(specs[name][key], lambda view=view: view)  # type: ignore[misc]
            for key, view in views.items()
        }
        staged[name] = _staged(part, tensors)
    return staged


def host_bytes(tensor: torch.Tensor) -> memoryview:
    """The row-major bytes of a tensor: a view of its memory where it has that form, else a copy."""
    return _memory(as_bytes(tensor))


class TensorTarget:
    """One chunk of a tensor as the target of a read: its own memory where the chunk is contiguous there."""

    def __init__(self, tensor: torch.Tensor, chunk: Chunk) -> None:
        box = tensor.detach()
        for dimension, (offset, length) in enumerate(zip(chunk.offsets, chunk.lengths, strict=True)):
            if length != box.shape[dimension]:
                box = box.narrow(dimension, offset, length)
        self._box = _raw(box)
        self._bounce: torch.Tensor | None = None

    def open(self) -> memoryview:
        box = self._box
        if box.device.type != "cpu" or not box.is_contiguous():
            box = self._bounce = torch.empty(box.shape, dtype=box.dtype)
        return host_bytes(box)

    def finish(self) -> None:
        if self._bounce is not None:
            with torch.no_grad():
                self._box.copy_(self._bounce)
            self._bounce = None


def aligned(size: int) -> int:
    """``size`` rounded up so that the next tensor starts on a cache line."""
    return size + -size % ALIGNMENT


def _staged(captured: Captured, tensors: Mapping[str, StagedTensor]) -> StagedComponent:
    return StagedComponent(captured.kind, captured.tree, captured.meta, tensors, captured.aliases, captured.frozen)


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` as integers of the same size: few operators know the rarer dtypes, and bits are all that counts."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    if plain.dtype == torch.complex128:
        return torch.view_as_real(plain).view(torch.int64)
    return plain.view(CARRIERS[plain.element_size()])


def _memory(flat: torch.Tensor) -> memoryview:
    array: Any = flat.numpy()
    return memoryview(array)
