"""Errors as JSON, so that all ranks raise the one that some of them have met."""

from __future__ import annotations

from typing import Any

from checkpointer import errors
from checkpointer.errors import CheckpointerError, SaveError
from checkpointer.format.index import Json

LONGEST = 20_000
"""Characters of one rank's words."""


def failure(error: BaseException) -> dict[str, Any]:
    """An error as JSON: its class by name, which is looked up among ours alone."""
    number = error.errno if isinstance(error, OSError) else None
    kind = type(error).__name__ if isinstance(error, CheckpointerError) else "SaveError"
    told = str(error) if isinstance(error, CheckpointerError) else f"{type(error).__name__}: {error}"
    return {"error": kind, "text": told[:LONGEST].encode("utf-8", "backslashreplace").decode(), "errno": number}


def joined(what: str, failed: dict[int, dict[str, Any]], size: int) -> CheckpointerError:
    """One error for what several ranks have met."""
    kinds = {str(heard.get("error")) for heard in failed.values()}
    told = "; ".join(f"rank {rank} of {size}: {heard.get('text')}" for rank, heard in sorted(failed.items())[:8])
    error = _class_named(kinds.pop() if len(kinds) == 1 else "SaveError")(f"{what} failed: {told}")
    numbers = {heard.get("errno") for heard in failed.values()}
    if isinstance(error, OSError):
        error.errno = numbers.pop() if len(numbers) == 1 else None
    return error


def opened(heard: dict[str, Any]) -> Json:
    """What another rank has said, or the error that it has said instead."""
    if "value" in heard:
        value: Json = heard["value"]
        return value
    error = _class_named(str(heard.get("error")))(str(heard.get("text")))
    if isinstance(error, OSError):
        error.errno = heard.get("errno")
    raise error


def _class_named(name: str) -> type[CheckpointerError]:
    found = getattr(errors, name, None) if name in errors.__all__ else None
    return found if isinstance(found, type) and issubclass(found, CheckpointerError) else SaveError
