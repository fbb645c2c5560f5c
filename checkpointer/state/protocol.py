"""What passes between the adapters of this package and the engine around them.

An :class:`Adapter` turns one live object into a :class:`Captured` and, for a restore, a :class:`SavedState` into a
:class:`RestorePlan`. The engine copies the captured tensors out, and later fills ``RestorePlan.reads``.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias, runtime_checkable

import torch

from checkpointer.format.index import Component, Json
from checkpointer.format.tensor_files import FileNaming

Rename: TypeAlias = Mapping[str, str] | Callable[[str], str]
Adapt: TypeAlias = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]
MapLocation: TypeAlias = torch.device | str | None


@dataclass
class Captured:
    """The state of one component: references to live tensors, nothing copied."""

    kind: str
    """Which adapter can restore it."""
    tree: Json
    """Encoded Python state that refers to ``tensors`` by key."""
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    """Detached strided tensors by key: any device, dtype and strides; conjugate and negative bits are possible."""
    meta: dict[str, Json] = field(default_factory=dict)
    """What the adapter needs beside the tree."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Modules: other ``state_dict`` names of a stored tensor (tied weights) -> the key it is stored under."""
    frozen: frozenset[str] = frozenset()
    """Modules: keys of parameters with ``requires_grad`` False."""
    trainable: frozenset[str] = frozenset()
    """Keys of parameters and moments: where these hold NaN or infinities, the run has diverged."""
    naming: FileNaming | None = None
    """How its files are called, where this is one rank's part of a component."""


@dataclass(frozen=True)
class SavedState:
    """One component read back from a checkpoint."""

    name: str
    component: Component


@dataclass(frozen=True)
class RestoreOptions:
    """How a saved component may differ from the live one."""

    strict: bool = True
    ignore_keys: Iterable[str] = ()
    """Globs of keys (``key`` or ``component.key``) that are left as they are."""
    rename: Rename | None = None
    """Saved key -> live key; keys that a mapping lacks keep their name."""
    adapt: Adapt | None = None
    """``(key, saved_tensor, target_tensor) -> tensor``, called where dtype or shape differ."""
    map_location: MapLocation = None
    """Device of newly created tensors."""
    partial: bool = False
    """Only some components are restored: live ``requires_grad`` and training flags stay, and are reported."""
    rng: bool = True
    """Whether the global random generators are among the components that are restored."""

    def ignored(self, component: str, key: str) -> bool:
        """Whether ``key`` of ``component`` matches one of the globs of ``ignore_keys``."""
        if self.ignore_keys == ():  # asked for every tensor of every restore
            return False
        names = (key, f"{component}.{key}")
        return any(fnmatch.fnmatchcase(name, glob) for glob in self.ignore_keys for name in names)

    def renamed(self, key: str) -> str:
        """The live key for a saved one."""
        if self.rename is None:
            return key
        return self.rename(key) if callable(self.rename) else self.rename.get(key, key)

    @property
    def restores_flags(self) -> bool:
        """Whether ``requires_grad`` and training flags are restored too."""
        return self.strict and not self.partial


@dataclass
class ComponentReport:
    """What a restore did to one component. Prints as a short table."""

    __module__ = "checkpointer"

    name: str = ""
    restored: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """Live keys that the checkpoint lacks: left as they were."""
    unexpected: list[str] = field(default_factory=list)
    """Saved keys that the live object lacks: not restored."""
    renamed: list[tuple[str, str]] = field(default_factory=list)
    """(saved key, live key)."""
    cast: list[tuple[str, str]] = field(default_factory=list)
    """(key, ``"float32 -> bfloat16"``)."""
    adapted: list[tuple[str, str]] = field(default_factory=list)
    """(key, ``"[10, 4] -> [12, 4]"``)."""
    changed: list[str] = field(default_factory=list)
    """Everything else that is not as it was before, or not as it was saved, one sentence each."""

    def __str__(self) -> str:
        rows = [f"{self.name}: {len(self.restored)} restored"]
        for title in ("missing", "unexpected", "renamed", "cast", "adapted", "changed"):
            entries = getattr(self, title)
            rows += [f"  {title:<10} {_entry(title, entry)}" for entry in entries[:20]]
            if len(entries) > 20:
                rows.append(f"  {title:<10} and {len(entries) - 20} more")
        return "\n".join(rows)


def _entry(title: str, entry: str | tuple[str, str]) -> str:
    if isinstance(entry, str):
        return entry
    return f"{entry[0]} -> {entry[1]}" if title == "renamed" else f"{entry[0]} ({entry[1]})"


@dataclass
class RestorePlan:
    """A checked restore that has not changed anything yet."""

    reads: dict[str, torch.Tensor]
    """Stored key -> tensor of the saved dtype and shape to fill; may be live memory of any strides and device."""
    apply: Callable[[], None]
    """Called once every read of every component is verified."""
    report: ComponentReport
    settings: list[str] = field(default_factory=list)
    """Filled by ``apply``: settings of the live object that the checkpoint replaced by others, as in the report."""


@runtime_checkable
class Adapter(Protocol):
    """Captures and restores one kind of live object."""

    @property
    def kind(self) -> str:
        """Stored in the index, and compared when restoring."""

    def capture(self) -> Captured:
        """Refer to the state as it is now. Raises :class:`UnsupportedStateError`."""

    def prepare(self, saved: SavedState, options: RestoreOptions) -> RestorePlan:
        """Check and allocate; change no live object.

        Raises :class:`IncompatibleStateError` (all mismatches at once) and :class:`CorruptCheckpointError`.
        """
