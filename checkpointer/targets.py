"""Where the bytes of a restore go: tensors as targets of :meth:`checkpointer.reading.CheckpointReader.read`."""

from __future__ import annotations

import torch

from checkpointer.index import Chunk
from checkpointer.state.tensors import host_bytes, raw


class TensorTarget:
    """One chunk of a tensor as the target of a read: its own memory where the chunk is contiguous there."""

    def __init__(self, tensor: torch.Tensor, chunk: Chunk) -> None:
        box = tensor.detach()
        for dimension, (offset, length) in enumerate(zip(chunk.offsets, chunk.lengths, strict=True)):
            if length != box.shape[dimension]:
                box = box.narrow(dimension, offset, length)
        self._box = raw(box)
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
