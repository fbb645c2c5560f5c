"""Turns live training objects into (tree, tensors) and back. No file I/O."""

from __future__ import annotations

from checkpointer.state.adapters import adapter_for
from checkpointer.state.plan import Adapter, Captured, ComponentReport, RestoreOptions, RestorePlan, SavedState
from checkpointer.state.registry import register_codec
from checkpointer.state.rng import RngState
from checkpointer.state.stateful import Stateful

__all__ = [
    "Adapter",
    "Captured",
    "ComponentReport",
    "RestoreOptions",
    "RestorePlan",
    "RngState",
    "SavedState",
    "Stateful",
    "adapter_for",
    "register_codec",
]
