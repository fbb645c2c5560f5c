"""Errors as messages, so that all ranks raise the one that some of them have met."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from checkpointer import errors
from checkpointer.errors import CheckpointerError, SaveError

LONGEST = 20_000
"""Characters of one rank's words."""


class Failure(NamedTuple):
    """What another rank is told of an error."""

    kind: str
    """The name of its class, which is looked up among ours alone."""
    text: str
    errno: int | None = None


def failure(error: BaseException) -> Failure:
    """An error as a message."""
    number = error.errno if isinstance(error, OSError) else None
    kind = type(error).__name__ if isinstance(error, CheckpointerError) else "SaveError"
    told = str(error) if isinstance(error, CheckpointerError) else f"{type(error).__name__}: {error}"
    return Failure(kind, told[:LONGEST].encode("utf-8", "backslashreplace").decode(), number)


def joined(what: str, failed: Mapping[int, Failure], size: int) -> CheckpointerError:
    """One error for what several ranks have met."""
    kinds = {heard.kind for heard in failed.values()}
    told = "; ".join(f"rank {rank} of {size}: {heard.text}" for rank, heard in sorted(failed.items())[:8])
    numbers = {heard.errno for heard in failed.values()}
    kind = kinds.pop() if len(kinds) == 1 else "SaveError"
    return as_error(Failure(kind, f"{what} failed: {told}", numbers.pop() if len(numbers) == 1 else None))


def as_error(heard: Failure) -> CheckpointerError:
    """The error that another rank has met."""
    found = getattr(errors, heard.kind, None) if heard.kind in errors.__all__ else None
    kind = found if isinstance(found, type) and issubclass(found, CheckpointerError) else SaveError
    error = kind(heard.text)
    if isinstance(error, OSError):
        error.errno = heard.errno
    return error
