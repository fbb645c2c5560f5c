"""Writing from live memory while training goes on: software copy-on-write.

Parameters and optimizer state change in one place, ``Optimizer.step``. So they are written from where they are, and a
hook before the step copies whatever is not written by then. Everything else is copied when ``save`` is called.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import xxhash
from torch import nn

from checkpointer.arena import Arena, is_flat
from checkpointer.errors import SaveError
from checkpointer.memory import Region

BLOCK = 1 << 20
"""Bytes copied out of live memory at a time. The hook waits for one such copy at most."""

WORTH_TIMING = 4 << 20
"""Bytes. Copies of less say nothing about the memory's speed."""

logger = logging.getLogger("checkpointer")

Place = tuple[int, int]
"""Address and bytes of a tensor's memory."""


class LiveTensor:
    """A tensor that is written from live memory. ``position`` bytes of it are out already."""

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self.name = name
        self.tensor = tensor
        self.version = tensor._version  # noqa: SLF001  the one public trace of a write
        self.address, self.size = place_of(tensor)
        self.position = 0
        self.copy: memoryview | None = None
        """The bytes from ``position`` on, once they had to be copied."""

    @property
    def torn(self) -> bool:
        """Whether somebody wrote to it since: a changed version proves it, an equal one proves nothing."""
        return self.tensor._version != self.version  # noqa: SLF001


class LiveState:
    """All live tensors of one save. The writer takes their bytes; ``detach`` copies what it has not taken yet."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._tensors: list[LiveTensor] = []
        self._lock = threading.Lock()
        self._taken = threading.Event()
        self._bounce = Region(BLOCK)
        self._left = 0
        """Bytes that the writer has not taken yet."""
        self._detached = False
        self._torn: str | None = None
        self.bytes_per_second: float | None = None
        """How fast ``detach`` copied, if it was enough to tell."""

    def add(self, name: str, tensor: torch.Tensor) -> LiveTensor:
        """One more tensor; before the writer starts."""
        live = LiveTensor(name, tensor)
        self._tensors.append(live)
        self._left += live.size
        return live

    def blocks(self, live: LiveTensor) -> Iterator[memoryview]:
        """The bytes of one tensor. Each block is valid until the next one is asked for."""
        while live.position < live.size:
            with self._lock:
                block = self._take(live)
            if self._torn is not None:
                raise SaveError(_torn_message(self._torn))
            yield block

    def detach(self) -> None:
        """Copy what the writer has not taken yet: afterwards the live tensors may change. Never raises."""
        try:
            with self._lock:
                self._copy_rest()
        except Exception:  # no reason for ending a run: training waits until it is written
            logger.warning("could not copy what is not saved yet: training waits for the writer", exc_info=True)
            self._taken.wait()

    def end(self) -> None:
        """The save has ended, well or not: nobody needs the live tensors any more."""
        self._detached = True
        self._taken.set()

    def _take(self, live: LiveTensor) -> memoryview:
        size = min(BLOCK, live.size - live.position)
        if live.copy is not None:
            start = len(live.copy) - (live.size - live.position)
            block = live.copy[start : start + size]
        else:
            ctypes.memmove(self._bounce.address, live.address + live.position, size)
            self._note_torn(live)
            block = self._bounce.view[:size]
        live.position += size
        self._left -= size
        if not self._left:
            self._taken.set()
        return block

    def _copy_rest(self) -> None:
        if self._detached:
            return
        rest = [live for live in self._tensors if live.position < live.size]
        memory = self._arena.reserve(sum(live.size - live.position for live in rest))
        spans = []
        offset = 0
        for live in rest:
            size = live.size - live.position
            spans.append((offset, live.address + live.position, size))
            live.copy = memory[offset : offset + size]
            offset += size
        began = time.perf_counter()
        try:
            self._arena.fill_from_memory(spans)
        except BaseException:
            for live in rest:
                live.copy = None
            raise
        for live in rest:
            self._note_torn(live)
        self._detached = True
        if offset >= WORTH_TIMING:
            self.bytes_per_second = offset / (time.perf_counter() - began)

    def _note_torn(self, live: LiveTensor) -> None:
        if live.torn and self._torn is None:
            self._torn = live.name


def _torn_message(name: str) -> str:
    return (
        f"{name} was changed while it was being written, and not by Optimizer.step: what was written is neither the "
        "state at the save call nor the one after, so it was not committed. In lazy mode call mgr.staged() before you "
        "change parameters by hand, or use write: {mode: async}"
    )


def lazy_places(optimizers: Iterable[torch.optim.Optimizer], modules: Iterable[nn.Module]) -> set[Place]:
    """Where the tensors lie that nothing but the step of one of these optimizers changes.

    These are parameters and state of the optimizers, in host memory and row-major, but for the parameters that the
    forward pass of a module changes too. Empty where a step may run without its hooks (CUDA graphs).
    """
    found: set[Place] = set()
    for optimizer in optimizers:
        if not getattr(type(optimizer).step, "hooked", False):
            continue
        for group in optimizer.param_groups:
            if group.get("capturable") or group.get("differentiable"):
                return set()
            for parameter in group["params"]:
                _add(found, parameter)
                _add_all(found, optimizer.state.get(parameter))
    for module in modules:
        for inner in module.modules():
            if getattr(inner, "max_norm", None) is not None and isinstance(inner, (nn.Embedding, nn.EmbeddingBag)):
                found.discard(place_of(inner.weight))
    return found


def place_of(tensor: torch.Tensor) -> Place:
    """Address and size of a tensor's memory."""
    return tensor.data_ptr(), tensor.numel() * tensor.element_size()


def _add(found: set[Place], tensor: Any) -> None:
    if type(tensor) in (torch.Tensor, nn.Parameter) and is_flat(tensor) and not tensor.is_inference():
        found.add(place_of(tensor))


def _add_all(found: set[Place], state: Any) -> None:
    if isinstance(state, torch.Tensor):
        _add(found, state)
    elif isinstance(state, Mapping):
        for value in state.values():
            _add_all(found, value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            _add_all(found, value)


class LazyFile:
    """A file's tensors, some of them live, the others in an arena."""

    steady = False

    def __init__(self, state: LiveState, slots: Sequence[LiveTensor | memoryview]) -> None:
        self._state = state
        self._slots = slots

    def pieces(self, hashes: list[str]) -> Iterator[memoryview]:
        """All bytes in order; the hash of each tensor is appended to ``hashes``."""
        for slot in self._slots:
            hasher = xxhash.xxh3_128()
            for block in self._state.blocks(slot) if isinstance(slot, LiveTensor) else _cut(slot):
                hasher.update(block)
                yield block
            hashes.append(hasher.hexdigest())


def _cut(memory: memoryview) -> Iterator[memoryview]:
    return (memory[start : start + BLOCK] for start in range(0, len(memory), BLOCK))
