"""From live tensors to the bytes of files: copies in host memory, or live memory itself. No storage, no disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import xxhash

from checkpointer.arena import Arena, Copy
from checkpointer.index import Component
from checkpointer.lazy import LazyFile, LiveState, LiveTensor, Stepped
from checkpointer.memory import cache_aligned, page_aligned
from checkpointer.state.plan import Captured
from checkpointer.state.tensors import host_bytes, spec_of
from checkpointer.tensorfile import ComponentTensors, Slot, TensorFile, plan_files

BLOCK = 1 << 20
"""Bytes hashed and handed on at a time: they stay in the processor's cache in between."""

DEVICE_BLOCK = 8 << 20
"""Bytes fetched from another device, or put in row-major order, at a time."""


class Source(Protocol):
    """The bytes of one file's tensors."""

    @property
    def steady(self) -> bool:
        """Whether what ``pieces`` gives stays as it is until the save has ended."""

    def pieces(self, hashes: list[str]) -> Iterator[memoryview]:
        """All bytes behind the header, in order; the xxh3-128 of each slot is appended to ``hashes`` on the way."""


class StagedFile(NamedTuple):
    """A file that is about to be written."""

    file: TensorFile
    source: Source


@dataclass(frozen=True)
class Staged:
    """The state of one save, ready to be written."""

    components: Mapping[str, Component]
    parts: Mapping[str, ComponentTensors]
    files: Sequence[StagedFile]
    live: LiveState | None = None
    """What is still in live memory, and has to be copied before it changes."""


class Stager:
    """Stages the components of a manager, save after save, in memory that it keeps."""

    def __init__(self) -> None:
        self._arena = Arena()
        self._rest = Arena()
        """For live tensors that change before they are written."""
        self._parts: dict[str, ComponentTensors] = {}
        self._files: list[TensorFile] = []

    def live(self, captured: Mapping[str, Captured]) -> Staged:
        """Refer to live memory: for a writer that finishes before the state may change."""
        files = self._plan(captured)
        return self._staged(captured, [StagedFile(file, _LiveTensors(_tensors(file, captured))) for file in files])

    def copies(self, captured: Mapping[str, Captured]) -> Staged:
        """Copy all tensors; when this returns, training may go on. Overwrites what was staged before."""
        files = self._plan(captured)
        starts = []
        size = 0
        for file in files:
            starts.append(size)
            size += page_aligned(file.data_size)
        pinned = any(tensor.is_cuda for part in captured.values() for tensor in part.tensors.values())
        memory = self._arena.reserve(size, pinned=pinned)
        self._arena.fill(
            Copy(captured[slot.component].tensors[slot.key], start + slot.begin, slot.end - slot.begin)
            for file, start in zip(files, starts, strict=True)
            for slot in file.slots
        )
        staged = [
            StagedFile(file, _Image(memory[start : start + file.data_size], file.slots))
            for file, start in zip(files, starts, strict=True)
        ]
        return self._staged(captured, staged)

    def lazily(self, captured: Mapping[str, Captured], changes: Stepped) -> Staged:
        """Refer to live memory for what only ``changes`` with a step, and copy everything else."""
        files = self._plan(captured)
        live: list[LiveTensor] = []
        copies: list[Copy] = []
        planned: list[list[LiveTensor | Copy]] = []
        size = 0
        for file in files:
            slots: list[LiveTensor | Copy] = []
            for slot in file.slots:
                tensor = captured[slot.component].tensors[slot.key]
                if changes.holds(slot, tensor):
                    live.append(LiveTensor(slot, tensor))
                    slots.append(live[-1])
                else:
                    copies.append(Copy(tensor, size, slot.end - slot.begin))
                    slots.append(copies[-1])
                    size += cache_aligned(slot.end - slot.begin)
            planned.append(slots)
        memory = self._arena.reserve(size)
        self._arena.fill(copies)
        state = LiveState(self._rest, live)
        staged = [StagedFile(file, LazyFile(state, slots, memory)) for file, slots in zip(files, planned, strict=True)]
        return self._staged(captured, staged, state)

    def close(self) -> None:
        """Give the memory back."""
        self._arena.free()
        self._rest.free()

    def _plan(self, captured: Mapping[str, Captured]) -> list[TensorFile]:
        """Which tensor goes where. The plan of the last save serves again while names, shapes and dtypes stay."""
        parts = {
            name: ComponentTensors(
                part.kind, {key: spec_of(tensor) for key, tensor in part.tensors.items()}, part.frozen, part.aliases
            )
            for name, part in captured.items()
        }
        if parts != self._parts:
            self._parts, self._files = parts, plan_files(parts)
        return self._files

    def _staged(
        self, captured: Mapping[str, Captured], files: Sequence[StagedFile], live: LiveState | None = None
    ) -> Staged:
        components = {
            name: Component(kind=part.kind, tree=part.tree, tensors=self._parts[name].specs, meta=part.meta)
            for name, part in captured.items()
        }
        return Staged(components, self._parts, files, live)


class _Image:
    """A file's tensors as they lie in the arena, one behind the other as in the file."""

    steady = True

    def __init__(self, memory: memoryview, slots: Sequence[Slot]) -> None:
        self._memory = memory
        self._slots = slots

    def pieces(self, hashes: list[str]) -> Iterator[memoryview]:
        """Whole blocks, whatever lies in them: the tensors' borders matter to the hashes alone."""
        slots = iter(self._slots)
        slot = next(slots, None)
        hasher = xxhash.xxh3_128()
        for start in range(0, len(self._memory), DEVICE_BLOCK):
            end = min(start + DEVICE_BLOCK, len(self._memory))
            while slot is not None and slot.begin < end:
                hasher.update(self._memory[max(slot.begin, start) : min(slot.end, end)])
                if slot.end > end:
                    break
                hashes.append(hasher.hexdigest())
                slot = next(slots, None)
                hasher.reset()
            yield self._memory[start:end]
        while slot is not None:  # without elements, at the end
            hashes.append(xxhash.xxh3_128_hexdigest(b""))
            slot = next(slots, None)


class _LiveTensors:
    """A file's tensors where they are."""

    steady = False

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = tensors

    def pieces(self, hashes: list[str]) -> Iterator[memoryview]:
        for tensor in self._tensors:
            hasher = xxhash.xxh3_128()
            for block in row_major_blocks(tensor):
                hasher.update(block)
                yield block
            hashes.append(hasher.hexdigest())


def row_major_blocks(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The row-major bytes of a tensor in blocks: views of its memory where it has that form, else small copies."""
    if tensor.is_cpu and tensor.is_contiguous():
        memory = host_bytes(tensor)
        for start in range(0, len(memory), BLOCK):
            yield memory[start : start + BLOCK]
    elif tensor.numel() * tensor.element_size() <= DEVICE_BLOCK:
        yield host_bytes(tensor)
    else:
        row = tensor.element_size() * (tensor.numel() // len(tensor))
        rows = max(DEVICE_BLOCK // row, 1)
        for start in range(0, len(tensor), rows):
            yield from row_major_blocks(tensor[start] if rows == 1 else tensor[start : start + rows])


def _tensors(file: TensorFile, captured: Mapping[str, Captured]) -> list[torch.Tensor]:
    return [captured[slot.component].tensors[slot.key] for slot in file.slots]
