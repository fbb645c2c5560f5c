"""What a save has cost, as its manifest's ``statistics`` tell. Pure; trusts nothing: any JSON may stand there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

_LARGEST_SECONDS = 1e9
"""Thirty years: whatever says more has not measured anything."""


@dataclass(frozen=True, kw_only=True)
class SaveCost:
    """The cost of one save; ``None`` where it is not known, as for imported checkpoints."""

    mode: str | None = None
    """``write: {mode}`` of that save."""
    wait: float | None = None
    """Seconds that the call waited for the previous save."""
    stall: float | None = None
    """Seconds that the call held training, without the wait."""
    write: float | None = None
    """Seconds from the first byte written to just before the commit."""
    fsync: float | None = None
    """Seconds of these spent in fsync."""
    written: int | None = None
    """Bytes written."""
    shared: int | None = None
    """Bytes that were there already, in an earlier checkpoint."""

    @classmethod
    def from_statistics(cls, statistics: Mapping[str, object]) -> SaveCost:
        """Whatever of ``statistics`` makes sense."""
        mode = statistics.get("mode")
        return cls(
            mode=mode if isinstance(mode, str) else None,
            wait=_seconds(statistics.get("wait_seconds")),
            # Checkpoints from before the stall was measured as such: copying the state was nearly all of it.
            stall=_seconds(statistics.get("stall_seconds", statistics.get("staging_seconds"))),
            write=_seconds(statistics.get("write_seconds")),
            fsync=_seconds(statistics.get("fsync_seconds")),
            written=_bytes(statistics.get("bytes_written")),
            shared=_bytes(statistics.get("bytes_shared")),
        )

    @property
    def to_training(self) -> float | None:
        """Seconds that training stood still for this save; ``None`` if that is not known."""
        return None if self.stall is None else (self.wait or 0.0) + self.stall

    @property
    def to_durable(self) -> float | None:
        """Seconds from the call to the commit, the wait excluded; ``None`` if that is not known."""
        if self.stall is None or self.write is None:
            return None
        return (
            self.stall if self.mode == "sync" else self.stall + self.write
        )  # sync: the call writes, so it includes it


def _seconds(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= _LARGEST_SECONDS:
        return None
    return float(value) if math.isfinite(value) else None


def _bytes(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


__all__ = ["SaveCost"]
