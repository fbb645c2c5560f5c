"""What a restore tells: what it restored, what it passed over, and what has changed since the save."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from checkpointer.format.info import CheckpointInfo
from checkpointer.state import ComponentReport


@dataclass(frozen=True)
class Skipped:
    """A checkpoint that ``restore_latest`` passed over because it is damaged."""

    __module__ = "checkpointer"

    step: int
    path: str
    reason: str

    def __str__(self) -> str:
        return f"step {self.step}: {self.reason}"


@dataclass
class RestoreReport:
    """What a restore did, component by component. Prints as a short table."""

    __module__ = "checkpointer"

    components: dict[str, ComponentReport] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    """Registered components that the checkpoint lacks: left as they were."""
    unexpected: list[str] = field(default_factory=list)
    """Components of the checkpoint that are not registered, or were not asked for: not restored."""
    changed: list[str] = field(default_factory=list)
    """What is not as it was when saved: versions, devices. One sentence each."""

    def __str__(self) -> str:
        rows = [str(report) for report in self.components.values()]
        for title in ("missing", "unexpected", "changed"):
            rows += [f"{title:<12} {entry}" for entry in getattr(self, title)]
        return "\n".join(rows)


@dataclass(frozen=True)
class Restored:
    """A finished restore."""

    __module__ = "checkpointer"

    step: int
    """The step given to ``save``; training goes on at ``step + 1``."""
    epoch: int | None
    metrics: Mapping[str, float]
    checkpoint: CheckpointInfo
    skipped: tuple[Skipped, ...] = ()
    """Newer checkpoints that are damaged."""
    report: RestoreReport = field(default_factory=RestoreReport)
