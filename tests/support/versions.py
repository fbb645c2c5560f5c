"""What the tests were last run with: a newer torch may have what they do not know."""

from __future__ import annotations

import re

NEWEST_TORCH = "2.13.0"
"""The newest release that the whole suite was run with; scripts/_env.py installs it, too."""


def release(version: str) -> tuple[int, ...]:
    """``"2.13.0+cpu"`` as ``(2, 13)``: what decides which dtypes, layers and optimizers there are."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))
