"""What is learned of a file's bytes as they pass on their way to the disk: hashes, and whether values are finite."""

from __future__ import annotations

from collections.abc import Collection

import xxhash

from checkpointer.finite import all_finite
from checkpointer.tensorfile import TensorFile


class Digest:
    """Takes the bytes of a file's tensors, in order, tensor by tensor."""

    def __init__(self, file: TensorFile, learned: Collection[tuple[str, str]] = ()) -> None:
        """``learned``: (component, key) of tensors that are looked at for NaN and infinities."""
        self.hashes: list[str] = []
        """The xxh3-128 of each tensor that has passed."""
        self.not_finite: list[str] = []
        """Names of tensors with NaN or infinities."""
        self._names = [f"{slot.component}.{slot.key}" for slot in file.slots]
        self._looked_at = [
            spec.dtype if (slot.component, slot.key) in learned else ""
            for slot, spec in zip(file.slots, file.specs, strict=True)
        ]
        self._hasher = xxhash.xxh3_128()

    def update(self, block: memoryview) -> None:
        """The next bytes of the current tensor: whole elements."""
        self._hasher.update(block)
        dtype = self._looked_at[len(self.hashes)]
        if dtype and not all_finite(dtype, block):
            self.not_finite.append(self._names[len(self.hashes)])
            self._looked_at[len(self.hashes)] = ""

    def end_tensor(self) -> None:
        """The current tensor has passed."""
        self.hashes.append(self._hasher.hexdigest())
        self._hasher.reset()
