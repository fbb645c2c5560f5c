"""Where the bytes of a restore go: tensors as targets of ``CheckpointReader.read``."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from checkpointer.format.index import Chunk
from checkpointer.staging.arena import is_flat
from checkpointer.staging.gpu import BOUNCE_SIZE, bounce_buffer
from checkpointer.state.modes import writing_to
from checkpointer.state.tensors import host_bytes, raw
from checkpointer.system.memory import view_of


class TensorTarget:
    """One chunk of a tensor as the target of a read: its own memory where the chunk is contiguous there."""

    __slots__ = ("_box",)

    def __init__(self, tensor: torch.Tensor, chunk: Chunk) -> None:
        self._box = tensor
        if chunk.lengths != tensor.shape:
            self._box = tensor.detach()
            for dimension, (offset, length) in enumerate(zip(chunk.offsets, chunk.lengths, strict=True)):
                self._box = self._box.narrow(dimension, offset, length)

    def memory(self) -> memoryview | None:
        return view_of(self._box.data_ptr(), self._box.nbytes) if is_flat(self._box) else None

    def blocks(self) -> Iterator[memoryview]:
        for part in _parts(raw(self._box)):
            buffer = bounce_buffer(part.device)[: part.nbytes]
            yield host_bytes(buffer)
            with writing_to(part):
                part.copy_(buffer.view(part.dtype).view(part.shape))


def _parts(box: torch.Tensor) -> Iterator[torch.Tensor]:
    """Views that are small, and one behind the other in row-major order."""
    size = box.numel() * box.element_size()
    if size <= BOUNCE_SIZE:
        yield box
        return
    rows = BOUNCE_SIZE * len(box) // size
    for start in range(0, len(box), max(rows, 1)):
        yield from [box[start : start + rows]] if rows else _parts(box[start])
