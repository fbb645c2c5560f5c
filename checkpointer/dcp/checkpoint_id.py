"""What the writer and the reader agree on: where a checkpoint lies, and how DCP's flat state is laid out in it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from checkpointer.errors import ConfigError
from checkpointer.format import paths
from checkpointer.format.index import Index

MODEL = "model"
"""The component that holds every tensor of the state, under DCP's own flat names. A model's own state dict, saved
alone, is so what a manager restores as ``model``."""

OBJECTS = "objects"
"""The component that holds what is not a tensor, under the same names; absent where there is nothing."""

PATHS = "dcp"
"""The member of their ``meta`` that says how nested state was: flat name to the keys that lead there. Names that stand
at the top of the state are left out."""


class CheckpointId(NamedTuple):
    """A checkpoint's directory."""

    root: str
    """Run root: path or URL."""
    name: str
    step: int


def parse_checkpoint_id(path: str | os.PathLike[str]) -> CheckpointId:
    """Take ``<root>/checkpoint-<step>`` apart.

    Raises:
        ConfigError: the last part has another form.
    """
    text = os.fspath(path).replace("\\", "/").rstrip("/")
    root, slash, name = text.rpartition("/")
    step = paths.parse_checkpoint_name(name)
    if step is None:
        raise ConfigError(
            f"a checkpoint's directory is <run root>/checkpoint-<step>, got {os.fspath(path)!r}: with that name it is "
            "committed atomically beside others, and listed, verified and pruned like them"
        )
    return CheckpointId(root if slash else ".", name, step)


def is_checkpoint_id(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` has the form of a checkpoint's directory."""
    try:
        parse_checkpoint_id(path)
    except ConfigError:
        return False
    return True


def is_plugin_made(index: Index) -> bool:
    """Whether the names in the index are DCP's own."""
    return PATHS in getattr(index.components.get(MODEL), "meta", {})


def paths_of(meta: Mapping[str, object]) -> dict[str, tuple[str | int, ...]]:
    """The keys that lead to each value that did not stand at the top of the state."""
    raw = meta.get(PATHS)
    found = raw if isinstance(raw, dict) else {}
    return {name: tuple(path) for name, path in found.items() if isinstance(path, list)}
