"""What is known about one committed checkpoint without reading its data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

EPOCH_START = datetime.fromtimestamp(0, tz=timezone.utc)


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """One committed checkpoint, as its manifest and its notes describe it.

    Every field but ``step`` has a default, so that retention rules can be tried on made-up checkpoints.
    """

    __module__ = "checkpointer"

    step: int
    """Training step given to ``save``."""
    epoch: int | None = None
    """Epoch given to ``save``."""
    sequence: int = 0
    """Commit order within the run root: later commits have larger numbers, whatever their step."""
    id: str = ""
    """32 hexadecimal digits, unique for each commit."""
    parent: str | None = None
    """``id`` of the checkpoint that this run had last committed or restored."""
    created: datetime = EPOCH_START
    """When the state was captured (aware, UTC)."""
    metrics: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Metrics given to ``save``, overlaid with those annotated later."""
    tags: tuple[str, ...] = ()
    """Tags given to ``save`` and annotated later."""
    pinned: bool = False
    """Pinned checkpoints are never removed by retention."""
    size: int = 0
    """Bytes of all files of the checkpoint."""
    finite: bool | None = None
    """``False`` where parameters or optimizer state hold NaN or infinity; ``None`` where not examined."""
    path: str = ""
    """Where the checkpoint lies: a local path, or a URL without credentials."""
    note: str | None = None
    """The last free-text note annotated."""
    statistics: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What the save cost, for humans: seconds and bytes by name."""
    copies: Mapping[str, int] = field(default_factory=dict, hash=False)
    """Bytes that lie on this disk, by the id of the checkpoint whose save wrote them: what several checkpoints share is
    there once. Empty: all ``size`` bytes are its own."""
    damaged: str | None = None
    """Why a restore or ``verify`` found this checkpoint damaged; ``None`` while nothing is known against it."""

    def __post_init__(self) -> None:
        if self.created.tzinfo is None:
            raise ValueError(f"created must be an aware datetime, got {self.created!r}")

    @property
    def usable(self) -> bool:
        """True unless the checkpoint is known to be damaged or to hold non-finite values."""
        return self.damaged is None and self.finite is not False

    def __str__(self) -> str:
        return f"checkpoint-{self.step} (sequence {self.sequence})"
