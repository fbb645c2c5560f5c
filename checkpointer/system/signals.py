"""Preemption: a signal sets a flag, and nothing else happens until the training loop asks."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

from checkpointer.system import messages


class SignalFlag:
    """Handlers for the named signals (``"SIGTERM"``, …) from ``install`` to ``restore``."""

    def __init__(self) -> None:
        self.since: float | None = None
        """When the first of them came, by ``time.monotonic()``."""
        self.number: int | None = None
        """Which it was."""
        self._earlier: dict[int, Any] = {}
        self._active = False
        self._pid = os.getpid()

    @property
    def requested(self) -> bool:
        """Whether one of them has come."""
        return self.since is not None

    def install(self, names: Sequence[str]) -> None:
        """Handle the signals from now on. Python allows that in the main thread only; elsewhere it warns."""
        if not names:
            return
        if threading.current_thread() is not threading.main_thread():
            messages.warn(
                f"on_signal ({', '.join(names)}) has no effect: the manager was made outside the main thread",
            )
            return
        self._active = True
        for name in names:
            number = signal.Signals[name]
            earlier = _beneath(signal.getsignal(number), number)
            self._earlier[number] = signal.SIG_DFL if earlier is None else earlier  # None: not made by Python
            signal.signal(number, self._handle)

    def restore(self) -> None:
        """Put the earlier handlers back.

        Where that is not possible now, because another handler has been set on top or this is not the main thread,
        ours lets every signal through from now on.
        """
        self._active = False
        if threading.current_thread() is not threading.main_thread():
            return
        for number, earlier in self._earlier.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, _beneath(earlier, number))

    def or_earlier(self, handler: Any, number: int) -> Any:
        """``handler``, which is ours, or after ``restore`` what was there before."""
        self._earlier[number] = _beneath(self._earlier[number], number)
        return handler if self._active else self._earlier[number]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Set the flag and call the earlier handler: no more, for this may interrupt any line of Python."""
        if not self._is_meant(number) and signal.getsignal(number) == self._handle:
            signal.signal(number, self._earlier[number])
            signal.raise_signal(number)
            return
        if self._is_meant(number) and self.since is None:
            self.number, self.since = number, time.monotonic()
        earlier = self._earlier[number]
        if callable(earlier) and earlier is not signal.default_int_handler:  # that one would end the loop at once
            earlier(number, frame)

    def _is_meant(self, number: int) -> bool:
        """Whether a signal is for the training loop.

        A forked child inherits the handler. SIGTERM must end it as ever: multiprocessing ends its children so, and
        then waits for them. Other signals may reach the whole group, and data loading workers have to outlive them.
        """
        return self._active and (number != signal.SIGTERM or os.getpid() == self._pid)


def _beneath(handler: Any, number: int) -> Any:
    """``handler``, or what was set before it where it is one of ours that is over, but was not on top at that time.

    So the handlers of managers that have been taken over do not pile up.
    """
    flag = getattr(handler, "__self__", None)
    return flag.or_earlier(handler, number) if isinstance(flag, SignalFlag) else handler
