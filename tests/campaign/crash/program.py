"""Programs of the crash campaigns, run as their scripts run them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def run(module: str, *arguments: str, within: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Run ``python -m module``, which forks processes, in a new process; ``within`` is a command that starts it."""
    return subprocess.run(
        [*within, sys.executable, "-m", module, *arguments],
        cwd=Path(__file__).parents[3],
        env={**os.environ, **_ONE_THREAD},
        capture_output=True,
        text=True,
        check=False,
    )
