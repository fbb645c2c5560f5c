"""GPUs: host memory that they copy to at the bus's speed, and copies that run while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from checkpointer.staging.sample import LINE, Integers, Items, comb
from checkpointer.state.tensors import raw
from checkpointer.system.memory import Region, view_of

BOUNCE_SIZE = 4 << 20
"""Bytes that wait in each reading thread on their way to another device, or to memory that is not row-major."""

_bounces = threading.local()


class Transfer(NamedTuple):
    """The row-major bytes of a tensor, and the address in host memory where they go."""

    tensor: torch.Tensor
    target: int


def pin(region: Region) -> bool:
    """Register ``region`` with CUDA; where the driver refuses, copies are only slower."""
    return int(torch.cuda.cudart().cudaHostRegister(region.address, region.size, 0)) == 0


def unpin(region: Region) -> None:
    """Take back what ``pin`` did, before the memory is freed."""
    torch.cuda.cudart().cudaHostUnregister(region.address)


def copy_out(transfers: Iterable[Transfer], *, pinned: bool) -> None:
    """Copy from any device and of any strides; when this returns the bytes are there."""
    devices = set()
    for tensor, target in transfers:
        _start(tensor, target, non_blocking=pinned)
        if tensor.is_cuda:
            devices.add(tensor.device)
    for device in devices:
        torch.cuda.current_stream(device).synchronize()


def copy_bytes_out(tensor: torch.Tensor, target: int, start: int, count: int) -> None:
    """Copy ``count`` of the bytes of a tensor that is row-major on any device, from byte ``start`` on."""
    flat = raw(tensor).view(-1).view(torch.uint8)
    torch.frombuffer(view_of(target, count), dtype=torch.uint8).copy_(flat[start : start + count])


def is_row_major(tensor: torch.Tensor) -> bool:
    """Whether the row-major bytes of a tensor are what lies from ``data_ptr()`` on, on its device."""
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def bounce_buffer(device: torch.device) -> torch.Tensor:
    """Bytes that this thread uses again for each piece that it brings to ``device``: pinned where that helps."""
    pinned = device.type == "cuda"
    found: torch.Tensor | None = getattr(_bounces, "pinned" if pinned else "plain", None)
    if found is None:
        found = torch.empty(BOUNCE_SIZE, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        setattr(_bounces, "pinned" if pinned else "plain", found)
    return found


class Transfers:
    """Copies from GPUs into pinned memory that nobody waits for until it must.

    They begin when what the current stream was given before is done. Those ``in_order`` are next there, so whatever
    it is given later comes after them. Those ``beside`` run on a stream of their own: whoever changes these tensors has
    to call ``order_before_changes`` first. Then the GPU, and not this process, waits for what is not copied yet.
    """

    def __init__(self, beside: Sequence[Transfer], in_order: Sequence[Transfer] = ()) -> None:
        self._tensors = [transfer.tensor for transfer in (*beside, *in_order)]
        """Their memory must not be given to others."""
        self._beside = []
        self._in_order = []
        for device in dict.fromkeys(tensor.device for tensor in self._tensors):
            stream, own = torch.cuda.current_stream(device), side_stream(device)
            own.wait_stream(stream)
            with torch.cuda.stream(own):
                _start_those_on(device, beside)
                self._beside.append((device, own.record_event()))
            with torch.cuda.stream(stream):
                _start_those_on(device, in_order)
                self._in_order.append(stream.record_event())

    @property
    def done(self) -> bool:
        """Whether every byte has been copied."""
        return all(copied.query() for copied in self._events())

    def order_before_changes(self) -> None:
        """Whatever the current streams are given from now on happens after the copies."""
        for device, copied in self._beside:
            torch.cuda.current_stream(device).wait_event(copied)

    def wait(self) -> None:
        """Until every byte is there."""
        for copied in self._events():
            copied.synchronize()

    def _events(self) -> list[torch.cuda.Event]:
        return [*(copied for _, copied in self._beside), *self._in_order]


class Noted(NamedTuple):
    """A sample of tensors on one device, which that device has taken."""

    rows: torch.Tensor
    """uint8[items, width]."""
    tensors: Integers
    """The number of the tensor that each item is of."""
    places: Integers

    def items(self, address: int, *, first: int) -> Items:
        """The same in host memory, once ``rows`` have been copied to ``address``; numbers count from ``first``."""
        rows = np.frombuffer(view_of(address, self.rows.nbytes), dtype=np.uint8).reshape(self.rows.shape)
        return Items(self.tensors + first, self.places, rows)


def note_on_device(tensors: Sequence[tuple[torch.Tensor, int]], seed: int) -> Iterator[Noted]:
    """Sample row-major tensors, each with the place of its bytes. The current streams do it; nobody waits for them."""
    for device in dict.fromkeys(tensor.device for tensor, _ in tensors):
        for small in (False, True):
            chosen = [
                (number, tensor, place)
                for number, (tensor, place) in enumerate(tensors)
                if tensor.device == device and tensor.nbytes and (tensor.nbytes < LINE) is small
            ]
            if chosen:
                noted = [_note(tensor, seed) for _, tensor, _ in chosen]
                yield Noted(
                    torch.cat([rows for rows, _ in noted]),
                    np.repeat([number for number, _, _ in chosen], [len(rows) for rows, _ in noted]),
                    np.concatenate([item[2] + offsets for item, (_, offsets) in zip(chosen, noted, strict=True)]),
                )


def _note(tensor: torch.Tensor, seed: int) -> tuple[torch.Tensor, Integers]:
    """Rows of bytes as views of ``tensor``, and the offset of each: some lines, or every byte of a small one."""
    flat = raw(tensor).view(-1).view(torch.uint8)
    if tensor.nbytes < LINE:
        return flat.view(-1, 1), np.arange(len(flat))
    lines = comb(tensor.nbytes, seed)
    first = int(flat.storage_offset()) + lines.first
    return flat.as_strided((lines.lines, LINE), (lines.step, 1), first), lines.offsets


def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Where copies run that training need not wait for."""
    return torch.cuda.Stream(device)


def _start_those_on(device: torch.device, transfers: Iterable[Transfer]) -> None:
    for tensor, target in transfers:
        if tensor.device == device:
            _start(tensor, target, non_blocking=True)


def _start(tensor: torch.Tensor, target: int, *, non_blocking: bool) -> None:
    if not tensor.numel():
        return
    bits = raw(tensor)
    memory = torch.frombuffer(view_of(target, bits.nbytes), dtype=bits.dtype).view(bits.shape)
    memory.copy_(bits, non_blocking=non_blocking)
