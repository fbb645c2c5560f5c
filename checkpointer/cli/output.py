"""Text that is safe to print, and the streams that it goes to."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO


def clean(text: str) -> str:
    r"""``text`` with everything unprintable as an escape (``\x1b``, ``\u202e``).

    Names, tags and notes come from checkpoints, which may be hostile: no byte of theirs may command the terminal.
    """
    return text if text.isprintable() else "".join(map(_escaped, text))


def _escaped(char: str) -> str:
    return char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode("ascii")


def one_line(text: str) -> str:
    """``text`` cleaned, with line breaks and their indentation as single spaces."""
    return clean(" ".join(text.split()))


def is_terminal(stream: TextIO) -> bool:
    """Whether tables, colours and progress belong on ``stream``."""
    if not stream.isatty() or os.environ.get("TERM") == "dumb":
        return False
    from importlib.util import find_spec

    return find_spec("rich") is not None


def emit(text: str) -> None:
    """Write lines to stdout. A reader that has gone away (``| head``) is no error: the rest is dropped."""
    if not text:
        return
    try:
        sys.stdout.write(text if text.endswith("\n") else f"{text}\n")
        sys.stdout.flush()
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):  # also for the flush at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def complain(kind: str, message: str) -> None:
    """One plain line to stderr: ``error: …`` or ``warning: …``."""
    with contextlib.suppress(BrokenPipeError):
        sys.stderr.write(f"{kind}: {one_line(message)}\n")
        sys.stderr.flush()


def emit_json(document: dict[str, Any] | list[Any]) -> None:
    """Write one JSON document, in ASCII and without line breaks in it."""
    try:
        text = json.dumps(document, allow_nan=False)
    except ValueError:  # a number such as 1e999 in a hostile file
        text = json.dumps(_finite(document), allow_nan=False)
    emit(text.replace("\x7f", "\\u007f"))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def progress(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """A bar of ``total`` bytes on stderr if that is a terminal. Yields what to call with each count of bytes done."""
    if not is_terminal(sys.stderr):
        yield _ignore
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True, color_system=color_system())
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    text = TextColumn("{task.description}", markup=False)
    # Lines for a stdout that is the same terminal go through rich, above the bar; those for a file or pipe must not.
    with Progress(text, *columns, console=console, transient=True, redirect_stdout=sys.stdout.isatty()) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


def _ignore(count: int) -> None:
    """Where nobody is watching."""


def color_system() -> Any:
    """What rich may use: nothing at all, not even bold, where ``NO_COLOR`` is set."""
    return None if os.environ.get("NO_COLOR") else "auto"
