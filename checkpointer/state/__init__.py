"""Turns live training objects into (tree, tensors) and back. No file I/O."""

from __future__ import annotations

from checkpointer.state.adapters import adapter_for, capture_all, modules_of, optimizers_of
from checkpointer.state.gradients import Gradients
from checkpointer.state.module.adapter import ModuleComponent
from checkpointer.state.module.whole import WholeModel, WholeModelLoader
from checkpointer.state.protocol import Adapter, Captured, ComponentReport, RestoreOptions, RestorePlan, SavedState
from checkpointer.state.rng import RngState
from checkpointer.state.stateful import Stateful
from checkpointer.state.tree.codecs import register_codec
from checkpointer.state.unregistered import Unregistered, inner_optimizers

__all__ = [
    "Adapter",
    "Captured",
    "ComponentReport",
    "Gradients",
    "ModuleComponent",
    "RestoreOptions",
    "RestorePlan",
    "RngState",
    "SavedState",
    "Stateful",
    "Unregistered",
    "WholeModel",
    "WholeModelLoader",
    "adapter_for",
    "capture_all",
    "inner_optimizers",
    "modules_of",
    "optimizers_of",
    "register_codec",
]
