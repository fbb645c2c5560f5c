"""What the ranks of a job tell each other: small values, through the job's own key-value store.

No collective: those belong to the training thread and to the user's groups, and after one has timed out the group is
of no use. Every exchange has keys of its own, so a rank that is late, or gone, confuses no later one, and each wait has
a limit after which the error names the ranks that were missing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

Value = TypeVar("Value")


class Exchange(Protocol):
    """One exchange: the ranks say something, the coordinator decides, and all hear of it.

    All ranks make the same calls in the same order: ``gather`` first, and at last ``broadcast`` or ``scatter``, for
    what comes behind it is heard by nobody. ``kind`` is the type of what is said, one that msgspec decodes: a named
    tuple, a dataclass, a list of strings. What arrives is checked against it.
    """

    def gather(self, value: Value, kind: type[Value]) -> list[Value] | None:
        """What all ranks have said, by rank, on the coordinator; ``None`` on the others, which wait for nobody.

        What they say goes out when they wait for the coordinator, or at the end of the block.
        """

    def broadcast(self, value: Value | None, kind: type[Value]) -> Value:
        """What the coordinator says, on every rank; what others pass is ignored."""

    def scatter(self, values: Sequence[Value] | None, kind: type[Value]) -> Value:
        """What the coordinator says to this rank: it passes one value for each."""

    def arrive(self) -> None:
        """Say that this rank is here: the coordinator returns once all are, the others at once."""

    def release(self) -> None:
        """Return once the coordinator has come here."""

    def barrier(self) -> None:
        """Return once all ranks have come here: both of these."""


class Ranks(Protocol):
    """The ranks of this job."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def channel(self) -> str:
        """Exchanges on different channels may overlap; those on one have to be in the same order on every rank."""

    def exchange(self, what: str) -> AbstractContextManager[Exchange]:
        """Begin an exchange; ``what`` names it in errors: ``the save of step 5``.

        An error that leaves the block on one rank is told to the others, which raise one of the same class, where
        that is one of ours, that names the rank. After the last ``broadcast`` it is that rank's alone.

        Raises:
            CheckpointerError: on all ranks, if any has failed before it had its answer.
        """

    def beside(self, channel: str) -> Ranks:
        """The same ranks, for exchanges that may overlap these."""


class Alone:
    """A process without others."""

    rank, size, channel = 0, 1, ""

    def exchange(self, what: str) -> AbstractContextManager[Exchange]:
        del what
        return contextlib.nullcontext(_ToItself())

    def beside(self, channel: str) -> Ranks:
        del channel
        return self


class _ToItself:
    """What a process that is alone says, it hears: the same objects."""

    def gather(self, value: Value, kind: type[Value]) -> list[Value] | None:
        del kind
        return [value]

    def broadcast(self, value: Value | None, kind: type[Value]) -> Value:
        del kind
        return value  # type: ignore[return-value]  # None only where that is what is said

    def scatter(self, values: Sequence[Value] | None, kind: type[Value]) -> Value:
        del kind
        assert values is not None, "the coordinator has a value for each rank"
        return values[0]

    def arrive(self) -> None:
        """There is nobody to wait for."""

    release = barrier = arrive
