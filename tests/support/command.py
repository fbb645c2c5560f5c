"""``runner()``: runs the command in this process, with stdout and stderr apart in every version of click."""

from __future__ import annotations

import inspect
from typing import Any

from click.testing import CliRunner


def runner() -> CliRunner:
    """Before click 8.2 the streams are one unless it is told otherwise; since then there is no such argument."""
    apart: dict[str, Any] = {"mix_stderr": False} if "mix_stderr" in inspect.signature(CliRunner).parameters else {}
    return CliRunner(**apart)
