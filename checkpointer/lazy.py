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

from checkpointer import messages
from checkpointer.arena import Arena, Copy, is_flat
from checkpointer.devices import Transfers, copies_beside_training
from checkpointer.digest import Digest
from checkpointer.errors import SaveError
from checkpointer.memory import Part, Ring, copy_memory, part_of_memory
from checkpointer.state.optimizer import STATE
from checkpointer.state.sharded import PLAIN_TYPES, is_sharded, local_part
from checkpointer.tensorfile import Slot

WORTH_TIMING = 4 << 20
"""Bytes. Copies of less say nothing about the memory's speed."""

logger = logging.getLogger("checkpointer")


class LiveTensor:
    """A tensor that is written from live memory. ``position`` bytes of it are out already."""

    __slots__ = ("address", "copy", "position", "size", "slot", "tensor", "version")

    def __init__(self, slot: Slot, tensor: torch.Tensor) -> None:
        self.slot = slot
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
        return self.tensor._version != self.version  # noqa: SLF001


class LiveState:
    """All live tensors of one save. The writer takes their bytes; ``detach`` copies what it has not taken yet."""

    def __init__(self, arena: Arena, tensors: Sequence[LiveTensor], on_gpu: LiveOnGpu) -> None:
        self._arena = arena
        self._tensors = tensors
        self._on_gpu = on_gpu
        self._lock = threading.Lock()
        self._taken = threading.Event()
        self._left = sum(live.size for live in tensors)
        """Bytes that the writer has not taken yet."""
        self._detached = False
        self._torn: str | None = None
        self.bytes_per_second: float | None = None
        """How fast ``detach`` copied, if it was enough to tell."""

    def take(self, live: LiveTensor, target: int, start: int, size: int) -> None:
        """Copy ``size`` bytes of a tensor, from ``start`` on, to the address ``target``; in order.

        Raises:
            SaveError: somebody has changed the tensor since ``save`` was called, and not by a step.
        """
        with self._lock:
            source = live.address if live.copy is None else live.copy
            copy_memory(target, source + start, size)
            if live.copy is None:
                self._note_torn(live)
            live.position = start + size
            self._left -= size
        if not self._left:
            self._taken.set()
        if self._torn is not None:
            raise SaveError(_torn_message(self._torn))

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
        rest = [live for live in self._tensors if live.position < live.size]
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

    def _note_torn(self, live: LiveTensor) -> None:
        if live.torn and self._torn is None:
            self._torn = live.slot.name


class LiveOnGpu:
    """Tensors on GPUs whose copies are on their way to the arena, beside training."""

    def __init__(self, tensors: Sequence[LiveTensor], running: Transfers) -> None:
        self._tensors = tensors
        self._running = running
        self._lock = threading.Lock()
        self._settled = False
        self._torn: str | None = None

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
        if self._torn is not None:
            raise SaveError(_torn_message(self._torn))

    def _settle(self) -> None:
        """The last moment before changes are expected."""
        self._settled = True
        self._torn = next((live.slot.name for live in self._tensors if live.torn), None)


def _torn_message(name: str) -> str:
    return (
        f"{name} was changed while it was being written, and not by Optimizer.step: what was written is neither the "
        "state at the save call nor the one after, so it was not committed. In lazy mode call mgr.staged() before you "
        "change parameters by hand, or use write: {mode: async}"
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
        return found and (is_flat(tensor) or copies_beside_training(tensor)) and not tensor.is_inference()


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
            parts = [local_part(item) for item in group["params"] if type(item) in PLAIN_TYPES or is_sharded(item)]
            parameters.update((part.data_ptr(), part.nbytes) for part in parts)
    for module in modules:
        for inner in module.modules():
            if isinstance(inner, (nn.Embedding, nn.EmbeddingBag)) and inner.max_norm is not None:
                parameters.pop(inner.weight.data_ptr(), None)
    return Stepped(frozenset(names), parameters)


class LazyFile:
    """A file's tensors: some of them live, the others copied."""

    steady = True

    def __init__(self, state: LiveState, slots: Sequence[LiveTensor | Copy], memory: int, ring: Ring) -> None:
        """``memory``: the address that the offsets of copies count from."""
        self._state = state
        self._ring = ring
        self._slots = slots
        self._memory = memory

    def pieces(self, digest: Digest) -> Iterator[memoryview]:
        """All bytes in order, in blocks; ``digest`` sees them on the way."""
        self._state.arrived()
        for block in self._ring.gather(map(self._part, self._slots)):
            digest.update(block)
            yield block

    def _part(self, slot: LiveTensor | Copy) -> Part:
        if isinstance(slot, LiveTensor):
            return Part(slot.size, partial(self._state.take, slot))
        return part_of_memory(self._memory + slot.offset, slot.size)
