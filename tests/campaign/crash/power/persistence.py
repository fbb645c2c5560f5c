"""What a power cut may leave of a recorded run.

The persistence model, weaker than any file system that we know of:

- The power goes between any two operations, or in the middle of a write.
- What was fsynced before is there: an fsync of a file makes its bytes, its size and its mode durable, not its name; an
  fsync of a directory makes the names in it durable. A rename between two directories is sure only after both of them
  have been fsynced.
- Every other operation on names (create, mkdir, link, unlink, rmdir, rename, exchange) may be lost or not, alone,
  whatever happened to those before and after it, in the same directory or in others; each as a whole.
- A file that was changed since its last fsync may hold what it held before, all of it, a part of it (in sectors of 512
  bytes), its whole length with zeros, or with what the disk held there earlier, instead of the new bytes, or any
  length that it has had.

All of that is enumerated where it is little; else all states that lose, or keep, one or two things, every prefix in
time, and a seeded sample of the others.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tests.campaign.crash.power.record import FSYNC, File, Names, Record, Tree, apply_names

SECTOR = 512
"""Bytes that a disk writes at once."""

GARBAGE = hashlib.shake_128(b"what the disk held before").digest(1 << 16)


@dataclass(frozen=True)
class Effort:
    """How many states are looked at after each operation."""

    exhaustive: int
    """All of them, where there are at most so many."""
    sample: int
    """Else so many random ones beside the systematic ones."""
    pairs: bool = True
    """Whether each pair of operations is lost, too."""


class Cut:
    """The moment after the first ``end`` operations of a record."""

    def __init__(self, record: Record, end: int, pending: Mapping[int, frozenset[int]]) -> None:
        self.end = end
        self._record = record
        self._names = [number for number in pending if record.operations[number].changes]
        self._changed: dict[int, list[int]] = {}
        for number in pending:
            inode = record.operations[number].inode
            if inode is not None:
                self._changed.setdefault(inode, []).append(number)

    @functools.cached_property
    def _whole(self) -> Mapping[int, File]:
        """The files as every process sees them."""
        return self._record.tree(self.end).files

    @functools.cached_property
    def _files(self) -> dict[int, list[File]]:
        """What those may hold that were changed since their last fsync, all of it first."""
        return {inode: self._variants(inode) for inode in self._changed}

    @functools.cached_property
    def _sure(self) -> tuple[Names, list[int]]:
        """The names that nothing since has made uncertain, and the operations on names from the first uncertain one."""
        names: Names = dict(self._record.start.names)
        first = min(self._names, default=self.end)
        for operation in self._record.operations[:first]:
            apply_names(operation, names)
        rest = [number for number in range(first, self.end) if self._record.operations[number].changes]
        return names, rest

    @property
    def combinations(self) -> int:
        """Upper bound for the number of different states."""
        count = 1 << len(self._names)
        for variants in self._files.values():
            count *= len(variants)
        return count

    def explains(self, tree: Tree) -> bool:
        """Whether ``tree`` may be left, if this file system keeps the order of operations on names, as journals do."""
        found = {path: tree.files.get(inode) for path, inode in tree.walk()}
        for lost in (frozenset(self._names[start:]) for start in range(len(self._names) + 1)):
            state = self._state(lost, {})
            if all(
                path in found and self._may_hold(inode, state.files.get(inode), found[path])
                for path, inode in state.walk()
            ) and len(found) == sum(1 for _ in state.walk()):
                return True
        return False

    def _may_hold(self, inode: int, whole: File | None, found: File | None) -> bool:
        """Whether a file may be ``found`` so; each of its sectors is an old one, a new one, or was never written."""
        if whole is None or found is None:
            return whole is found
        if inode not in self._changed:
            return whole.data == found.data
        history = self._history(inode)
        if len(found.data) > max(len(file.data) for file in history):
            return False
        sectors = range(0, len(found.data), SECTOR)
        known = [file.data.ljust(len(found.data), b"\0") for file in (*history, File())]
        return all(
            any(
                found.data[start : start + SECTOR] == data[start : start + len(found.data[start : start + SECTOR])]
                for data in known
            )
            for start in sectors
        )

    def states(self, effort: Effort, rng: random.Random) -> Iterator[Tree]:
        """What may be left, one by one; the same may come twice."""
        if self.combinations <= effort.exhaustive:
            for lost in _subsets(self._names):
                for files in itertools.product(*self._files.values()):
                    yield self._state(lost, dict(zip(self._files, files, strict=True)))
            return
        yield from self._systematic(effort)
        for _ in range(effort.sample):
            share = rng.random()
            lost = frozenset(number for number in self._names if rng.random() < share)
            files = {
                inode: rng.choice([*variants, self._shredded(inode, rng)]) for inode, variants in self._files.items()
            }
            yield self._state(lost, files)

    def _systematic(self, effort: Effort) -> Iterator[Tree]:
        everything = frozenset(self._names)
        few = {frozenset(), everything}
        few |= {frozenset([number]) for number in self._names} | {everything - {number} for number in self._names}
        few |= {frozenset(self._names[start:]) for start in range(len(self._names))}
        if effort.pairs:
            few |= {frozenset(pair) for pair in itertools.combinations(self._names, 2)}
        for lost in sorted(few, key=sorted):
            yield self._state(lost, {})
        for inode, variants in self._files.items():
            for variant in variants:
                yield self._state(frozenset(), {inode: variant})
        for which in range(max(map(len, self._files.values()), default=0)):
            together = {inode: variants[min(which, len(variants) - 1)] for inode, variants in self._files.items()}
            yield self._state(frozenset(), together)
            yield self._state(everything, together)

    def _state(self, lost: frozenset[int], files: Mapping[int, File]) -> Tree:
        sure, rest = self._sure
        names = dict(sure)
        for number in rest:
            if number not in lost:
                apply_names(self._record.operations[number], names)
        return Tree(names, {**self._whole, **files})

    def _variants(self, inode: int) -> list[File]:
        """What one file may hold, without the random ones; all of it comes first."""
        lengths = self._history(inode)
        before, whole = lengths[0], lengths[-1]
        if before.data == whole.data:
            return list(dict.fromkeys([whole, before]))
        size = len(whole.data)
        zeros = File(_mixed(before.data, bytes(size), size), whole.mode)
        stale = File(_mixed(before.data, _garbage(size), size), whole.mode)
        half = size // 2 - size // 2 % SECTOR
        head = File(whole.data[:half] + zeros.data[half:], whole.mode)
        tail = File(zeros.data[:half] + whole.data[half:], whole.mode)
        short = File(whole.data[: size // 2], whole.mode)
        return list(dict.fromkeys([whole, before, zeros, short, head, tail, stale, *lengths]))

    def _history(self, inode: int) -> list[File]:
        """The file as it was last fsynced, and after each change since."""
        numbers = self._changed[inode]
        file = self._durable_file(inode, numbers[0])
        found = [file]
        for number in numbers:
            file = self._record.operations[number].applied(file)
            found.append(file)
        return found

    @functools.cache  # noqa: B019  a cut does not live long
    def _durable_file(self, inode: int, before: int) -> File:
        return self._record.tree(before).files[inode]

    def _shredded(self, inode: int, rng: random.Random) -> File:
        """A file of which each sector has come through or not."""
        history = self._history(inode)
        before, whole = history[0].data, history[-1].data
        length = len(rng.choice(history).data) if rng.random() < 0.5 else len(whole)
        lost = _mixed(before, rng.choice([bytes(len(whole)), _garbage(len(whole))]), len(whole))
        sectors = (
            (whole if rng.random() < 0.5 else lost)[start : start + SECTOR] for start in range(0, len(whole), SECTOR)
        )
        return File(b"".join(sectors)[:length].ljust(length, b"\0"), history[-1].mode)


def cuts(record: Record) -> Iterator[Cut]:
    """Every moment at which the power may go."""
    pending: dict[int, frozenset[int]] = {}
    yield Cut(record, 0, {})
    for number, operation in enumerate(record.operations):
        if operation.kind == FSYNC:
            assert operation.inode is not None
            left = {earlier: inodes - {operation.inode} for earlier, inodes in pending.items()}
            pending = {earlier: inodes for earlier, inodes in left.items() if inodes}
        elif operation.waits_for:
            pending[number] = operation.waits_for
        yield Cut(record, number + 1, pending)


def fingerprint(tree: Tree) -> int:
    """The same for file systems with the same names and bytes, in one process."""
    files = tree.files
    return hash(frozenset((path, files[inode].digest if inode in files else b"") for path, inode in tree.walk()))


def _subsets(numbers: list[int]) -> Iterator[frozenset[int]]:
    for size in range(len(numbers) + 1):
        yield from map(frozenset, itertools.combinations(numbers, size))


def _mixed(before: bytes, lost: bytes, size: int) -> bytes:
    """``before``, grown to ``size`` bytes of which the new ones were lost."""
    return (before + lost[len(before) :])[:size]


def _garbage(size: int) -> bytes:
    return (GARBAGE * (size // len(GARBAGE) + 1))[:size]
