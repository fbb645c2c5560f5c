"""Turns live training objects into (tree, tensors) and back. No file I/O."""

from __future__ import annotations

from checkpointer.state.adapters import adapter_for, capture_all, modules_of, optimizers_of
from checkpointer.state.gradients import Gradients
from checkpointer.state.module import ModuleComponent
from checkpointer.state.plan import Adapter, Captured, ComponentReport, RestoreOptions, RestorePlan, SavedState
from checkpointer.state.registry import register_codec
from checkpointer.state.rng import RngState
from checkpointer.state.stateful import Stateful
from checkpointer.state.unregistered import Unregistered, inner_optimizers
from checkpointer.state.whole import WholeModel, WholeModelLoader

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
