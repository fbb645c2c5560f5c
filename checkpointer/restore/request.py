"""What a restore is asked for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from checkpointer.errors import ConfigError
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


def restore_request(
    *,
    strict: bool = True,
    components: Iterable[str] | None = None,
    ignore_keys: Iterable[str] = (),
    rename: Rename | None = None,
    adapt: Adapt | None = None,
    map_location: MapLocation = None,
    verify: str | None = None,
    configured: str,
    read_only: bool,
) -> RestoreRequest:
    """The options of a restore, checked; ``configured`` is what the configuration says of ``verify``.

    Raises:
        ConfigError: a value that makes no sense.
    """
    verify = verify or configured
    if verify not in ("stream", "before", "off"):
        raise ConfigError(f"verify must be 'stream', 'before' or 'off', got {verify!r}")
    if isinstance(components, str) or isinstance(ignore_keys, str):
        raise ConfigError("components and ignore_keys are lists: write ['model'], not 'model'")
    return RestoreRequest(
        components=None if components is None else tuple(components),
        options=RestoreOptions(
            strict=strict,
            ignore_keys=tuple(ignore_keys),
            rename=rename,
            adapt=adapt,
            map_location=map_location,
            partial=components is not None,
        ),
        verify=verify,
        read_only=read_only,
    )
