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

from checkpointer.errors import CheckpointerWarning

Keep = Callable[[Exception], object]

_keep: ContextVar[Keep | None] = ContextVar("checkpointer_keep_warnings", default=None)
"""What takes a warning that is an error. Each thread has its own."""


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


def warn(message: str, *, stacklevel: int = 1) -> None:
    """Issue a ``CheckpointerWarning`` at once, whatever the thread. ``stacklevel`` is that of ``warnings.warn``.

    Raises:
        CheckpointerWarning: the user's filters make it an error, and nobody keeps it until later.
    """
    try:
        warnings.warn(message, CheckpointerWarning, stacklevel=stacklevel + 1)
    except Exception as error:  # also what a ``warnings.showwarning`` of the user's raises
        keep = _keep.get()
        if keep is None:
            raise
        keep(error.with_traceback(None))  # which would hold on to all that the save has in its hands


def log(say: Callable[..., None], message: str, *arguments: object, error: BaseException | None = None) -> None:
    """Call ``say``, a method of a logger. A handler that raises is shown on stderr, as ``logging`` does itself."""
    try:
        say(message, *arguments, exc_info=error, stacklevel=2)
    except Exception:  # noqa: BLE001  a log server's outage must not fail what is being logged
        if logging.raiseExceptions and sys.stderr is not None:
            with contextlib.suppress(OSError, ValueError):  # stderr may be closed
                traceback.print_exc(file=sys.stderr)
