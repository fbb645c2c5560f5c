"""What a restore is asked for, and what it tells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypedDict

from checkpointer.errors import ConfigError
from checkpointer.format.info import CheckpointInfo
from checkpointer.policy.values import did_you_mean
from checkpointer.state import ComponentReport, RestoreOptions
from checkpointer.state.protocol import Adapt, MapLocation, Rename


@dataclass(frozen=True)
class Skipped:
    """A checkpoint that ``restore_latest`` passed over because it is damaged."""

    step: int
    path: str
    reason: str

    def __str__(self) -> str:
        return f"step {self.step}: {self.reason}"


@dataclass
class RestoreReport:
    """What a restore did, component by component. Prints as a short table."""

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

    step: int
    """The step given to ``save``; training goes on at ``step + 1``."""
    epoch: int | None
    metrics: Mapping[str, float]
    checkpoint: CheckpointInfo
    skipped: tuple[Skipped, ...] = ()
    """Newer checkpoints that are damaged."""
    report: RestoreReport = field(default_factory=RestoreReport)


@dataclass(frozen=True)
class RestoreRequest:
    """What the user asked for."""

    components: tuple[str, ...] | None
    options: RestoreOptions
    verify: str
    """``stream``, ``before`` or ``off``."""
    read_only: bool


class RestoreKeywords(TypedDict, total=False):
    """The options of every restore; see :meth:`checkpointer.CheckpointManager.restore`."""

    strict: bool
    components: Iterable[str] | None
    ignore_keys: Iterable[str]
    rename: Rename | None
    adapt: Adapt | None
    map_location: MapLocation
    verify: str | None


def restore_request(options: RestoreKeywords, verify: str, *, read_only: bool) -> RestoreRequest:
    """The options, checked; ``verify`` is the configured one.

    Raises:
        ConfigError: an unknown option, or a value that makes no sense.
    """
    unknown = set(options) - set(RestoreKeywords.__annotations__)
    if unknown:
        hint = did_you_mean(min(unknown), RestoreKeywords.__annotations__)
        raise ConfigError(f"unknown restore option {', '.join(sorted(unknown))}{hint}")
    verify = options.get("verify") or verify
    if verify not in ("stream", "before", "off"):
        raise ConfigError(f"verify must be 'stream', 'before' or 'off', got {verify!r}")
    components, ignored = options.get("components"), options.get("ignore_keys", ())
    if isinstance(components, str) or isinstance(ignored, str):
        raise ConfigError("components and ignore_keys are lists: write ['model'], not 'model'")
    return RestoreRequest(
        components=None if components is None else tuple(components),
        options=RestoreOptions(
            strict=options.get("strict", True),
            ignore_keys=tuple(ignored),
            rename=options.get("rename"),
            adapt=options.get("adapt"),
            map_location=options.get("map_location"),
            partial=components is not None,
        ),
        verify=verify,
        read_only=read_only,
    )
