"""What is learned of a file's bytes as they pass on their way to the disk: hashes, and whether values are finite."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

import xxhash

from checkpointer.format.tensor_files import TensorFile
from checkpointer.staging.finite import all_finite


class Digest:
    """Takes all bytes of a file's tensors, in order and in blocks of any size.

    Every operation on a large block lets go of the GIL, and waits for it afterwards where training is busy in Python.
    So there are few of them, on as many bytes as possible.
    """

    def __init__(self, file: TensorFile, trainable: Collection[tuple[str, str]] = ()) -> None:
        """``trainable``: (component, key) of tensors that are looked at for NaN and infinities."""
        self.hashes: list[str] = []
        """The xxh3-128 of each tensor that has passed."""
        self.not_finite: list[str] = []
        """Names of tensors with NaN or infinities, as far as they have passed."""
        self._file = file
        self._position = 0
        self._hasher: xxhash.xxh3_128 | None = None
        """Of the tensor that has passed in part."""
        self._runs = list(_runs(file, trainable))

    def update(self, block: memoryview) -> None:
        """The next bytes: whole elements."""
        begin, end = self._position, self._position + len(block)
        self._position = end
        slots = self._file.slots
        while len(self.hashes) < len(slots):
            slot = slots[len(self.hashes)]
            part = block[max(slot.begin, begin) - begin : min(slot.end, end) - begin] if slot.begin < end else b""
            if slot.end > end:
                self._hasher = self._hasher or xxhash.xxh3_128()
                self._hasher.update(part)
                break
            if self._hasher is None:
                self.hashes.append(xxhash.xxh3_128_hexdigest(part))
            else:
                self._hasher.update(part)
                self.hashes.append(self._hasher.hexdigest())
                self._hasher = None
        self._look(block, begin, end)

    def _look(self, block: memoryview, begin: int, end: int) -> None:
        while self._runs:
            run = self._runs[0]
            first, last = max(run.begin, begin), min(run.end, end)
            if first < last and not all_finite(run.dtype, block[first - begin : last - begin]):
                self._name(run.dtype, block, begin, first, last)
            if run.end > end:
                break
            self._runs.pop(0)

    def _name(self, dtype: str, block: memoryview, begin: int, first: int, last: int) -> None:
        """Which tensors it is that are not finite, between ``first`` and ``last``."""
        for slot in self._file.slots:
            a, b = max(slot.begin, first), min(slot.end, last)
            if a < b and slot.name not in self.not_finite[-1:] and not all_finite(dtype, block[a - begin : b - begin]):
                self.not_finite.append(slot.name)


class _Run(NamedTuple):
    """Neighbouring tensors of one dtype that are looked at."""

    dtype: str
    begin: int
    end: int


def _runs(file: TensorFile, trainable: Collection[tuple[str, str]]) -> Iterator[_Run]:
    dtype, begin, end = "", 0, 0
    for slot, spec in zip(file.slots, file.specs, strict=True):
        if (slot.component, slot.key) not in trainable:
            continue
        if (dtype, end) != (spec.dtype, slot.begin):
            if begin < end:
                yield _Run(dtype, begin, end)
            dtype, begin = spec.dtype, slot.begin
        end = slot.end
    if begin < end:
        yield _Run(dtype, begin, end)
