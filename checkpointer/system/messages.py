"""What is said to the user in the middle of a save. It must not fail the save, nor end a thread that nobody watches.

A warning may be an error (``python -W error``), and a handler of ``logging`` may raise. Modules on the path of a save
say what they have to say with ``warn`` and ``log``; who carries the save out keeps the errors until it is done.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import FrameType

from checkpointer.errors import CheckpointerWarning

Keep = Callable[[Exception], object]

_keep: ContextVar[Keep | None] = ContextVar("checkpointer_keep_warnings", default=None)
"""What takes a warning that is an error. Each thread has its own."""

_BETWEEN = frozenset({__name__.partition(".")[0], "concurrent", "contextlib", "functools", "threading", "torch"})
"""Packages whose lines say nothing of what the user did: ours, and those that call us (torch: ``Optimizer.step``)."""


@contextlib.contextmanager
def kept(keep: Keep | None) -> Iterator[None]:
    """Within this block, and this thread, a warning that the user's filters turn into an error goes to ``keep``.

    ``None``: it is raised.
    """
    token = _keep.set(keep)
    try:
        yield
    finally:
        _keep.reset(token)


def warn(message: str) -> None:
    """Issue a ``CheckpointerWarning`` at once, whatever the thread, for the line of the user's that led here.

    Raises:
        CheckpointerWarning: the user's filters make it an error, and nobody keeps it until later.
    """
    caller = sys._getframe(1)  # noqa: SLF001  what warnings.warn is made of; inspect.stack reads source files
    place = _users_frame(caller) or caller
    registry = place.f_globals.setdefault("__warningregistry__", {})
    file, module = place.f_code.co_filename, place.f_globals.get("__name__", "<unknown>")
    try:
        warnings.warn_explicit(message, CheckpointerWarning, file, place.f_lineno, module, registry)
    except Exception as error:  # also what a ``warnings.showwarning`` of the user's raises
        keep = _keep.get()
        if keep is None:
            raise
        keep(error.with_traceback(None))  # which would hold on to all that the save has in its hands


def _users_frame(frame: FrameType | None) -> FrameType | None:
    """The innermost frame outside this package and what stands between it and its callers; ``None``: its own thread."""
    while frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _BETWEEN:
        frame = frame.f_back
    return frame


def log(say: Callable[..., None], message: str, *arguments: object, error: BaseException | None = None) -> None:
    """Call ``say``, a method of a logger. A handler that raises is shown on stderr, as ``logging`` does itself."""
    try:
        say(message, *arguments, exc_info=error, stacklevel=2)
    except Exception:  # noqa: BLE001  a log server's outage must not fail what is being logged
        if logging.raiseExceptions and sys.stderr is not None:
            with contextlib.suppress(OSError, ValueError):  # stderr may be closed
                traceback.print_exc(file=sys.stderr)
