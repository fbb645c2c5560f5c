"""Writing from live memory while training goes on: software copy-on-write.

Parameters and optimizer state change in one place, ``Optimizer.step``. So they are written from where they are, and a
hook before the step copies whatever is not written by then. Everything else is copied when ``save`` is called.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from checkpointer.errors import SaveError
from checkpointer.format.tensor_files import Slot
from checkpointer.staging.arena import Arena, Copy
from checkpointer.staging.digest import Digest
from checkpointer.staging.gpu import Transfers, is_row_major
from checkpointer.staging.sample import Sample
from checkpointer.state.dtensor import PLAIN_TYPES, is_sharded, local_part
from checkpointer.state.optimizer.adapter import STATE
from checkpointer.system import messages
from checkpointer.system.memory import MemoryPart, Ring, copy_memory, part_of_memory

WORTH_TIMING = 4 << 20
"""Bytes. Copies of less say nothing about the memory's speed."""

logger = logging.getLogger("checkpointer")


class LiveTensor:
    """A tensor that is written from live memory. ``position`` bytes of it are out already."""

    __slots__ = ("address", "copy", "place", "position", "size", "slot", "tensor", "version")

    def __init__(self, slot: Slot, tensor: torch.Tensor, place: int) -> None:
        """``place``: where its bytes go in all that the save writes, one file behind the other."""
        self.slot = slot
        self.place = place
        # An alias has the same version, and keeps the memory where somebody replaces ``parameter.data``.
        self.tensor = tensor if type(tensor) is torch.Tensor else tensor.detach()
        self.version = tensor._version  # noqa: SLF001  the one public trace of a write
        self.address = tensor.data_ptr()
        self.size = slot.end - slot.begin
        self.position = 0
        self.copy: int | None = None
        """Address of the copy, once there had to be one: as if it were whole, though it begins at ``position``."""

    @property
    def torn(self) -> bool:
        """Whether somebody wrote to it since: a changed version proves it, an equal one proves nothing."""
        return self.tensor._version != self.version or self.gone  # noqa: SLF001

    @property
    def gone(self) -> bool:
        """Whether its memory was given back: somebody has changed the size of the storage."""
        return self.size > 0 and self.tensor.data_ptr() != self.address


class LiveState:
    """All live tensors of one save. The writer takes their bytes; ``detach`` copies what it has not taken yet.

    From the call until the writer has all bytes, or ``detach``, nobody may write to them. Versions show some writes;
    ``sample``, noted in the call, shows the others that change more than a few values. It is compared with the bytes
    that are written, and a block later with live memory once more: a write may have been under way while the block was
    copied, and its first bytes elsewhere.
    """

    def __init__(self, arena: Arena, tensors: Sequence[LiveTensor], on_gpu: LiveOnGpu, sample: Sample) -> None:
        """``tensors`` come in the order in which the writer takes them. ``sample`` numbers them, then those on GPUs."""
        self._arena = arena
        self._tensors = tensors
        self._on_gpu = on_gpu
        self._sample = sample
        self._lock = threading.Lock()
        self._taken = threading.Event()
        self._left = sum(live.size for live in tensors)
        """Bytes that the writer has not taken yet."""
        self._taken_to = 0
        """The place behind the last byte that the writer has taken."""
        self._checked_to = 0
        """Up to this place memory was as noted when it had been copied for some time."""
        self._unchecked = 0
        """The first tensor that does not end before that place."""
        self._detached = False
        self._torn: str | None = None
        self.bytes_per_second: float | None = None
        """How fast ``detach`` copied, if it was enough to tell."""

    @property
    def torn(self) -> str | None:
        """The name of a tensor that was changed when it must not be, if that was noticed."""
        return self._torn or self._on_gpu.torn

    def take(self, live: LiveTensor, target: int, start: int, size: int) -> None:
        """Copy ``size`` bytes of a tensor, from ``start`` on, to the address ``target``; in order.

        Raises:
            SaveError: somebody has changed the tensor since ``save`` was called, and not by a step.
        """
        with self._lock:
            if live.copy is not None:
                copy_memory(target, live.copy + start, size)
            else:
                if not live.gone:
                    copy_memory(target, live.address + start, size)
                self._note_torn(live)
            live.position = start + size
            self._taken_to = live.place + live.position
            self._left -= size
        if not self._left:
            self._taken.set()
        self._raise_if_torn()

    def check(self, block: memoryview, place: int) -> None:
        """Compare the sample with a block that is about to be written; what came before, with live memory again.

        ``place``: where the block begins in all that the save writes. At the end of a file it is empty.

        Raises:
            SaveError: as for ``take``.
        """
        changed = self._sample.differs_from(block, place)
        with self._lock:
            self._note_changed(changed)
            self._check_memory(place)
        self._raise_if_torn()

    def detach(self) -> None:
        """Copy what the writer has not taken yet: afterwards the live tensors may change. Never raises."""
        try:
            self._on_gpu.detach()
            with self._lock:
                self._copy_rest()
        except Exception as error:  # noqa: BLE001  no reason for ending a run: training waits until it is written
            text = "could not copy what is not saved yet: training waits for the writer"
            messages.log(logger.warning, text, error=error)
            self._taken.wait()
            with self._lock:
                self._detached = True

    def arrived(self) -> None:
        """Wait until what is copied from GPUs beside training is in the arena.

        Raises:
            SaveError: as for ``take``.
        """
        self._on_gpu.wait()

    def end(self) -> None:
        """The save has ended, well or not: nobody needs the live tensors any more."""
        self._detached = True
        self._taken.set()

    def _copy_rest(self) -> None:
        if self._detached:
            return
        self._check_memory(self._taken_to)
        rest = [live for live in self._tensors if live.position < live.size and not self._note_gone(live)]
        self._arena.reserve(sum(live.size - live.position for live in rest))
        spans = []
        offset = 0
        for live in rest:
            size = live.size - live.position
            spans.append((offset, live.address + live.position, size))
            offset += size
        began = time.perf_counter()
        self._arena.fill_from_memory(spans)
        for live, (start, _, _) in zip(rest, spans, strict=True):
            live.copy = self._arena.address + start - live.position
            self._note_torn(live)
        self._detached = True
        if offset >= WORTH_TIMING:
            self.bytes_per_second = offset / (time.perf_counter() - began)

    def _check_memory(self, place: int) -> None:
        """Compare the sample with live memory, up to ``place``: not once it may be changed."""
        if self._detached:
            return
        begin, self._checked_to = self._checked_to, place
        while self._unchecked < len(self._tensors):
            live = self._tensors[self._unchecked]
            if live.place >= place:
                break
            if self._note_gone(live):
                return
            if live.place + live.size > place:
                break
            self._unchecked += 1
        self._note_changed(self._sample.differs_from_memory(begin, place))

    def _note_changed(self, number: int | None) -> None:
        if number is not None and self._torn is None:
            tensors = (*self._tensors, *self._on_gpu.tensors)
            self._torn = tensors[number].slot.name

    def _note_torn(self, live: LiveTensor) -> None:
        if live.torn and self._torn is None:
            self._torn = live.slot.name

    def _note_gone(self, live: LiveTensor) -> bool:
        if live.gone:
            self._note_torn(live)
        return live.gone

    def _raise_if_torn(self) -> None:
        if self._torn is not None:
            raise SaveError(_torn_message(self._torn))


class LiveOnGpu:
    """Tensors on GPUs whose copies are on their way to the arena, beside training."""

    def __init__(self, tensors: Sequence[LiveTensor], running: Transfers) -> None:
        self.tensors = tensors
        self._running = running
        self._lock = threading.Lock()
        self._settled = False
        self.torn: str | None = None

    def detach(self) -> None:
        """From now on the current streams may be given changes: they wait for the copies. This process does not."""
        with self._lock:
            if not self._settled:
                self._settle()
                self._running.order_before_changes()

    def wait(self) -> None:
        """Until the bytes of all tensors are in the arena.

        Raises:
            SaveError: somebody has changed one since ``save`` was called, and not by a step.
        """
        self._running.wait()
        with self._lock:
            if not self._settled:
                self._settle()
        if self.torn is not None:
            raise SaveError(_torn_message(self.torn))

    def _settle(self) -> None:
        """The last moment before changes are expected."""
        self._settled = True
        self.torn = next((live.slot.name for live in self.tensors if live.torn), None)


def _torn_message(name: str) -> str:
    return (
        f"{name} was changed while it was being written, and not by Optimizer.step: what was written is neither the "
        "state at the save call nor the one after, so it was not committed. In lazy mode call mgr.staged() before you "
        "change parameters by hand (weight clipping, p.data, NumPy views), or use write: {mode: async}, as this run "
        "does from its next save on"
    )


@dataclass(frozen=True)
class Stepped:
    """Which tensors nothing but the step of a registered optimizer changes."""

    optimizers: frozenset[str]
    """Components whose state is such, all of it."""
    parameters: Mapping[int, int]
    """Addresses of parameters, and their size in bytes."""

    def __bool__(self) -> bool:
        return bool(self.optimizers)

    def holds(self, slot: Slot, tensor: torch.Tensor) -> bool:
        """Whether the tensor of ``slot`` is one of them, and can be read as it lies in memory."""
        if slot.component in self.optimizers:
            found = slot.key.startswith(STATE)
        else:
            found = self.parameters.get(tensor.data_ptr()) == slot.end - slot.begin
        # What is not row-major would need room for another copy on the GPU.
        return found and (tensor.is_cpu or tensor.is_cuda) and is_row_major(tensor) and not tensor.is_inference()


def stepped(optimizers: Mapping[str, torch.optim.Optimizer], modules: Iterable[nn.Module]) -> Stepped:
    """What the steps of ``optimizers`` (by component name) alone change.

    That is their state and their parameters, but for those that the forward pass of a module changes too. Nothing at
    all where a step may run without its hooks (CUDA graphs).
    """
    names = []
    parameters: dict[int, int] = {}
    for name, optimizer in optimizers.items():
        if not getattr(type(optimizer).step, "hooked", False):
            continue
        names.append(name)
        for group in optimizer.param_groups:
            if group.get("capturable") or group.get("differentiable"):
                return Stepped(frozenset(), {})
            parameters.update(_memory_of(group["params"]))
    for module in modules:
        for inner in module.modules():
            if isinstance(inner, (nn.Embedding, nn.EmbeddingBag)) and inner.max_norm is not None:
                parameters.pop(inner.weight.data_ptr(), None)
    return Stepped(frozenset(names), parameters)


def _memory_of(parameters: Iterable[torch.Tensor]) -> Iterator[tuple[int, int]]:
    """Address and size in bytes of those that are plain, or in parts that the ranks hold."""
    for parameter in parameters:
        if type(parameter) in PLAIN_TYPES:  # nearly all: no alias is made for each
            yield parameter.data_ptr(), parameter.nbytes
        elif is_sharded(parameter):
            part = local_part(parameter)
            yield part.data_ptr(), part.nbytes


class LazyFile:
    """A file's tensors: some of them live, the others copied."""

    steady = True

    def __init__(
        self, state: LiveState, slots: Sequence[LiveTensor | Copy], place: int, memory: int, ring: Ring
    ) -> None:
        """``place``: of the first byte, in all that the save writes. ``memory``: what offsets of copies count from."""
        self._state = state
        self._place = place
        self._ring = ring
        self._slots = slots
        self._memory = memory

    def pieces(self, digest: Digest) -> Iterator[memoryview]:
        """All bytes in order, in blocks; ``digest`` sees them on the way."""
        self._state.arrived()
        place = self._place
        for block in self._ring.gather(map(self._part, self._slots)):
            self._state.check(block, place)
            place += len(block)
            digest.update(block)
            yield block
        self._state.check(memoryview(b""), place)

    def _part(self, slot: LiveTensor | Copy) -> MemoryPart:
        if isinstance(slot, LiveTensor):
            return MemoryPart(slot.size, partial(self._state.take, slot))
        return part_of_memory(self._memory + slot.offset, slot.size)
