"""Holds or slows the writer in the middle of a file, so that a race between it and training is certain, not lucky.

``with closed() as gate``: the first save inside is held in a tensor file; ``gate.reached()`` waits for that,
``gate.open()`` lets it go on.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from unittest import mock

from checkpointer.storage import LocalStorage

PATIENCE = 20
"""Seconds. Only a bug takes that long."""


class Gate:
    """Stops the writer once, in the first tensor file whose path has ``file`` in it, when ``pieces`` pieces are taken.

    The first piece is the header of the file, the others are blocks of tensors. A file of fewer stops it at its end.
    """

    def __init__(self, *, pieces: int = 1, file: str = "") -> None:
        self._pieces = pieces
        self._file = file
        self._reached = threading.Event()
        self._open = threading.Event()

    def reached(self) -> None:
        """Wait until the writer is held."""
        assert self._reached.wait(PATIENCE), "the writer did not come"

    def open(self) -> None:
        """Let the writer go on."""
        self._open.set()

    def _held(self, pieces: Iterable[Any]) -> Iterator[Any]:
        for number, piece in enumerate(pieces, 1):
            yield piece
            if number == self._pieces:
                self._hold()
        self._hold()

    def _hold(self) -> None:
        if not self._reached.is_set():
            self._reached.set()
            assert self._open.wait(PATIENCE), "the gate was not opened"

    def write(self, storage: LocalStorage, path: str, pieces: Iterable[Any], size: int, **keywords: Any) -> float:
        """In place of ``LocalStorage.write``."""
        if path.endswith(".safetensors") and self._file in path:
            pieces = self._held(pieces)
        return _write(storage, path, pieces, size, **keywords)


_write = LocalStorage.write


@contextlib.contextmanager
def closed(*, pieces: int = 1, file: str = "") -> Iterator[Gate]:
    """The first save begun inside is held after ``pieces`` pieces of a tensor file whose path has ``file`` in it."""
    gate = Gate(pieces=pieces, file=file)

    def write(storage: LocalStorage, path: str, pieces: Iterable[Any], size: int, **keywords: Any) -> float:
        return gate.write(storage, path, pieces, size, **keywords)

    with mock.patch.object(LocalStorage, "write", write):
        try:
            yield gate
        finally:
            gate.open()


@contextlib.contextmanager
def slow(seed: int, pauses: Sequence[float] = (0, 0, 0.0001, 0.001)) -> Iterator[None]:
    """Inside, the writer pauses after each piece of a tensor file, for one of ``pauses`` (seconds) each time."""
    dice = random.Random(seed)

    def paused(pieces: Iterable[Any]) -> Iterator[Any]:
        for piece in pieces:
            yield piece
            time.sleep(dice.choice(pauses))

    def write(storage: LocalStorage, path: str, pieces: Iterable[Any], size: int, **keywords: Any) -> float:
        if path.endswith(".safetensors"):
            pieces = paused(pieces)
        return _write(storage, path, pieces, size, **keywords)

    with mock.patch.object(LocalStorage, "write", write):
        yield
