"""From live tensors to the bytes of files: copies in host memory, or live memory itself. No storage, no disk."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, Protocol

import torch
import xxhash

from checkpointer.errors import SaveError
from checkpointer.format.index import Component, FileRecord
from checkpointer.format.tensor_files import ComponentTensors, TensorFile, plan_files
from checkpointer.policy.reuse import ReuseSource, candidate
from checkpointer.staging.arena import Arena, Copy, copy_threads, is_flat
from checkpointer.staging.digest import Digest
from checkpointer.staging.gpu import Noted, copy_bytes_out, is_row_major, note_on_device, pin, unpin
from checkpointer.staging.live import LazyFile, LiveOnGpu, LiveState, LiveTensor, Stepped
from checkpointer.staging.sample import Items, Sample, Sampler
from checkpointer.state.modes import wait_for_streams
from checkpointer.state.protocol import Captured
from checkpointer.state.tensors import host_bytes, spec_of
from checkpointer.system.memory import MemoryPart, Ring, cache_aligned, page_aligned, part_of_memory, view_of
from checkpointer.system.threads import Pool

BLOCK = 1 << 20
"""Bytes hashed and handed on at a time: they stay in the processor's cache in between."""

IMAGE_BLOCK = 32 << 20
"""Bytes handed on at a time from the arena. In smaller blocks the writer would spend its time waiting for the GIL,
which a training thread that is busy in Python gives away only every few milliseconds."""

DEVICE_BLOCK = 8 << 20
"""Bytes fetched from another device, or put in row-major order, at a time."""


WORTH_THREADS = 4 << 20
"""Bytes from which on it pays to start threads that hash."""

logger = logging.getLogger("checkpointer")


class ByteSource(Protocol):
    """The bytes of one file's tensors."""

    @property
    def steady(self) -> bool:
        """Whether ``pieces`` gives what :meth:`Storage.write` calls steady."""

    def pieces(self, digest: Digest) -> Iterator[memoryview]:
        """All bytes behind the header, in order; ``digest`` sees them on the way."""


class Reusable(NamedTuple):
    """The checkpoint whose files a save may share."""

    source: ReuseSource | None
    limit: int | Literal[False]
    """``write: {share}``."""


NOTHING = Reusable(None, limit=False)


class StagedFile(NamedTuple):
    """A file that is about to be written."""

    file: TensorFile
    source: ByteSource


@dataclass(frozen=True)
class Staged:
    """The state of one save, ready to be written."""

    components: Mapping[str, Component]
    parts: Mapping[str, ComponentTensors]
    files: Sequence[StagedFile]
    trainable: frozenset[tuple[str, str]] = frozenset()
    """(component, key) of parameters and moments."""
    live: LiveState | None = None
    """What is still in live memory, and has to be copied before it changes."""


class ReusedFile:
    """A file whose bytes are those of an earlier checkpoint's, hash for hash: it need not be written."""

    steady = True

    def __init__(
        self,
        earlier: ReuseSource,
        record: FileRecord,
        hashes: Sequence[str],
        tensors: Sequence[torch.Tensor],
        ring: Ring,
    ) -> None:
        self.earlier = earlier
        self.record = record
        """What the manifest says of it."""
        self.hashes = tuple(hashes)
        self._tensors = LiveTensors(tensors, ring)

    def pieces(self, digest: Digest) -> Iterator[memoryview]:
        """For a storage that cannot share after all: from live memory, which has to hold the same bytes still."""
        yield from self._tensors.pieces(digest)
        digest.update(memoryview(b""))
        if tuple(digest.hashes) != self.hashes:
            raise SaveError(
                "parameters that do not require gradients were changed while they were being written: it was not "
                "committed. Set requires_grad before you change them, or write: {share: false}"
            )


class Stager:
    """Stages the components of a manager, save after save, in memory that it keeps."""

    def __init__(self) -> None:
        self._arena = Arena()
        self._rest = Arena()
        """For live tensors that change before they are written."""
        self._sampler = Sampler()
        self._kept_ring: Ring | None = None
        self._ring_pinned = False
        self._parts: dict[str, ComponentTensors] = {}
        self._files: list[TensorFile] = []

    def live(self, captured: Mapping[str, Captured], reusable: Reusable = NOTHING) -> Staged:
        """Refer to live memory: for a writer that finishes before the state may change."""
        shared = self._shared(captured, reusable)
        wait_for_streams(tensor for part in captured.values() for tensor in part.tensors.values())
        if _on_gpu(captured) and not self._ring_pinned:
            self._ring_pinned = pin(self._ring.region)
        sources = [shared.get(file.path) or LiveTensors(_tensors(file, captured), self._ring) for file in self._files]
        return self._staged(captured, sources)

    def copies(self, captured: Mapping[str, Captured], reusable: Reusable = NOTHING) -> Staged:
        """Copy all tensors; when this returns, training may go on. Overwrites what was staged before."""
        shared = self._shared(captured, reusable)
        starts: dict[str, int] = {}
        size = 0
        for file in self._files:
            if file.path not in shared:
                starts[file.path] = size
                size += page_aligned(file.data_size)
        memory = self._arena.reserve(size, pinned=_on_gpu(captured))
        self._arena.fill(
            Copy(captured[slot.component].tensors[slot.key], starts[file.path] + slot.begin, slot.end - slot.begin)
            for file in self._files
            if file.path in starts
            for slot in file.slots
        )
        images = {
            file.path: _Image(memory[starts[file.path] : starts[file.path] + file.data_size])
            for file in self._files
            if file.path in starts
        }
        return self._staged(captured, [shared.get(file.path) or images[file.path] for file in self._files])

    def expect(self, size: int, *, on_gpu: bool) -> None:
        """Have the memory that ``copies`` will need, about ``size`` bytes, touched beside training.

        Raises:
            MemoryError, OSError: there is none.
        """
        self._arena.touch(size, pinned=on_gpu)

    def lazily(
        self, captured: Mapping[str, Captured], changes: Stepped, reusable: Reusable = NOTHING, seed: int = 0
    ) -> Staged:
        """Refer to live memory for what only ``changes`` with a step, and copy everything else.

        ``seed`` decides what is noted of live memory, to see that nobody changes it otherwise: another one each time.
        """
        shared = self._shared(captured, reusable)
        plan = _LazyPlan(changes)
        for file in self._files:
            if file.path not in shared:
                plan.add(file, _tensors(file, captured))
        try:
            plan.note_on_gpu(seed)
        except torch.OutOfMemoryError:  # not for a few MiB: what is copied in the call needs no sample
            return self.copies(captured, reusable)
        self._arena.reserve(plan.size, pinned=_on_gpu(captured))
        running = self._arena.begin(plan.beside, plan.copies)
        noted = self._sampler.take(plan.live, seed)
        sample = Sample([*noted, *plan.noted_on_gpu(self._arena.address)])
        state = LiveState(self._rest, plan.live, LiveOnGpu(plan.on_gpu, running), sample)
        files = {
            path: LazyFile(state, slots, plan.places[path], self._arena.address, self._ring)
            for path, slots in plan.slots.items()
        }
        return self._staged(captured, [shared.get(file.path) or files[file.path] for file in self._files], state)

    def close(self) -> None:
        """Give the memory back."""
        self._arena.free()
        self._rest.free()
        if self._ring_pinned:
            unpin(self._ring.region)
            self._ring_pinned = False
        self._kept_ring = None

    @property
    def _ring(self) -> Ring:
        if self._kept_ring is None:
            self._kept_ring = Ring()
        return self._kept_ring

    def _plan(self, captured: Mapping[str, Captured]) -> None:
        """Which tensor goes where. The plan of the last save serves again while names, shapes and dtypes stay."""
        parts = {
            name: ComponentTensors(
                part.kind,
                {key: spec_of(tensor) for key, tensor in part.tensors.items()},
                part.frozen,
                part.aliases,
                part.naming,
            )
            for name, part in captured.items()
        }
        if parts != self._parts:
            self._parts, self._files = parts, plan_files(parts)

    def _shared(self, captured: Mapping[str, Captured], reusable: Reusable) -> dict[str, ReusedFile]:
        """Plan, and find the files that need not be written. Only candidates are hashed."""
        self._plan(captured)
        shared: dict[str, ReusedFile] = {}
        for file in self._files:
            found = candidate(file, reusable.source, reusable.limit)
            if found.record is not None and reusable.source is not None:
                tensors = _tensors(file, captured)
                found = found.confirmed(hash_tensors(tensors))
                if found.record is not None:
                    shared[file.path] = ReusedFile(reusable.source, found.record, found.hashes, tensors, self._ring)
            logger.debug("%s: %s", file.path, found.reason)
        return shared

    def _staged(
        self, captured: Mapping[str, Captured], sources: Sequence[ByteSource], live: LiveState | None = None
    ) -> Staged:
        components = {
            name: Component(kind=part.kind, tree=part.tree, tensors=self._parts[name].specs, meta=part.meta)
            for name, part in captured.items()
        }
        files = [StagedFile(file, source) for file, source in zip(self._files, sources, strict=True)]
        trainable = frozenset((name, key) for name, part in captured.items() for key in part.trainable)
        return Staged(components, self._parts, files, trainable, live)


class _LazyPlan:
    """Which tensors of a lazy save are live, which are copied, and where in the arena the copies go."""

    def __init__(self, changes: Stepped) -> None:
        self._changes = changes
        self.slots: dict[str, list[LiveTensor | Copy]] = {}
        """Of each file."""
        self.places: dict[str, int] = {}
        """Where the tensors of each file begin in all that the save writes."""
        self.live: list[LiveTensor] = []
        self.on_gpu: list[LiveTensor] = []
        self.copies: list[Copy] = []
        """Of what may change at any time."""
        self.beside: list[Copy] = []
        """Of ``on_gpu``, while training goes on."""
        self.size = 0
        """Bytes of the arena."""
        self._written = 0
        self._noted: list[tuple[Noted, int]] = []
        """What is noted of ``on_gpu``, and where in the arena it goes."""

    def add(self, file: TensorFile, tensors: Sequence[torch.Tensor]) -> None:
        """Plan for one more file."""
        slots = self.slots[file.path] = []
        self.places[file.path] = self._written
        for slot, tensor in zip(file.slots, tensors, strict=True):
            stepped = self._changes.holds(slot, tensor)
            if stepped and tensor.is_cpu:
                self.live.append(LiveTensor(slot, tensor, self._written + slot.begin))
                slots.append(self.live[-1])
                continue
            slots.append(self._copy(tensor, self.beside if stepped else self.copies))
            if stepped:
                self.on_gpu.append(LiveTensor(slot, tensor, self._written + slot.begin))
        self._written += file.data_size

    def note_on_gpu(self, seed: int) -> None:
        """Let the GPUs note a sample before anything that they are given from now on."""
        for noted in note_on_device([(live.tensor, live.place) for live in self.on_gpu], seed):
            self._noted.append((noted, self._copy(noted.rows, self.copies).offset))

    def noted_on_gpu(self, memory: int) -> list[Items]:
        """That sample; its bytes are there when those of ``on_gpu`` are. ``memory``: the address of the arena."""
        return [noted.items(memory + offset, first=len(self.live)) for noted, offset in self._noted]

    def _copy(self, tensor: torch.Tensor, copies: list[Copy]) -> Copy:
        copies.append(Copy(tensor, self.size, tensor.nbytes))
        self.size += cache_aligned(tensor.nbytes)
        return copies[-1]


class _Image:
    """A file's tensors as they lie in the arena, one behind the other as in the file."""

    steady = True

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory

    def pieces(self, digest: Digest) -> Iterator[memoryview]:
        for start in range(0, len(self._memory), IMAGE_BLOCK):
            block = self._memory[start : start + IMAGE_BLOCK]
            digest.update(block)
            yield block


class LiveTensors:
    """A file's tensors where they are: copied block by block."""

    steady = True

    def __init__(self, tensors: Sequence[torch.Tensor], ring: Ring) -> None:
        self._tensors = tensors
        self._ring = ring

    def pieces(self, digest: Digest) -> Iterator[memoryview]:
        parts = (part for tensor in self._tensors for part in parts_of(tensor))
        for block in self._ring.gather(parts):
            digest.update(block)
            yield block


def parts_of(tensor: torch.Tensor) -> Iterator[MemoryPart]:
    """The row-major bytes of a tensor, wherever it is."""
    if is_flat(tensor):
        yield part_of_memory(tensor.data_ptr(), tensor.nbytes)
    elif is_row_major(tensor):
        yield MemoryPart(tensor.nbytes, partial(copy_bytes_out, tensor))
    else:
        yield from map(_part_of_view, row_major_blocks(tensor))


def _part_of_view(block: memoryview) -> MemoryPart:
    def copy(target: int, start: int, count: int) -> None:
        view_of(target, count)[:] = block[start : start + count]

    return MemoryPart(len(block), copy)


def hash_tensors(tensors: Sequence[torch.Tensor]) -> list[str]:
    """The xxh3-128 of the row-major bytes of each tensor."""
    wait_for_streams(tensors)
    if sum(tensor.nbytes for tensor in tensors) < WORTH_THREADS:
        return [_hash(tensor) for tensor in tensors]
    with Pool(copy_threads(), thread_name_prefix="checkpointer-hash") as pool:
        try:
            return list(pool.map(_hash, tensors))
        except RuntimeError:  # no thread can be started
            return [_hash(tensor) for tensor in tensors]


def _hash(tensor: torch.Tensor) -> str:
    hasher = xxhash.xxh3_128()
    for block in row_major_blocks(tensor):
        hasher.update(block)
    return hasher.hexdigest()


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


def _on_gpu(captured: Mapping[str, Captured]) -> bool:
    return any(tensor.is_cuda for part in captured.values() for tensor in part.tensors.values())


def _tensors(file: TensorFile, captured: Mapping[str, Captured]) -> list[torch.Tensor]:
    return [captured[slot.component].tensors[slot.key] for slot in file.slots]
