"""What a restore is asked for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypedDict

from checkpointer.errors import ConfigError
from checkpointer.policy.values import did_you_mean
from checkpointer.state import RestoreOptions
from checkpointer.state.protocol import Adapt, MapLocation, Rename


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
