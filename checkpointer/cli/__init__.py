"""The command ``checkpointer``: what is in a run root, whether it is whole, and what retention would do.

``base`` is what all commands share; ``commands`` declares most of them, ``diff``, ``doctor`` and ``convert``
the rest.
``gather`` collects what they ask for, ``render`` lays it out, ``output`` writes it. torch is imported by ``import`` and
``export``, and by ``diff`` once tensors differ; rich only for a terminal.
"""

from __future__ import annotations

import contextlib
import io
import sys


def main() -> None:
    """Run the command line on ``sys.argv`` and exit."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without UTF-8 gets escapes, not an error
            with contextlib.suppress(OSError, ValueError):
                stream.reconfigure(errors="backslashreplace")
    try:
        from checkpointer.cli.commands import cli
    except ModuleNotFoundError as error:
        if error.name != "click":
            raise
        sys.stderr.write(
            "error: the command line needs the packages click and rich, which are not installed: "
            "run 'pip install \"torch-checkpointer[cli]\"'\n"
        )
        sys.exit(2)
    cli.main()


__all__ = ["main"]
