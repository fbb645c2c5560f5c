"""Whether saves come faster than they can be written: a pure function, with what that costs as its reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from checkpointer.policy.values import roughly

IN_A_ROW = 3
"""A disk that hiccups makes one save wait, and sometimes two."""

_SHARE = 0.1
"""A wait counts if it takes this part of the time between two saves."""

_MUCH = 30.0
"""Seconds that a run has to lose altogether: nobody misses less, and loops that only try something out lose less."""


@dataclass(frozen=True)
class Wait:
    """What one save has waited for the one before."""

    seconds: float
    between: float
    """Seconds from the call of the save before to the end of the wait."""


def too_often(waits: Sequence[Wait], lost: float) -> str | None:
    """What the last saves have cost training, if each of them waited for a good part of its time; else ``None``.

    ``waits`` are those of the saves that were due, in order; ``lost`` is what all saves of the run have waited, in
    seconds.
    """
    last = waits[-IN_A_ROW:]
    if len(last) < IN_A_ROW or lost < _MUCH:
        return None
    if not all(wait.seconds > 0 and wait.seconds >= _SHARE * wait.between for wait in last):
        return None
    seconds, between = sum(wait.seconds for wait in last), sum(wait.between for wait in last)
    return f"the last {len(last)} have waited {roughly(seconds)} of the {roughly(between)} between them"


__all__ = ["IN_A_ROW", "Wait", "too_often"]
