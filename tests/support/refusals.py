"""Files that the system does not let anybody read: by their mode, or as an error that is put into the storage."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import errno
import fnmatch
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from checkpointer.storage import Storage, wrapping

_CAPABILITIES = 0x20080522
"""The version of the interface to capabilities that knows 64 of them, in two halves."""

_OVER_MODES = 0b1110
"""CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH and CAP_FOWNER: what lets root read and write whatever the modes say."""


class _Half(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


@contextlib.contextmanager
def obeying_modes() -> Iterator[None]:
    """Inside, this thread and those that it starts obey the modes of files, though the tests may run as root."""
    if os.geteuid():
        yield
        return
    if sys.platform != "linux":
        pytest.skip("root may read everything here")
    system = ctypes.CDLL(None, use_errno=True)
    header, halves = (ctypes.c_uint32 * 2)(_CAPABILITIES, 0), (_Half * 2)()
    assert system.capget(header, halves) == 0
    before = halves[0].effective
    halves[0].effective &= ~_OVER_MODES
    if system.capset(header, halves):
        pytest.skip("privileges cannot be dropped here")
    try:
        yield
    finally:
        halves[0].effective = before
        assert system.capset(header, halves) == 0


class Refusal:
    """The reading of what matches ``path`` fails with ``code``, on any storage that is opened inside ``refusing``."""

    def __init__(self, path: str, code: str = "EACCES") -> None:
        self.path = path
        self.number = getattr(errno, code)
        self.ended = False

    def check(self, path: str) -> None:
        if not self.ended and fnmatch.fnmatch(path, self.path):
            raise OSError(self.number, os.strerror(self.number), path)


@contextlib.contextmanager
def refusing(path: str, code: str = "EACCES") -> Iterator[Refusal]:
    refusal = Refusal(path, code)
    with wrapping(lambda storage: _refused(storage, refusal)):
        yield refusal


def _refused(storage: Storage, refusal: Refusal) -> Storage:
    made: Any = copy.copy(storage)

    def checked(operation: Callable[..., Any]) -> Callable[..., Any]:
        def carried_out(path: str, *rest: Any) -> Any:
            refusal.check(path)
            return operation(path, *rest)

        return carried_out

    def read_many(paths: Sequence[str], limit: int) -> list[bytes | Exception]:
        return [_attempt(made.read, path, limit) for path in paths]

    for name in ("read", "open", "list_directory"):
        setattr(made, name, checked(getattr(made, name)))
    made.read_many = read_many
    checked_storage: Storage = made
    return checked_storage


def _attempt(operation: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return operation(*arguments)
    except OSError as error:
        return error
