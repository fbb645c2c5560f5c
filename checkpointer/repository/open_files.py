"""Files that are open for reading, by name: as many as the system lets a process have, however many there are."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from checkpointer.storage import ReadFile

MOST_OPEN = 100
"""Files that stay open while nobody reads them; the usual limit of a process is 1024."""


@dataclass
class _Open:
    file: ReadFile
    users: int = 0


class OpenFiles:
    """Opens each file when it is first used, and closes those that were not used for the longest time."""

    def __init__(self, open_file: Callable[[str], ReadFile]) -> None:
        self._open_file = open_file
        self._open: OrderedDict[str, _Open] = OrderedDict()
        self._guard = threading.Lock()

    @contextmanager
    def using(self, path: str) -> Iterator[ReadFile]:
        """The open file ``path``, which stays open within this block. From any thread."""
        with self._guard:
            found = self._open.get(path)
            if found is None:
                found = self._open[path] = _Open(self._open_file(path))
            self._open.move_to_end(path)
            found.users += 1
        try:
            yield found.file
        finally:
            with self._guard:
                found.users -= 1
                self._close_some()

    def check(self, path: str) -> None:
        """Open ``path`` once, which compares its size with the one that was recorded."""
        with self.using(path):
            pass

    def close(self) -> None:
        """Close all of them."""
        with self._guard:
            while self._open:
                self._open.popitem()[1].file.close()

    def _close_some(self) -> None:
        idle = [path for path, found in self._open.items() if not found.users]
        for path in idle[: max(len(self._open) - MOST_OPEN, 0)]:
            self._open.pop(path).file.close()
