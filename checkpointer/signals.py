"""Preemption: a signal sets a flag, and nothing else happens until the training loop asks."""

from __future__ import annotations

import signal
import threading
import warnings
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from checkpointer.errors import CheckpointerWarning


class SignalFlag:
    """Handlers for the named signals (``"SIGTERM"``, …) from ``install`` to ``restore``."""

    def __init__(self) -> None:
        self.requested = False
        self._earlier: dict[signal.Signals, Any] = {}

    def install(self, names: Sequence[str]) -> None:
        """Handle the signals from now on. Python allows that in the main thread only; elsewhere it warns."""
        if not names:
            return
        if threading.current_thread() is not threading.main_thread():
            warnings.warn(
                f"on_signal ({', '.join(names)}) has no effect: the manager was made outside the main thread",
                CheckpointerWarning,
                stacklevel=3,
            )
            return
        for name in names:
            number = signal.Signals[name]
            self._earlier[number] = signal.signal(number, self._handle)

    def restore(self) -> None:
        """Put the earlier handlers back, where nobody has replaced ours meanwhile."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number, handler in self._earlier.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._earlier.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        earlier: Callable[[int, FrameType | None], object] | Any = self._earlier.get(signal.Signals(number))
        if callable(earlier) and earlier is not signal.default_int_handler:  # that one would end the loop at once
            earlier(number, frame)
